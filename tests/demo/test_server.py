"""`lmcache-rag demo` as a process: its address, who it answers, its password, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lmcache_rag.demo.server import PASSWORD_VARIABLE

PASSWORD = "correct horse battery"
GONE = "http://127.0.0.1:9"  # no server: the page opens all the same


@contextmanager
def running(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the page's address."""
    kept = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
    demo = ["demo", "--port", "0", "--no-browser", "--store", "s", "--engine", GONE, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcache_rag", *demo],
        cwd=folder,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"The page: (\S+)", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_page_opens_and_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as (process, url):
        page = httpx.get(url)
        assert page.status_code == 200
        assert "data-testid" in page.text
        assert "question" in page.text
        assert not re.findall(r"(?:src|href)=\"https?://", page.text)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "The page is closed." in rest
        assert "Traceback" not in rest
    assert {path.name for path in tmp_path.iterdir()} <= {"s"}


def test_names_of_other_machines_are_refused(tmp_path: Path) -> None:
    with running(tmp_path) as (_, url):
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
        assert httpx.get(url.replace("127.0.0.1", "localhost")).status_code == 200


def test_password_comes_before_everything_else(tmp_path: Path) -> None:
    with running(tmp_path, "--host", "0.0.0.0", **{PASSWORD_VARIABLE: PASSWORD}) as (_, url):
        page = httpx.get(url.replace("0.0.0.0", "127.0.0.1"))
        assert page.status_code == 200
        assert "Password" in page.text
        assert "data-testid=question" not in page.text.replace('"', "").replace("\\", "").replace(": ", "=")
        assert "Recompute" not in page.text
        assert PASSWORD not in page.text


def test_other_machines_need_a_password(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "lmcache_rag", "demo", "--host", "0.0.0.0", "--no-browser"],
        cwd=tmp_path,
        env=kept,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert PASSWORD_VARIABLE in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['nicegui'] = None; from lmcache_rag.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install ".[demo]"' in done.stderr
