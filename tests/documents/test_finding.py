"""Which files a path, a folder or a glob means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from document_kit import write

from lmcache_rag.documents import find_files
from lmcache_rag.documents.finding import named_by
from lmcache_rag.errors import DocumentError


def found(*paths: str | os.PathLike[str]) -> list[Path]:
    items = list(find_files(paths))
    assert all(isinstance(item, Path) for item in items), items
    return items  # type: ignore[return-value]


def problem(*paths: str | os.PathLike[str]) -> str:
    (item,) = find_files(paths)
    assert isinstance(item, DocumentError)
    assert item.remedy
    return str(item)


def test_a_folder_means_all_files_below_it_by_name(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.md", "a/b/c.html", "c.pdf"]
    for name in names:
        write(tmp_path / name)
    assert found(tmp_path) == [tmp_path / name for name in ("a/b/c.html", "a/z.md", "b.txt", "c.pdf")]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / ".secret.txt")
    write(tmp_path / ".git/config")
    kept = write(tmp_path / "kept.txt")
    assert found(tmp_path) == [kept]
    assert found(str(tmp_path / "**" / "*")) == [kept]


def test_a_hidden_file_named_outright_is_found(tmp_path: Path) -> None:
    hidden = write(tmp_path / ".secret.txt")
    assert found(hidden) == [hidden]
    assert found(str(tmp_path / ".s*")) == [hidden]


def test_binaries_in_folders_are_skipped_unless_named(tmp_path: Path) -> None:
    picture = write(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0")
    write(tmp_path / "a.pyc", b"\0")
    text = write(tmp_path / "a.txt")
    assert found(tmp_path) == [text]
    assert found(picture) == [picture]


def test_a_glob_with_two_stars_walks_into_folders(tmp_path: Path) -> None:
    top, deep = write(tmp_path / "docs/top.md"), write(tmp_path / "docs/x/y/deep.md")
    write(tmp_path / "docs/x/other.txt")
    assert found(str(tmp_path / "docs/**/*.md")) == [top, deep]


def test_a_folder_that_a_glob_matches_means_its_files(tmp_path: Path) -> None:
    inner = write(tmp_path / "docs-1/inner.md")
    assert found(str(tmp_path / "docs-*")) == [inner]


def test_a_name_with_glob_characters_is_literal(tmp_path: Path) -> None:
    literal = write(tmp_path / "notes[1].txt")
    write(tmp_path / "notes1.txt")
    assert found(str(literal)) == [literal]


def test_no_file_is_found_twice_whatever_leads_to_it(tmp_path: Path) -> None:
    file = write(tmp_path / "docs/a.txt")
    (tmp_path / "link.txt").symlink_to(file)
    assert found(file, tmp_path / "docs", str(tmp_path / "docs" / "*.txt"), tmp_path / "link.txt", file) == [file]


def test_relative_paths_and_home_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("a.txt") == found("~/a.txt") == found("./*.txt") == [file]


def test_a_path_that_matches_nothing_is_an_entry(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt")
    items = list(find_files([tmp_path / "missing.txt", str(tmp_path / "*.rst"), "", "a\0b", file]))
    texts = [str(item) for item in items]
    assert "missing.txt' does not exist" in texts[0]
    assert "*.rst' matches nothing" in texts[1]
    assert "'' is not a path" in texts[2]
    assert "is not a path" in texts[3]
    assert items[4:] == [file]


def test_a_folder_without_documents_is_an_entry(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    assert "holds no documents" in problem(tmp_path / "empty")


def test_a_folder_named_twice_is_no_error(tmp_path: Path) -> None:
    file = write(tmp_path / "docs/a.txt")
    assert found(tmp_path / "docs", tmp_path / "docs") == [file]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("docs", {"docs/a.md", "docs/sub/b.md", "docs/sub/deep/c.txt"}),
        ("docs/sub/b.md", {"docs/sub/b.md"}),
        ("docs/*.md", {"docs/a.md"}),
        ("docs/**/*.md", {"docs/a.md", "docs/sub/b.md"}),
        ("docs/s?b", {"docs/sub/b.md", "docs/sub/deep/c.txt"}),
        ("docs/[!s]*", {"docs/a.md"}),
        ("docs/**", {"docs/a.md", "docs/sub/b.md", "docs/sub/deep/c.txt"}),
        ("doc", set()),
        ("", set()),
        ("\0", set()),
    ],
)
def test_a_pattern_names_files_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, named: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    test = named_by(pattern)
    paths = ("docs/a.md", "docs/sub/b.md", "docs/sub/deep/c.txt", "docs2/d.md")
    assert {path for path in paths if test(str(tmp_path / path))} == named


@pytest.mark.parametrize("url", ["https://example.org/page.html", "s3://bucket/a.pdf", "file:///etc/hosts"])
def test_a_url_is_refused_as_one(url: str) -> None:
    assert f"'{url}' is a URL, and URLs are not fetched. Download it" in problem(url)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with documents, a store of ours, a repository and a virtual environment."""
    from lmcache_rag.store import Store

    top = tmp_path / "project"
    write(top / "a.md")
    write(top / "sub/b.md")
    Store.open(top / "my-store").close()
    write(top / "my-store/settings.toml")
    for name in ("HEAD", "objects/x", "refs/y"):
        write(top / ".git" / name)
        write(top / "bare.git" / name)
    for name in ("env/pyvenv.cfg", "env/lib/python3.11/site-packages/x/LICENSE.md", "env/bin/activate", "env/notes.md"):
        write(top / name)
    return top


def test_a_stores_uploads_are_documents_if_named(project: Path) -> None:
    uploaded = project / "my-store/uploads/0a/fact.md"
    write(uploaded)
    assert found(uploaded) == [uploaded]
    assert uploaded not in found(project)
    assert "is part of the store " in problem(project / "my-store/settings.toml")


def test_stores_git_and_environments_are_skipped(project: Path) -> None:
    wanted = [project / name for name in ("a.md", "env/notes.md", "sub/b.md")]
    assert found(project) == wanted
    assert sorted(found(str(project / "**" / "*"))) == wanted
    assert sorted(found(str(project / "**" / "*.md"))) == wanted


def test_a_new_store_is_skipped_while_it_is_open(project: Path) -> None:
    from lmcache_rag.store import Store

    with Store.open(project / "second"):
        assert not [path for path in found(project) if "second" in path.parts]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("my-store", "the store"),
        ("my-store/settings.toml", "the store"),
        (".git", "the Git repository"),
        (".git/HEAD", "the Git repository"),
        ("bare.git/objects", "the Git repository"),
        ("env/lib", "the virtual environment"),
        ("env/lib/python3.11/site-packages/x/LICENSE.md", "the virtual environment"),
    ],
)
def test_what_is_no_document_is_refused_if_named(project: Path, name: str, part: str) -> None:
    assert f"is part of {part} " in problem(project / name)


def test_a_link_into_a_store_is_skipped(project: Path) -> None:
    (project / "sub" / "link.toml").symlink_to(project / "my-store" / "settings.toml")
    (project / "sub" / "folder").symlink_to(project / "my-store")
    assert found(project / "sub") == [project / "sub" / "b.md"]
