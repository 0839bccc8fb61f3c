"""Texts to vectors: the real all-MiniLM-L6-v2, and embedding objects of LangChain and LlamaIndex."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_rag.embedding import SentenceTransformerEmbedder, as_embedder, unit_length
from lmcache_rag.errors import ConfigError, SourceError
from lmcache_rag.weights import DEFAULT_EMBEDDER

TEXTS = [
    f"Sentence {number} is about {topic}. " * (1 + number % 7) for number, topic in enumerate(["rivers", "tax"] * 12)
]


def test_vectors_are_float32_of_length_one(embedder: Any) -> None:
    vectors = embedder.embed_documents(["A river.", "", "A much longer text. " * 300])
    assert (vectors.shape, vectors.dtype) == ((3, embedder.dimension), np.float32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-6)
    query = embedder.embed_query("a river")
    assert (query.shape, query.dtype) == ((384,), np.float32)
    assert np.linalg.norm(query) == pytest.approx(1, abs=1e-6)


def test_a_question_is_nearest_to_its_answer(embedder: Any) -> None:
    documents = ["The Danube flows into the Black Sea.", "Bread is baked from flour.", "Income tax is paid yearly."]
    nearest = [
        int(np.argmax(embedder.embed_documents(documents) @ embedder.embed_query(question)))
        for question in ("Where does the Danube end?", "How is bread made?", "When are taxes due?")
    ]
    assert nearest == [0, 1, 2]


def test_a_vector_does_not_depend_on_its_batch(embedder: Any) -> None:
    together = embedder.embed_documents(TEXTS)
    alone = np.stack([embedder.embed_documents([text])[0] for text in TEXTS[:8]])
    assert np.abs(together[:8] - alone).max() < 1e-5
    assert np.abs(embedder.embed_documents(TEXTS[::-1])[::-1] - together).max() < 1e-5


def test_no_texts_give_no_vectors(embedder: Any) -> None:
    assert embedder.embed_documents([]).shape == (0, 384)


def test_one_text_in_place_of_a_list_is_refused(embedder: Any) -> None:
    with pytest.raises(ConfigError, match="list of texts"):
        embedder.embed_documents("text")


def test_many_threads_get_the_vectors_that_one_gets(embedder_path: Path) -> None:
    fresh = SentenceTransformerEmbedder(embedder_path, device="cpu", batch_size=4)  # loading is part of the race
    with ThreadPoolExecutor(8) as pool:
        vectors = list(pool.map(fresh.embed_query, TEXTS[:20]))
    expected = fresh.embed_documents(TEXTS[:20])
    assert np.abs(np.stack(vectors) - expected).max() < 1e-5


def test_nothing_is_printed(embedder_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    SentenceTransformerEmbedder(embedder_path, device="cpu").embed_documents(TEXTS)
    assert capfd.readouterr() == ("", "")


def test_prompts_that_a_model_defines_are_used(embedder_path: Path, tmp_path: Path, embedder: Any) -> None:
    folder = shutil.copytree(embedder_path, tmp_path / "with-prompts")
    config = folder / "config_sentence_transformers.json"
    prompts = {"query": "Represent this question: ", "document": "Represent this passage: "}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": prompts}))
    prompted = SentenceTransformerEmbedder(folder, device="cpu")
    assert np.allclose(prompted.embed_query("x"), embedder.embed_query("Represent this question: x"), atol=1e-5)
    expected = embedder.embed_documents(["Represent this passage: x"])
    assert np.allclose(prompted.embed_documents(["x"]), expected, atol=1e-5)
    assert prompted.fingerprint != embedder.fingerprint


def test_the_default_has_its_files_fingerprint(embedder_path: Path) -> None:
    default = SentenceTransformerEmbedder()
    assert default.name == DEFAULT_EMBEDDER
    assert default.source.path == embedder_path
    other = SentenceTransformerEmbedder(embedder_path)
    assert default.fingerprint.split("@")[1] == other.fingerprint.split("@")[1]


def test_making_one_finds_and_loads_nothing() -> None:
    code = (
        "import sys; from lmcache_rag.embedding import as_embedder; as_embedder('/nowhere'); "
        "print([m for m in ('torch', 'sentence_transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_model_is_reported_when_needed() -> None:
    with pytest.raises(SourceError, match="no such folder"):
        SentenceTransformerEmbedder("/nowhere").embed_query("x")


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        SentenceTransformerEmbedder(batch_size=0)


# Objects of other libraries


def test_langchain_embeddings_are_taken(embedder: Any) -> None:
    from langchain_core.embeddings import DeterministicFakeEmbedding

    foreign = DeterministicFakeEmbedding(size=24)
    adapted = as_embedder(foreign)
    assert adapted.dimension == 24
    vectors = adapted.embed_documents(["a", "b"])
    assert np.allclose(vectors, unit_length(foreign.embed_documents(["a", "b"])))
    assert np.allclose(adapted.embed_query("a"), vectors[0])
    assert adapted.embed_documents([]).shape == (0, 24)
    assert adapted.name.endswith("DeterministicFakeEmbedding")


def test_llama_index_embeddings_are_taken() -> None:
    from llama_index.core.embeddings import MockEmbedding

    adapted = as_embedder(MockEmbedding(embed_dim=16, model_name="mock-16"))
    assert adapted.dimension == 16
    assert np.linalg.norm(adapted.embed_documents(["a", "b"]), axis=1) == pytest.approx([1, 1])
    assert np.linalg.norm(adapted.embed_query("a")) == pytest.approx(1)
    assert adapted.name.endswith("MockEmbedding:mock-16")


def test_foreign_embeddings_have_their_own_fingerprint() -> None:
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from llama_index.core.embeddings import MockEmbedding

    objects: list[Any] = [
        DeterministicFakeEmbedding(size=8),
        DeterministicFakeEmbedding(size=9),
        MockEmbedding(embed_dim=8, model_name="a"),
        MockEmbedding(embed_dim=8, model_name="b"),
    ]
    prints = {as_embedder(obj).fingerprint for obj in objects}
    assert len(prints | {as_embedder(objects[0], name="mine").fingerprint}) == 5


def test_an_embedder_is_taken_as_it_is(embedder: Any) -> None:
    assert as_embedder(embedder) is embedder


def test_a_name_or_folder_is_taken(embedder_path: Path) -> None:
    assert as_embedder(str(embedder_path)).name == embedder_path.name
    assert as_embedder(embedder_path).name == embedder_path.name


def test_progress_bars_are_as_before_after_loading(embedder_path: Path) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    assert SentenceTransformerEmbedder(embedder_path, device="cpu").dimension == 384
    assert logging.is_progress_bar_enabled() == before


def test_anything_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="int cannot embed texts"):
        as_embedder(3)


def test_a_vector_of_zeros_stays_as_it_is() -> None:
    assert unit_length([[0, 0], [3, 4]]).tolist() == pytest.approx(np.array([[0, 0], [0.6, 0.8]]))
