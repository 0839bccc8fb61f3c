"""Damaged files of each kind: a text or a clear error, nothing hangs, and no other file is lost by it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from document_samples import SAMPLES, damaged

from lmcache_rag.documents import Document, ReadLimits, load_document
from lmcache_rag.documents.decoding import is_visible
from lmcache_rag.errors import DocumentError
from lmcache_rag.ingest import Failure, expand

LIMITS = ReadLimits(seconds=60, memory_mb=1024)


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.full)])
def test_a_damaged_file_gives_text_or_an_error(tmp_path: Path, kind: str, count: int) -> None:
    whole = tmp_path / f"whole.{kind}"
    whole.write_bytes(SAMPLES[kind]())
    expected = load_document(whole, limits=LIMITS)
    read = 0
    for number in range(count):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(damaged(whole.read_bytes(), random.Random(f"{kind} {number}")))
        begin = time.monotonic()
        try:
            document = load_document(path, limits=LIMITS)
        except DocumentError as error:
            assert str(path) in error.message, error.message
            assert error.remedy
            assert "\n" not in str(error)
            assert "takes more than" not in error.message, f"{path} hangs, or takes much memory"
        else:
            read += 1
            assert is_visible(document.text)
            document.text.encode()
            assert all(0 <= start <= len(document.text) for start, _ in document.places)
        assert time.monotonic() - begin < LIMITS.seconds
        path.unlink()
    assert read < count
    assert read or count < 1000
    assert load_document(whole, limits=LIMITS) == expected


def test_every_file_of_a_folder_of_damage_is_reported(tmp_path: Path) -> None:
    for kind, sample in SAMPLES.items():
        (tmp_path / f"whole.{kind}").write_bytes(sample())
        (tmp_path / f"damaged.{kind}").write_bytes(damaged(sample(), random.Random(kind)))
    items = list(expand([tmp_path], limits=LIMITS))
    sources = [item.source for item in items if isinstance(item, Document | Failure)]
    assert sorted(Path(source).name for source in sources) == sorted(path.name for path in tmp_path.iterdir())
    assert {item.doc_id for item in items if isinstance(item, Document)} >= {
        str(path) for path in tmp_path.glob("whole.*")
    }
