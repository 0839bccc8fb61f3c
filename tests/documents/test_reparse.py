"""Files that an earlier version read: kept as they are, named by status, and read again with reparse."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import cli_kit
import pytest
from cli_kit import Call
from document_kit import write, write_pdf
from pypdf import PdfWriter
from rag_kit import Parts

from lmcache_rag.documents import Document, load_document, loading
from lmcache_rag.kv_manager import outdated_documents

call, make_tiny = cli_kit.call, cli_kit.make_tiny


def page(folder: Path, text: str = "What the page says today.") -> Path:
    return write(folder / "page.html", f"<h1>Page</h1><p>{text}</p>")


def as_read_before(path: Path, text: str) -> Document:
    """What an earlier version made of the file."""
    return replace(load_document(path), text=text, parser="html 1", places=())


def stored(parts: Parts, path: Path) -> list[str]:
    return [chunk.text for chunk in parts.store.registry.document_chunks(str(path))]


def outdated(parts: Parts) -> list[str]:
    return [record.doc_id for record in outdated_documents(parts.store.registry)]


def test_a_changed_parser_computes_nothing_again(parts: Parts, tmp_path: Path) -> None:
    path = page(tmp_path)
    parts.ingestor.ingest([as_read_before(path, "What it was taken for.")])
    report = parts.ingestor.ingest([path])
    assert (report.unchanged, report.updated, report.kv.computed) == (1, (), 0)
    assert stored(parts, path) == ["What it was taken for."]
    assert outdated(parts) == [str(path)] == list(parts.maintainer.status().outdated)


def test_reparse_reads_outdated_files_again(parts: Parts, tmp_path: Path) -> None:
    path, other = page(tmp_path), write(tmp_path / "other.txt", "Some other text.")
    parts.ingestor.ingest([as_read_before(path, "What it was taken for."), other])
    plan = parts.ingestor.plan([tmp_path], reparse=True)
    assert (plan.changed, plan.unchanged, plan.documents) == ((str(path),), 1, 1)
    report = parts.ingestor.ingest([tmp_path], reparse=True)
    assert (report.updated, report.unchanged, report.kv.computed) == ((str(path),), 1, 1)
    assert stored(parts, path) == ["# Page\n\nWhat the page says today."]
    assert outdated(parts) == []
    assert parts.ingestor.ingest([tmp_path], reparse=True).unchanged == 2


def test_reparse_with_the_same_text_only_notes_it(parts: Parts, tmp_path: Path) -> None:
    path = page(tmp_path)
    parts.ingestor.ingest([as_read_before(path, load_document(path).text)])
    assert outdated(parts) == [str(path)]
    assert parts.ingestor.plan([path], reparse=True).changed == ()
    report = parts.ingestor.ingest([path], reparse=True)
    assert (report.unchanged, report.updated, report.kv.computed) == (1, (), 0)
    assert outdated(parts) == []


def test_a_file_that_is_refused_now_stays_in_the_store(parts: Parts, tmp_path: Path) -> None:
    path = write(tmp_path / "letter.rtf", "{\\rtf1 Hello}")
    facts = {"name": "letter.rtf", "media_type": "text/plain"}
    old = Document(str(path), "{\\rtf1 Hello}", loading.hashlib.sha256(path.read_bytes()).hexdigest(), str(path), facts)
    parts.ingestor.ingest([old])
    assert parts.ingestor.ingest([path]).unchanged == 1
    with sqlite3.connect(tmp_path / "store" / "store.db") as raw:
        raw.execute("UPDATE documents SET splitter = 'another, 64 tokens, overlap 0'")
    raw.close()
    report = parts.ingestor.ingest([path], reparse=True)
    assert "RTF document" in report.failed[0].reason
    assert stored(parts, path) == ["{\\rtf1 Hello}"]


def test_another_chunk_size_splits_again(parts: Parts, tmp_path: Path) -> None:
    path = page(tmp_path, "many words " * 100)
    parts.ingestor.ingest([path])
    parts.ingestor.splitter.chunk_tokens = 96
    assert parts.ingestor.ingest([path]).updated == (str(path),)


def test_a_file_that_is_known_is_not_parsed(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = page(tmp_path)
    parts.ingestor.ingest([path])
    monkeypatch.setattr(loading, "read_in_child", None)
    assert parts.ingestor.ingest([path]).unchanged == 1
    assert parts.ingestor.plan([path]).unchanged == 1


def test_documents_of_the_first_version_are_outdated(parts: Parts, tmp_path: Path) -> None:
    names = {
        "a.html": "<p>Page.",
        "b.txt": "Text.",
        "c.ipynb": '{"cells": [{"cell_type": "markdown", "source": "Note."}]}',
    }
    parts.ingestor.ingest([write(tmp_path / "docs" / name, content) for name, content in names.items()])
    parts.ingestor.ingest([Document("id", "Given by a program.", "hash", "id")])
    with sqlite3.connect(tmp_path / "store" / "store.db") as raw:
        raw.execute("UPDATE documents SET parser = ''")
        raw.execute(
            "UPDATE documents SET metadata = json_set(metadata, '$.media_type', 'text/plain') WHERE doc_id LIKE '%c.%'"
        )
    raw.close()
    assert [Path(doc_id).name for doc_id in outdated(parts)] == ["a.html", "c.ipynb"]


def test_a_hit_names_page_and_label(parts: Parts, tmp_path: Path) -> None:
    def second_page(pdf: PdfWriter) -> None:
        pdf.insert_blank_page(100, 100, 0)
        pdf.set_page_label(0, 0, "/r")
        pdf.set_page_label(1, 1, "/D", prefix="A-")

    path = write_pdf(tmp_path / "oceans.pdf", second_page)
    parts.ingestor.ingest([path])
    hit = parts.rag.retrieve("oceans")[0]
    facts = hit.documents[0].metadata
    assert (facts["page"], facts["page_label"], facts["pages"]) == (2, "A-1", 2)


def test_the_command_line_names_and_rereads_them(call: Call, parts: Parts, tmp_path: Path) -> None:
    path, store = page(tmp_path / "docs"), tmp_path / "cli"
    assert call("ingest", path, "--store", store).exit_code == 0
    assert "read by today's parsers" in call("ingest", "--reparse", "--store", store).output
    with sqlite3.connect(store / "store.db") as raw:
        raw.execute("UPDATE documents SET parser = 'html 1'")
    raw.close()
    assert json.loads(call("status", "--json", "--store", store).stdout)["outdated"] == [str(path)]
    assert "lmcache-rag ingest --reparse" in " ".join(call("status", "--store", store).output.split())
    with sqlite3.connect(store / "store.db") as raw:
        raw.execute("UPDATE chunks SET text = 'Old.', text_hash = ?", (loading.hashlib.sha256(b"Old.").hexdigest(),))
    raw.close()
    assert "would change" in call("ingest", "--reparse", "--dry-run", "--store", store).output
    report = json.loads(call("ingest", "--reparse", "--json", "--store", store).stdout)
    assert report["updated"] == [str(path)]
    assert json.loads(call("status", "--json", "--store", store).stdout)["outdated"] == []


def test_ingest_without_paths_asks_for_them(call: Call, tmp_path: Path) -> None:
    result = call("ingest", "--store", tmp_path / "none")
    assert result.exit_code == 2
    assert "PATH" in result.output
