"""The life of a corpus through LangChain's own API: index(), failures, restarts; what is registered is what lives."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from framework_kit import light_tokenizer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, kv_files, kv_texts, registered, tiny_engine, workspace
from lmcache_rag.integrations.langchain import FaissStore, LMCacheVectorStore

from lmcache_rag import Workspace
from lmcache_rag.errors import PrecomputeError

TEXTS = ["Keys turn.", "Values stay where they are.", "A cache is small.", "Rain falls on the sea.", "It is late."]


def docs(*texts: str, source: str = "a", **metadata: Any) -> list[Document]:
    return [Document(text, metadata={"source": source, **metadata}) for text in texts]


class Failing:
    """Makes precomputation fail after some chunks."""

    def __init__(self, engine: Any, monkeypatch: Any) -> None:
        self.left: int | None = None
        self._real = engine.precompute
        monkeypatch.setattr(engine, "precompute", self._precompute)

    def _precompute(self, prompts: Any) -> Any:
        for result in self._real(prompts):
            if self.left is not None:
                if self.left == 0:
                    raise PrecomputeError("The disk is full.", remedy="Make room.")
                self.left -= 1
            yield result


def adopted(vectors: LMCacheVectorStore) -> LMCacheVectorStore:
    """The vector store, after it was adopted."""
    assert vectors.adoption is not None
    vectors.adoption.result(60)
    return vectors


def check(vectors: LMCacheVectorStore, made: Workspace, live: set[str]) -> None:
    """Registry, vector store and KV agree about what lives, and no KV of a dead chunk is left."""
    assert set(vectors.register.texts().values()) == live
    assert registered(made) == live
    assert kv_texts(made, live) == live
    assert kv_files(made, made.settings.store.parent / "kv") == {made.prompts.chunk_key(text) for text in live}


@pytest.mark.parametrize("cleanup", [None, "incremental", "full", "scoped_full"])
@pytest.mark.parametrize("inner", [InMemoryVectorStore, FaissStore])
async def test_index_in_every_cleanup_mode(made: Workspace, tmp_path: Path, inner: Any, cleanup: Any) -> None:
    over = inner(FAKE) if inner is InMemoryVectorStore else inner(FAKE, tmp_path / "vectors")
    vectors = LMCacheVectorStore(over, made)
    records = InMemoryRecordManager("r")
    records.create_schema()

    def run(documents: list[Document]) -> Any:
        return index(
            documents, records, vectors, cleanup=cleanup, source_id_key="source", key_encoder="sha256", batch_size=8
        )

    assert run(docs(*TEXTS[:3]))["num_added"] == 3
    check(vectors, made, set(TEXTS[:3]))
    assert run(docs(*TEXTS[:3]))["num_skipped"] == 3
    computed = made.engine.precompute
    changed = docs(*TEXTS[:2], year=2024)  # metadata only: new ids, but no KV is computed

    def refuse(prompts: Any) -> Any:
        for prompt in prompts:
            raise AssertionError(f"computed {prompt}")
        yield from ()

    made.engine.precompute = refuse  # type: ignore[method-assign]
    run(changed)
    made.engine.precompute = computed  # type: ignore[method-assign]
    live = set(TEXTS[:3]) if cleanup is None else set(TEXTS[:2])
    check(vectors, made, live)
    found = vectors.get_by_ids(sorted(vectors.register.ids()))
    assert {doc.page_content for doc in found if doc.metadata.get("year")} == set(TEXTS[:2])

    await aindex(
        docs(TEXTS[3], source="b"),
        records,  # it has the async methods too
        vectors,
        cleanup=cleanup,
        source_id_key="source",
        key_encoder="sha256",
    )
    live = {TEXTS[3]} if cleanup == "full" else live | {TEXTS[3]}
    check(vectors, made, live)


def test_a_failed_precompute_raises_and_is_repaired(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, records = LMCacheVectorStore(InMemoryVectorStore(FAKE), made), InMemoryRecordManager("r")
    failing = Failing(made.engine, monkeypatch)
    failing.left = 1

    def run() -> Any:
        return index(docs(*TEXTS), records, vectors, cleanup="full", source_id_key="source", key_encoder="sha256")

    with pytest.raises(PrecomputeError, match="disk is full"):
        run()
    assert records.list_keys() == []  # so the next run does it again
    assert kv_texts(made, set(TEXTS)) < set(TEXTS)
    failing.left = None
    assert run()["num_added"] == len(TEXTS)
    check(vectors, made, set(TEXTS))


def test_warm_restores_what_a_record_manager_outlives(made: Workspace) -> None:
    vectors, records = LMCacheVectorStore(InMemoryVectorStore(FAKE), made), InMemoryRecordManager("r")
    index(docs(*TEXTS), records, vectors, cleanup="full", source_id_key="source", key_encoder="sha256")
    made.engine.forget([(made.prompts.fingerprint, made.prompts.chunk_key(text)) for text in TEXTS])
    again = index(docs(*TEXTS), records, vectors, cleanup="full", source_id_key="source", key_encoder="sha256")
    assert again["num_skipped"] == len(TEXTS)
    assert kv_texts(made, set(TEXTS)) == set()
    assert vectors.warm().computed == len(TEXTS)
    check(vectors, made, set(TEXTS))


def test_warm_follows_a_vector_store_changed_elsewhere(made: Workspace) -> None:
    inner = InMemoryVectorStore(FAKE)
    vectors = LMCacheVectorStore(inner, made)
    vectors.add_texts(TEXTS[:2], ids=["a", "b"])
    inner.delete(["a"])
    inner.add_texts([TEXTS[2]], ids=["c"])
    vectors.warm()
    check(vectors, made, {TEXTS[1], TEXTS[2]})


def test_a_filled_vector_store_is_adopted(made: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    inner = InMemoryVectorStore(FAKE)
    inner.add_texts(TEXTS)
    check(adopted(LMCacheVectorStore(inner, made)), made, set(TEXTS))
    assert registered(made) == set(TEXTS)
    apart = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, space="other", adopt=False)
    assert apart.register.ids() == set()


def test_a_text_that_changed_under_its_id_is_adopted(made: Workspace) -> None:
    inner = InMemoryVectorStore(FAKE)
    LMCacheVectorStore(inner, made).add_texts(TEXTS[:2], ids=["a", "b"])
    inner.add_texts([TEXTS[2]], ids=["a"])  # by a program that knows nothing of KV
    check(adopted(LMCacheVectorStore(inner, made)), made, {TEXTS[1], TEXTS[2]})


def test_warm_follows_a_text_that_changed_under_its_id(made: Workspace) -> None:
    inner = InMemoryVectorStore(FAKE)
    vectors = LMCacheVectorStore(inner, made)
    vectors.add_texts(TEXTS[:2], ids=["a", "b"])
    inner.add_texts([TEXTS[2]], ids=["a"])
    vectors.warm()
    check(vectors, made, {TEXTS[1], TEXTS[2]})


def test_vector_stores_share_a_workspace_and_a_text(made: Workspace) -> None:
    one = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, space="one")
    two = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, space="two")
    one.add_texts(TEXTS[:2], ids=["1", "2"])
    two.add_texts(TEXTS[1:3], ids=["1", "2"])
    one.delete()
    assert one.similarity_search("x") == []
    check(two, made, set(TEXTS[1:3]))
    two.delete(["1"])
    check(two, made, {TEXTS[2]})


@pytest.mark.parametrize("inner", [InMemoryVectorStore, FaissStore])
async def test_delete_without_ids_removes_all(made: Workspace, tmp_path: Path, inner: Any) -> None:
    over = inner(FAKE) if inner is InMemoryVectorStore else inner(FAKE, tmp_path / "vectors")
    vectors = LMCacheVectorStore(over, made)
    await vectors.aadd_texts(TEXTS[:2], batch_size=1, unknown_keyword=3)
    await vectors.adelete()
    check(vectors, made, set())
    assert await vectors.asimilarity_search("x") == []


async def test_delete_without_ids_empties_the_registry_too(made: Workspace) -> None:
    inner = InMemoryVectorStore(FAKE)
    vectors = LMCacheVectorStore(inner, made)
    for deletes in (vectors.delete, lambda: asyncio.run(vectors.adelete())):
        vectors.add_texts(TEXTS[:2], ids=["a", "b"])
        inner.delete(["a"])
        await asyncio.to_thread(deletes)
        check(vectors, made, set())
        assert inner.store == {}


def test_save_load_and_a_restart(tokenizer: Any, tmp_path: Path) -> None:
    with workspace(tokenizer, tmp_path) as made:
        vectors = LMCacheVectorStore.from_texts(TEXTS, FAKE, [{"n": i} for i in range(5)], source=made)
        before = vectors.similarity_search_with_score("Keys", k=5)
        vectors.save_local(tmp_path / "copy")
    with workspace(tokenizer, tmp_path) as made:
        again = LMCacheVectorStore(None, made, embedding=FAKE)
        assert again.similarity_search_with_score("Keys", k=5) == before
        check(again, made, set(TEXTS))
        loaded = adopted(LMCacheVectorStore.load_local(tmp_path / "copy", FAKE, made, space="copy"))
        assert loaded.similarity_search_with_score("Keys", k=5) == before
        assert loaded.register.ids() == again.register.ids()
        assert made.engine.usage().chunks == len(TEXTS) + 1  # one KV for both, and the prefix's


class Life(RuleBasedStateMachine):
    """Random changes through a vector store and index(); a twin of plain dictionaries says what must live."""

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory()
        self.folder = Path(self._place.name)
        self.live: dict[str, tuple[str, int]] = {}  # by id, added by hand
        self.indexed: dict[tuple[str, int], str] = {}  # (text, year) -> source, by index()
        self.records = InMemoryRecordManager("r")
        self.failing = False
        self.broken = False  # a failure has not been repaired yet
        self.open()

    def open(self) -> None:
        self.made = Workspace.open(
            self.folder / "store", engine=tiny_engine(light_tokenizer(), self.folder), max_tokens=2
        )
        self.vectors = LMCacheVectorStore(FaissStore(FAKE, self.folder / "vectors"), self.made, adopt=False)
        real = self.made.engine.precompute

        def precompute(prompts: Any, *, stop: Any = None) -> Any:
            for number, result in enumerate(real(prompts)):
                if self.failing and number == 0:
                    raise PrecomputeError("on demand")
                yield result

        self.made.engine.precompute = precompute  # type: ignore[method-assign]

    def attempt(self, change: Any) -> None:
        try:
            change()
        except PrecomputeError:
            assert self.failing
            self.failing = False
            change()  # done again, it repairs
        self.failing = False

    texts = st.sampled_from(TEXTS)
    ids = st.sampled_from(["a", "b", "c"])

    @initialize()
    def start(self) -> None:
        assert not registered(self.made)

    @rule(which=st.lists(st.tuples(ids, texts, st.integers(0, 1)), min_size=1, max_size=3, unique_by=lambda x: x[0]))
    def add(self, which: list[tuple[str, str, int]]) -> None:
        documents = [Document(text, metadata={"year": year}) for _, text, year in which]
        names = [name for name, _, _ in which]
        self.attempt(lambda: self.vectors.add_documents(documents, ids=names))
        self.live.update({name: (text, year) for name, text, year in which})

    @rule(names=st.lists(ids, max_size=3))
    def delete(self, names: list[str]) -> None:
        self.vectors.delete(names)
        for name in names:
            self.live.pop(name, None)

    @rule(
        which=st.lists(st.tuples(texts, st.integers(0, 1)), max_size=4, unique=True),
        source=st.sampled_from(["x", "y"]),
        mode=st.sampled_from([None, "incremental", "full", "scoped_full"]),
    )
    def index(self, which: list[tuple[str, int]], source: str, mode: Any) -> None:
        documents = [Document(text, metadata={"source": source, "year": year}) for text, year in which]
        self.attempt(
            lambda: index(
                documents,
                self.records,
                self.vectors,
                cleanup=mode,
                source_id_key="source",
                key_encoder="sha256",
                batch_size=8,
            )
        )
        new = {(text, year, source) for text, year in which}
        if mode == "full":
            self.indexed = {}
        elif mode is not None and which:
            self.indexed = {key: kept for key, kept in self.indexed.items() if kept != source}
        self.indexed |= dict.fromkeys(new, source)

    @rule()
    def fail_next(self) -> None:
        self.failing = True

    @rule()
    def restart(self) -> None:
        self.vectors.inner.close()  # type: ignore[attr-defined]
        self.made.close()
        self.made.store.close()
        self.open()

    @rule(text=texts)
    def lose_kv(self, text: str) -> None:
        self.made.engine.forget([(self.made.prompts.fingerprint, self.made.prompts.chunk_key(text))])
        self.failing = False
        self.vectors.warm()

    @rule(text=texts)
    def ask(self, text: str) -> None:
        k = len(self.live) + len(self.indexed)
        if k:
            found = self.vectors.similarity_search(text, k=k + 1)
            assert sorted(doc.page_content for doc in found) == sorted(self.documents())

    def documents(self) -> list[str]:
        return [text for text, _ in self.live.values()] + [key[0] for key in self.indexed]

    @invariant()
    def registered_is_what_lives(self) -> None:
        live = set(self.documents())
        assert registered(self.made) == live
        assert sorted(self.vectors.register.texts().values()) == sorted(self.documents())
        assert kv_texts(self.made, live) == live
        keys = {self.made.prompts.chunk_key(text) for text in live}
        assert kv_files(self.made, self.folder / "kv") == keys

    def teardown(self) -> None:
        self.vectors.inner.close()  # type: ignore[attr-defined]
        self.made.store.close()
        self._place.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck))
