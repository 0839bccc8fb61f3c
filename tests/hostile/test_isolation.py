"""Limits of time and memory for each file, bombs, and what the process that parses may not do."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from document_kit import write
from document_samples import SAMPLES

from lmcache_rag.documents import ReadLimits, containers, isolation, load_document, office
from lmcache_rag.errors import ConfigError, DocumentError, OptionalDependencyError


def refused(path: Path, limits: ReadLimits | None = None) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        load_document(path, limits=limits)
    return caught.value


def repacked(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def test_a_file_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    large = write(tmp_path / "a.html", b"<p>x<b>y</b>" * 400_000)
    error = refused(large, ReadLimits(seconds=0.5))
    assert "takes more than 0.5 s to read" in error.message
    assert "LMCACHE_RAG_DOCUMENT_SECONDS" in error.remedy
    small = write(tmp_path / "b.html", "<p>Read all the same.")
    assert load_document(small).text == "Read all the same."


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory")
def test_a_file_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.html", b"<p>x<b>y</b>" * 300_000), ReadLimits(memory_mb=256))
    assert "256 MiB of memory" in error.message
    assert "LMCACHE_RAG_DOCUMENT_MB" in error.remedy


@pytest.mark.parametrize("read", [office.read_docx, office.read_pptx, office.read_xlsx, containers.read_epub])
def test_an_archive_above_the_limits_is_refused(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = SAMPLES[read.__name__.removeprefix("read_")]()
    for limit in ("MAX_UNPACKED", "MAX_ENTRIES"):
        with monkeypatch.context() as patch:
            patch.setattr(office, limit, 2)
            with pytest.raises(DocumentError, match="unpacks to far more data than a document has"):
                read(content, "a")
    assert read(content, "a").text


def test_a_parser_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docx.py").write_text("raise ModuleNotFoundError('not here', name='docx')")
    monkeypatch.syspath_prepend(tmp_path)
    isolation._pool.close()  # a new process takes this path
    try:
        with pytest.raises(OptionalDependencyError) as caught:
            load_document(write(tmp_path / "a.docx", SAMPLES["docx"]()))
    finally:
        isolation._pool.close()
    assert caught.value.message == "python-docx is not installed."
    assert 'pip install ".[documents]"' in caught.value.remedy


@pytest.mark.full
def test_a_bomb_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO(SAMPLES["docx"]())
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb.xml", "w") as file:
        for _ in range(513):
            file.write(b" " * 2**20)
    assert "unpacks to far more data" in refused(write(tmp_path / "a.docx", out.getvalue())).message


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY f SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("kind", ["docx", "pptx", "xlsx", "epub"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_or_not_expanded(tmp_path: Path, kind: str, encoding: str) -> None:
    def change(name: str, part: bytes) -> bytes:
        if not name.endswith((".xml", ".opf", ".rels")):
            return part
        text = part.decode().partition("?>")[2] if part.startswith(b"<?xml") else part.decode()
        head = f"<?xml version='1.0' encoding='{encoding}'?>" + BOMB.decode()
        return (head + text.replace(">Rivers", ">&b;&f;Rivers")).encode(encoding)

    message = refused(write(tmp_path / f"a.{kind}", repacked(SAMPLES[kind](), change))).message
    assert "XML document type" in message or "damaged" in message


def test_entities_of_pages_are_not_expanded(tmp_path: Path) -> None:
    page = BOMB.decode() + "<html><p>&b;&f;</p><img src='file:///etc/passwd'><iframe src='http://127.0.0.1/'></iframe>"
    text = load_document(write(tmp_path / "a.html", page)).text
    assert "aaaa" not in text.replace("aaaaaaaaaa", "", 1)
    assert "root:" not in text


@pytest.mark.parametrize(
    "action",
    [
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "open('written', 'w')",
        "import os; os.open('written', os.O_CREAT | os.O_WRONLY)",
        "import os; os.remove('kept')",
        "import sqlite3; sqlite3.connect('written')",
    ],
)
def test_a_parser_may_not_reach_out(tmp_path: Path, action: str) -> None:
    write(tmp_path / "kept")
    code = (
        "import os, socket, subprocess, urllib.request, sqlite3\n"
        "from lmcache_rag.documents.worker import _Guard\n"
        f"guard = _Guard()\nguard.on = True\ntry:\n    {action}\n"
        "except PermissionError as error:\n    guard.on = False; print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("a parser may not do this"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_of_documents_cannot_replace_a_module(tmp_path: Path) -> None:
    for name in ("bs4", "json", "lxml"):
        write(tmp_path / f"{name}.py", "raise SystemExit('taken over')")
    write(tmp_path / "a.html", "<p>Read.")
    code = "import sys; sys.path.pop(0); from lmcache_rag.documents import load_document as load; "
    code += "print(load('a.html').text)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "Read.\n", done.stderr


def test_a_child_that_ended_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.html", "<p>Read.")
    load_document(path)
    for child in isolation._pool._idle:
        child._process.kill()
        child._process.wait()
    assert load_document(path).text == "Read."


def test_many_threads_read_at_the_same_time(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.html", f"<p>Number {number}.") for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert [document.text for document in pool.map(load_document, paths)] == [f"Number {n}." for n in range(24)]
    assert len(isolation._pool._idle) <= 2


def test_limits_are_by_argument_environment_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ReadLimits.of() == ReadLimits(120.0, 2048)
    monkeypatch.setenv("LMCACHE_RAG_DOCUMENT_SECONDS", "7.5")
    monkeypatch.setenv("LMCACHE_RAG_DOCUMENT_MB", "512")
    assert ReadLimits.of() == ReadLimits(7.5, 512)
    assert ReadLimits.of(3, 300) == ReadLimits(3.0, 300)
    for values in ({"seconds": 0}, {"seconds": float("nan")}, {"memory_mb": 255}):
        with pytest.raises(ConfigError, match="Use a number"):
            ReadLimits.of(**values)
    monkeypatch.setenv("LMCACHE_RAG_DOCUMENT_MB", "much")
    with pytest.raises(ConfigError, match="'much'"):
        ReadLimits.of()
