"""Secrets in files: made once, read by their owner alone, never shown."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_rag.connector.secret import draw_secret, find_secret
from lmcache_rag.credentials import ensure_secret, lmcache_headers, read_secret, state_file
from lmcache_rag.errors import ConfigError


def test_a_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "secret"
    previous = os.umask(0)
    try:
        secret = ensure_secret(file)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(secret) == 64
    assert ensure_secret(file) == read_secret(file) == secret
    assert list(file.parent.iterdir()) == [file]
    assert ensure_secret(tmp_path / "another") != secret


def test_starts_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lmcache_rag.credentials import ensure_secret; "
        f"sys.stdin.read(1); print(ensure_secret(Path({str(tmp_path / 'secret')!r})))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for one in started:
        assert one.stdin is not None
        one.stdin.write("x")
        one.stdin.flush()
    found = {one.communicate()[0].strip() for one in started}
    assert len(found) == 1
    assert len(found.pop()) == 64


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    secret = ensure_secret(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="read by others") as problem:
        ensure_secret(file)
    assert "chmod 600" in problem.value.remedy
    assert secret not in str(problem.value)


@pytest.mark.parametrize("text", ["", "short\n", "x" * 31, "ä" * 40, "x" * 5000, "a" * 32 + "\n" + "b" * 32])
def test_a_file_without_a_secret_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no secret"):
        ensure_secret(file)


def test_what_cannot_be_made_or_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        ensure_secret(tmp_path / "file" / "secret")
    with pytest.raises(ConfigError):
        ensure_secret(tmp_path)
    if os.geteuid() == 0:
        file = tmp_path / "foreign"
        ensure_secret(file)
        os.chown(file, 12345, 12345)
        os.seteuid(12346)
        try:
            with pytest.raises(ConfigError):
                read_secret(file)
        finally:
            os.seteuid(0)


def test_the_state_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path))
    assert state_file("secret") == tmp_path / "secret"
    monkeypatch.delenv("LMCACHE_RAG_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_file("secret") == tmp_path / "state" / "lmcache-rag" / "secret"


def test_the_setting_wins_over_the_environment(tmp_path: Path) -> None:
    for name in ("one", "other"):
        ensure_secret(tmp_path / name)
    text = read_secret(tmp_path / "other")
    one, other = (find_secret(str(tmp_path / name), {}) for name in ("one", "other"))
    both = {"LMCACHE_RAG_SECRET_FILE": str(tmp_path / "other"), "LMCACHE_RAG_SECRET": "x" * 40}
    assert find_secret(str(tmp_path / "one"), both) == one
    assert find_secret("", both) == other
    assert find_secret("", {"LMCACHE_RAG_SECRET": text}) == other, "it does not matter how it comes"
    assert find_secret("", {}) == b""
    assert len({one, other, find_secret("", {"LMCACHE_RAG_SECRET": "x" * 40})}) == 3
    with pytest.raises(ConfigError, match="too short"):
        find_secret("", {"LMCACHE_RAG_SECRET": "x" * 31})


def test_without_a_secret_one_is_drawn_for_all() -> None:
    first: dict[str, str] = {}
    draw_secret(first)
    inherited = dict(first)
    draw_secret(inherited)
    assert inherited == first
    assert find_secret("", first)
    another: dict[str, str] = {}
    draw_secret(another)
    assert another != first
    given = {"LMCACHE_RAG_SECRET_FILE": "/somewhere"}
    draw_secret(given)
    assert given == {"LMCACHE_RAG_SECRET_FILE": "/somewhere"}


def test_a_secret_that_another_start_made_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking for a file and making one, another process may have made it."""
    file = tmp_path / "secret"
    first = ensure_secret(file)
    monkeypatch.setattr("os.path.lexists", lambda path: False)
    assert ensure_secret(file) == first
    assert list(tmp_path.iterdir()) == [file]


def test_the_plugin_draws_a_secret_for_all_processes() -> None:
    """vLLM loads it in its first process, before it starts the others."""
    code = (
        "from lmcache_rag.connector.plugin import register; register(); "
        "import os; print(os.environ['LMCACHE_RAG_SECRET'])"
    )
    clean = {name: text for name, text in os.environ.items() if not name.startswith("LMCACHE_RAG_")}
    first, again = (
        subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert len(first.strip()) == 64
    assert first != again


def test_lmcaches_key_is_in_its_variables_or_our_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path))
    here, elsewhere = "http://127.0.0.1:8089", "http://10.0.0.1:8089"
    assert lmcache_headers(here, {}) == {}
    key = ensure_secret(tmp_path / "lmcache-http-key")
    assert lmcache_headers(here, {}) == {"Authorization": f"Bearer {key}"}
    assert lmcache_headers(elsewhere, {}) == {}, "it is for this machine only"
    (tmp_path / "theirs").write_text("abc\n")
    for variables in (
        {"LMCACHE_API_KEY": "abc"},
        {"LMCACHE_HTTP_API_KEY": "abc"},
        {"LMCACHE_HTTP_API_KEY_FILE": str(tmp_path / "theirs")},
    ):
        assert lmcache_headers(elsewhere, variables) == {"Authorization": "Bearer abc"}
    assert lmcache_headers(here, {"LMCACHE_API_KEY_FILE": "/no/such"}) == {}
