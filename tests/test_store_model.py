"""The model of a store: chosen at the first ingestion, recorded, and never another one by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_kit
import pytest

from lmcache_rag import Workspace
from lmcache_rag.documents import Document
from lmcache_rag.store_model import known_identity, recorded_model
from lmcache_rag.weights import DEFAULT_MODEL, find

NOTE = Document("note", "The weir is closed in frost.", "1", "note")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> Iterator[Path]:
    """No hub, and a Hugging Face cache of this test's own."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("LMCACHE_RAG_MODEL", "LMCACHE_RAG_STORE"):
        monkeypatch.delenv(name, raising=False)
    yield cache


def lay_out(cache: Path, model: Path, name: str) -> None:
    """The better model in the Hugging Face cache: another one's files."""
    hub_kit.lay_out_snapshot(cache, name, {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()})


def filled(store: Path, embedder: Any, **settings: Any) -> str:
    """Ingest a note, and return the model's name."""
    with Workspace.open(store, embedder=embedder, **settings) as workspace:
        workspace.ingestor.ingest([NOTE], kv=False)
        return workspace.engine.info.model


def test_a_filled_store_keeps_its_model(hub_cache: Path, smollm2_path: Path, embedder: Any, tmp_path: Path) -> None:
    assert filled(tmp_path / "old", embedder) == DEFAULT_MODEL
    lay_out(hub_cache, smollm2_path, find.BETTER_MODEL)
    assert filled(tmp_path / "old", embedder) == DEFAULT_MODEL
    assert filled(tmp_path / "new", embedder) == find.BETTER_MODEL


def test_a_named_model_becomes_the_stores(smollm2_path: Path, embedder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.symlink_to(smollm2_path)
    filled(tmp_path / "s", embedder, model=str(smollm2_path))
    with Workspace.open(tmp_path / "s", embedder=embedder) as workspace:
        assert recorded_model(workspace.store.registry).name == str(smollm2_path.resolve())  # type: ignore[union-attr]
        assert workspace.engine.info.model == smollm2_path.resolve().name


def test_another_model_for_once_is_not_recorded(smollm2_path: Path, embedder: Any, tmp_path: Path) -> None:
    filled(tmp_path / "s", embedder)
    filled(tmp_path / "s", embedder, model=str(smollm2_path))
    assert filled(tmp_path / "s", embedder) == DEFAULT_MODEL


def test_a_store_without_record_has_the_old_default(
    hub_cache: Path, smollm2_path: Path, embedder: Any, tmp_path: Path
) -> None:
    filled(tmp_path / "s", embedder)
    with Workspace.open(tmp_path / "s") as workspace:
        workspace.store.registry.set_meta("model", None)
    lay_out(hub_cache, smollm2_path, find.BETTER_MODEL)
    assert filled(tmp_path / "s", embedder) == DEFAULT_MODEL


def test_the_identity_is_known_without_the_model(embedder: Any, tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "s", embedder=embedder) as workspace:
        assert workspace.identity is None
        workspace.ingestor.ingest([NOTE], kv=False)
        fingerprint = workspace.prompts.fingerprint
    with Workspace.open(tmp_path / "s") as workspace:
        assert workspace.identity is not None
        assert (workspace.identity.fingerprint, workspace.identity.model) == (fingerprint, DEFAULT_MODEL)
        assert "engine" not in workspace.__dict__


@pytest.mark.parametrize("change", [{"tenant": "other"}, {"system": "Answer in verse."}, {"dtype": "bfloat16"}])
def test_other_settings_have_another_identity(embedder: Any, tmp_path: Path, change: dict[str, str]) -> None:
    filled(tmp_path / "s", embedder)
    with Workspace.open(tmp_path / "s", **change) as workspace:
        assert workspace.identity is None


def test_a_changed_model_has_another_identity(smollm2_path: Path, embedder: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(smollm2_path, tmp_path / "mine"))
    filled(tmp_path / "s", embedder, model=str(folder))
    with Workspace.open(tmp_path / "s", model=str(folder)) as workspace:
        registry, settings = workspace.store.registry, workspace.settings
        assert known_identity(registry, settings) is not None
        os.utime(folder / "model.safetensors", (1, 1))
        assert known_identity(registry, settings) is None
