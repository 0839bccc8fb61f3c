"""Documents on the command line: list, remove by name, glob or path, and documents whose files are gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_kit
import pytest
from cli_kit import Call, Stocked, document

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked

Names = Callable[..., set[str]]


@pytest.fixture
def names(call: Call) -> Names:
    """The documents that `list` finds, by the last two parts of their paths."""

    def listed(store: Path, *more: object) -> set[str]:
        found = document(call("list", *more, "--store", store, "--json"))["documents"]
        return {"/".join(Path(row["doc_id"]).parts[-2:]) for row in found}

    return listed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two documents."""
    made = tmp_path / "a"
    made.mkdir()
    (made / "weir.txt").write_text("The weir is closed in frost.")
    (made / "lock.txt").write_text("The lock opens at nine.")
    return made


def stock(call: Call, folder: Path, store: Path) -> None:
    assert call("ingest", folder, "--store", store, "--no-kv").exit_code == 0


# -- files that are gone ------------------------------------------------------------------------------------------


def test_status_names_documents_whose_files_are_gone(call: Call, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    assert document(call("status", "--store", store, "--json"))["gone"] == []
    assert "gone" not in call("status", "--store", store).stdout
    (folder / "weir.txt").unlink()
    assert document(call("status", "--store", store, "--json"))["gone"] == [str(folder / "weir.txt")]
    shown = call("status", "--store", store).stdout
    assert "The file of 1 document is gone" in shown
    assert "lmcache-rag remove --missing" in shown
    assert "weir.txt" in shown


def test_ingest_reports_files_that_are_gone(call: Call, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    (folder / "weir.txt").unlink()
    report = document(call("ingest", folder, "--store", store, "--no-kv", "--json"))
    assert (report["gone"], report["pruned"]) == ([str(folder / "weir.txt")], [])
    assert "weir.txt" in call("ingest", folder, "--store", store, "--no-kv").stdout


def test_ingest_prune_removes_what_is_gone(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    (folder / "weir.txt").unlink()
    report = document(call("ingest", folder, "--store", store, "--no-kv", "--prune", "--json"))
    assert (report["gone"], report["pruned"]) == ([], [str(folder / "weir.txt")])
    assert report["chunks_removed"] == 1
    assert names(store) == {"a/lock.txt"}


def test_ingest_prune_of_an_empty_folder_removes_all(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    shutil.rmtree(folder)
    call("ingest", folder, "--store", store, "--no-kv", "--prune")
    assert names(store) == set()


def test_ingest_prune_follows_a_moved_folder(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    folder.rename(tmp_path / "b")
    report = document(call("ingest", tmp_path / "b", "--store", store, "--no-kv", "--prune", "--json"))
    assert len(report["pruned"]) == 2
    assert report["chunks_removed"] == 0  # the moved documents hold them
    assert names(store) == {"b/weir.txt", "b/lock.txt"}


def test_ingest_prune_leaves_what_it_does_not_name(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "s", tmp_path / "disk"
    other.mkdir()
    (other / "ferry.txt").write_text("The ferry leaves at noon.")
    stock(call, folder, store)
    stock(call, other, store)
    shutil.rmtree(other)  # as if that disk was not mounted
    report = document(call("ingest", folder, "--store", store, "--no-kv", "--prune", "--json"))
    assert (report["gone"], report["pruned"]) == ([str(other / "ferry.txt")], [])
    assert "disk/ferry.txt" in names(store)


def test_a_dry_run_with_prune_removes_nothing(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    (folder / "weir.txt").unlink()
    plan = document(call("ingest", folder, "--store", store, "--prune", "--dry-run", "--json"))
    assert plan["gone"] == [str(folder / "weir.txt")]
    assert names(store) == {"a/weir.txt", "a/lock.txt"}


def test_remove_missing_removes_what_is_gone(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    stock(call, folder, store)
    assert document(call("remove", "--missing", "--store", store, "--json"))["documents"] == 0
    (folder / "weir.txt").unlink()
    assert names(store, "--missing") == {"a/weir.txt"}
    assert call("remove", "--missing", "--store", store).stdout.startswith("1 document removed")
    assert names(store) == {"a/lock.txt"}


def test_a_document_without_a_file_is_never_gone(call: Call, copy: Path, make_tiny: Any, embedder: Any) -> None:
    from lmcache_rag import Document, Workspace

    path = "/no/such/file.md"
    made = Document(path, "A note about nothing.", "1", path, {"name": "file.md"})  # by a program
    with Workspace.open(copy, engine=make_tiny(copy / "kv"), embedder=embedder) as workspace:
        workspace.ingestor.ingest([made], kv=False)
    assert document(call("status", "--store", copy, "--json"))["gone"] == []


def test_a_file_that_may_not_be_looked_at_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_rag.documents import access

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(access.os, "stat", refuse)  # this user may read everything
    assert not access.is_gone(str(tmp_path / "x.txt"))


# -- list ---------------------------------------------------------------------------------------------------------


def test_list_shows_documents_with_their_chunks(call: Call, stocked: Stocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stocked.docs)
    lines = call("list", "--store", stocked.store).stdout.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == ["berlin.html", "cache.txt", "more/copy.txt", "rope.md"]
    assert all(line.startswith("1 chunk ") for line in lines[:-1])
    assert lines[-1] == "4 documents."


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (["*.txt"], {"docs/cache.txt"}),
        (["*"], {"docs/cache.txt", "docs/rope.md", "docs/berlin.html", "more/copy.txt"}),
        (["more"], {"more/copy.txt"}),
        (["copy.txt", "rope.md"], {"more/copy.txt", "docs/rope.md"}),
    ],
)
def test_list_takes_names_and_globs(
    names: Names, stocked: Stocked, monkeypatch: pytest.MonkeyPatch, filters: list[str], wanted: set[str]
) -> None:
    monkeypatch.chdir(stocked.docs)
    assert {name.replace(stocked.docs.name, "docs") for name in names(stocked.store, *filters)} == wanted


def test_list_of_an_unknown_document_exits_1(call: Call, stocked: Stocked) -> None:
    result = call("list", "nothing.md", "--store", stocked.store, "--json")
    assert document(result) == {"documents": [], "unknown": ["nothing.md"]}
    assert result.exit_code == 1


# -- remove -------------------------------------------------------------------------------------------------------


def test_remove_by_bare_name_from_any_folder(call: Call, copy: Path) -> None:
    assert document(call("remove", "rope.md", "--store", copy, "--json"))["documents"] == 1


def test_remove_by_the_end_of_a_path(call: Call, copy: Path) -> None:
    assert document(call("remove", "more/copy.txt", "--store", copy, "--json"))["documents"] == 1


def test_remove_by_glob(call: Call, names: Names, copy: Path) -> None:
    assert document(call("remove", "*.txt", "--store", copy, "--json"))["documents"] == 2
    assert {Path(name).name for name in names(copy)} == {"rope.md", "berlin.html"}


def test_a_name_that_looks_like_a_glob_is_found(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    (folder / "[draft]*.txt").write_text("The sluice is painted in May.")
    stock(call, folder, tmp_path / "s")
    assert document(call("remove", "[draft]*.txt", "--store", tmp_path / "s", "--json"))["documents"] == 1
    assert names(tmp_path / "s") == {"a/weir.txt", "a/lock.txt"}


def test_a_name_of_several_documents_removes_none(call: Call, names: Names, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    shutil.copytree(folder, tmp_path / "b")
    stock(call, folder, store)
    stock(call, tmp_path / "b", store)
    result = call("remove", "weir.txt", "--store", store)
    assert result.exit_code == 1
    assert "'weir.txt' is the name of 2 documents" in result.stderr
    assert "a/weir.txt" in result.stderr and "b/weir.txt" in result.stderr
    assert len(names(store)) == 4


def test_a_misspelt_name_gets_a_suggestion(call: Call, copy: Path) -> None:
    result = call("remove", "ropes.md", "--store", copy)
    assert result.exit_code == 1
    assert "There is no document 'ropes.md' in the store. Did you mean 'rope.md'?" in result.stderr


def test_part_of_a_name_is_no_name(call: Call, copy: Path) -> None:
    result = call("remove", "ope.md", "--store", copy, "--json")
    assert document(result)["documents"] == 0
    assert document(result)["unknown"] == ["ope.md"]
