"""What tells two sets of weights, or two tokenizers, apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_rag.weights import content_digest, revision_of, tokenizer_digest

MODEL = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "tokenizer.json": b"{}"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("changed", sorted(MODEL))
def test_one_changed_byte_makes_another_revision(tmp_path: Path, changed: str) -> None:
    before = revision_of(write(tmp_path, MODEL))
    content = bytearray(MODEL[changed])
    content[len(content) // 2] ^= 1
    (tmp_path / changed).write_bytes(content)
    assert revision_of(tmp_path) != before


def test_a_revision_ignores_place_and_notes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL)
    second = write(tmp_path / "b", MODEL | {"README.md": b"text", "trainer_state.json": b"{}"})
    assert revision_of(first) == revision_of(second)


def test_moved_content_makes_another_revision(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL | {"a.safetensors": b"12", "b.safetensors": b"3"})
    second = write(tmp_path / "b", MODEL | {"a.safetensors": b"1", "b.safetensors": b"23"})
    third = write(tmp_path / "c", MODEL | {"a.safetensors": b"123", "b.safetensors": b""})
    assert len({revision_of(folder) for folder in (first, second, third)}) == 3


def test_an_embedders_module_counts_in_its_digest(tmp_path: Path) -> None:
    modules = json.dumps([{"path": ""}, {"path": "1_Dense"}, {"path": "2_Normalize"}]).encode()
    files = MODEL | {"modules.json": modules, "1_Dense/model.safetensors": b"1"}
    first = write(tmp_path / "a", files)
    second = write(tmp_path / "b", files | {"1_Dense/model.safetensors": b"2"})
    assert content_digest(first) != content_digest(second)


def test_the_tokenizers_digest_ignores_the_weights(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL)
    second = write(tmp_path / "b", MODEL | {"model.safetensors": b"other"})
    third = write(tmp_path / "c", MODEL | {"tokenizer.json": b"[]"})
    assert tokenizer_digest(first) == tokenizer_digest(second) != tokenizer_digest(third)


def test_another_folders_weights_are_another_revision(smollm2_path: Path, embedder_path: Path) -> None:
    digests = [revision_of(smollm2_path), revision_of(embedder_path)]
    assert len(set(digests)) == 2
    assert all(len(digest) in (32, 40) for digest in digests)
