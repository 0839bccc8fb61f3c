"""The examples run, and the three-line diff turns the ordinary program into a blended one."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from embedded_server_kit import serving
from fake_vllm import MODEL
from framework_kit import fresh
from llama_index.core import Document, Settings, VectorStoreIndex, load_index_from_storage
from llama_index.llms.openai_like import OpenAILike
from llama_index_kit import EMBED, WordEmbedding, events, tiny_engine, tiny_workspace
from lmcache_rag.integrations.llama_index import (
    EmbedderEmbedding,
    as_blend_query_engine,
    blend_storage_context,
    node_text,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
NAMES = ("llama_index_query", "llama_index_chat", "llama_index_folder")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The beginning of each sample, so that a test takes seconds."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (EXAMPLES / "data" / "documents").glob("*.txt"):
        (folder / path.name).write_text(path.read_text()[:1500])
    return folder


def load(path: Path, data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DATA = data  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_twice_and_reuses(
    name: str, tokenizer: Any, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
    module = load(EXAMPLES / f"{name}.py", data)
    options = {"engine": tiny_engine(tmp_path / "kv", tokenizer), "embed_model": EMBED, "max_tokens": 3}
    made = [module.main(str(tmp_path / "store"), **options) for _ in range(2)]
    for facts in made if name == "llama_index_query" else made[0] + made[1]:
        if name == "llama_index_folder":
            break
        assert facts["reused_tokens"] > 0
        assert facts["chunks_missed"] == 0
    if name == "llama_index_folder":
        assert made[0][1] == 0
        assert made[0][0] > made[0][2] > 0
        assert "one file changed" in capsys.readouterr().out
    else:
        assert "came from cached chunks" in capsys.readouterr().out


async def test_the_workspaces_embedder_is_an_embed_model(embedder: Any) -> None:
    model = EmbedderEmbedding(embedder)
    vectors = model.get_text_embedding_batch(["a key", "a ship"])
    assert len(vectors) == 2
    assert len(vectors[0]) == embedder.dimension
    assert vectors[0] == pytest.approx(await model.aget_text_embedding("a key"), abs=1e-5)
    assert model.get_query_embedding("a key") == pytest.approx(await model.aget_query_embedding("a key"), abs=1e-5)
    assert (await model.aget_text_embedding_batch(["a ship"]))[0] == pytest.approx(vectors[1], abs=1e-5)


def test_three_changed_lines(tokenizer: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = EXAMPLES / "llama_index_three_lines.diff"
    lines = diff.read_text().splitlines()
    changed = [line for line in lines if re.match(r"\+(?!\+\+)", line)]
    assert len(changed) <= 3
    assert len([line for line in lines if re.match(r"-(?!--)", line)]) <= len(changed)
    ordinary, blended = EXAMPLES / "llama_index_ordinary.py", tmp_path / "llama_index_blended.py"
    subprocess.run(["patch", "--silent", "--output", str(blended), str(ordinary), str(diff)], check=True)
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("MODEL", MODEL)
    found = {}
    for path in (ordinary, blended):
        with serving(tiny_engine(tmp_path / path.stem, tokenizer)) as running:
            monkeypatch.setenv("VLLM_URL", running.url)
            module = load(path, data)
            module.MiniLM = lambda: WordEmbedding(model_name="words")  # type: ignore[attr-defined]
            found[path.stem] = module.main(), len(running.questions)
    (plain, _), (fast, asked) = found.values()
    assert [sources(response) for response in plain] == [sources(response) for response in fast]
    assert all(str(response) for response in (*plain, *fast))
    assert all("lmcache_rag" not in response.metadata for response in plain)
    assert asked == len(fast)
    for response in fast:
        stats = response.metadata["lmcache_rag"]["stats"]
        assert stats["reused_tokens"] > 0
        assert stats["chunks_missed"] == 0


def test_the_starter_tutorial_converts_in_three_lines(
    tokenizer: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's tool, that is: which tool a model calls is its own affair."""
    diff = EXAMPLES / "llama_index_starter.diff"
    lines = [line for line in diff.read_text().splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(lines) == 3
    docs = (EXAMPLES.parent / "docs" / "llama-index.md").read_text()
    assert all(line[1:].strip() in docs for line in lines)
    ordinary, blended = EXAMPLES / "llama_index_starter.py", tmp_path / "llama_index_starter_blended.py"
    subprocess.run(["patch", "--silent", "--output", str(blended), str(ordinary), str(diff)], check=True)
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("MODEL", MODEL)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_embed_model", None)
    answers, heard = {}, {}
    for path in (ordinary, blended):
        with serving(tiny_engine(tmp_path / path.stem, tokenizer)) as running, events() as seen:
            monkeypatch.setenv("VLLM_URL", running.url)
            module = load(path, data)
            module.MiniLM = lambda: WordEmbedding(model_name="words")  # type: ignore[attr-defined]
            module.OpenAILike = partial(OpenAILike, max_tokens=4)  # type: ignore[attr-defined]
            _, search_documents = module.make_tools()
            answers[path] = [asyncio.run(search_documents("What did Dalton propose about atoms?")) for _ in range(2)]
            heard[path] = [event.stats for event in seen if event.class_name() == "LMCacheBlendEvent"]
    assert all(answers[ordinary] + answers[blended])
    assert heard[ordinary] == []
    assert [(stats["chunks_hit"], stats["chunks_missed"]) for stats in heard[blended]] == [(2, 0), (2, 0)]
    assert all(stats["reused_tokens"] > 0 for stats in heard[blended])


def test_an_index_from_before_is_loaded_and_adopted(tokenizer: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "storage")
    documents = [Document(text=f"Orchard {i} lies {i} miles off.", id_=f"d{i}") for i in range(4)]
    VectorStoreIndex.from_documents(documents, embed_model=EMBED).storage_context.persist(folder)
    with tiny_workspace(tmp_path, tiny_engine(tmp_path / "kv", tokenizer)) as workspace:
        context = blend_storage_context(workspace, persist_dir=folder, adopt=True)
        index = load_index_from_storage(context, embed_model=EMBED)
        assert index.vector_store.adoption.result(60).computed == 4
        stats = as_blend_query_engine(index, workspace).query("Which one?").metadata["lmcache_rag"]["stats"]
        assert (stats["chunks_hit"], stats["chunks_missed"]) == (2, 0)
        index.delete_ref_doc("d0")
        index.storage_context.persist(folder)
        again = load_index_from_storage(blend_storage_context(workspace, persist_dir=folder), embed_model=EMBED)
        assert len(again.vector_store.kv.ids()) == 3
        assert again.vector_store.warm().computed == 0


def sources(response: Any) -> list[tuple[str | None, str]]:
    return [(source.node.ref_doc_id, node_text(source.node)) for source in response.source_nodes]
