"""What the demo's page stands on without a browser: differences, the password, samples, the web server's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lmcache_rag.demo
from lmcache_rag.demo import record, samples
from lmcache_rag.demo.server import PASSWORD_VARIABLE, is_loopback, listen, matches, page_password
from lmcache_rag.errors import ConfigError

LONG = "correct horse battery"


def test_differing_words_are_found_in_whole_texts() -> None:
    first, second = "The  Nile is long.\nVery.", "The Amazon is long. Very wide."
    left, right = record.compare_words(first, second)
    assert "".join(piece.text for piece in left) == first
    assert "".join(piece.text for piece in right) == second
    assert [piece.text.strip() for piece in left if piece.differs] == ["Nile", "Very."]
    assert [piece.text.strip() for piece in right if piece.differs] == ["Amazon", "Very wide."]


def test_equal_texts_have_no_difference() -> None:
    left, right = record.compare_words("The same words.", "The  same\nwords.")
    assert record.differing_words(left) == record.differing_words(right) == 0


def test_other_machines_need_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert page_password("127.0.0.1", None) == ""
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match="no password"):
            page_password(host, None)
    monkeypatch.setenv(PASSWORD_VARIABLE, LONG)
    assert page_password("0.0.0.0", None) == LONG
    monkeypatch.setenv(PASSWORD_VARIABLE, "short")
    with pytest.raises(ConfigError, match="shorter"):
        page_password("127.0.0.1", None)


def test_password_file_is_private(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(LONG + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        page_password("0.0.0.0", file)
    file.chmod(0o600)
    assert page_password("0.0.0.0", file) == LONG
    with pytest.raises(ConfigError, match="cannot be read"):
        page_password("0.0.0.0", tmp_path / "none")


def test_password_must_match_as_a_whole() -> None:
    assert matches(LONG, LONG)
    assert not matches(LONG[:-1], LONG)
    assert not matches("пароль", LONG)


def test_loopback_is_this_machine_only() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.0.1.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "127.example.org")))


def test_samples_have_questions_and_one_is_russian() -> None:
    files = samples.files()
    assert len(files) == len(set(files)) <= 12, "a first start is short"
    assert all(file.is_file() for file in files)
    assert any("Байкал" in file.read_text() for file in files if file.suffix in (".md", ".txt"))
    asked = json.loads((samples.documents().parent / "questions.json").read_text())[: samples.ENGLISH]
    assert {name for question in asked for name in question["documents"]} <= {file.name for file in files}
    assert len(samples.questions()) > 3


def test_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            listen("127.0.0.1", port)


def test_page_never_renders_html_or_markdown() -> None:
    folder = Path(lmcache_rag.demo.__file__).parent
    for file in folder.glob("*.py"):
        source = file.read_text()
        for way in ("ui.html", "ui.markdown", "ui.restructured_text", "innerHTML", "v-html", "add_body_html"):
            assert way not in source, f"{file.name} uses {way}"


def test_letters_that_turn_the_direction_are_shown() -> None:
    pytest.importorskip("nicegui")
    from lmcache_rag.demo.page_parts import harmless

    assert harmless("a\u202eb\u2066c\x1bd") == "a\ufffdb\ufffdc\u241bd"
    assert harmless("שלום") == "שלום"
