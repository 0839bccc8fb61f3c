"""The life of a corpus through LlamaIndex's own API: whatever happens, the KV is that of the living nodes."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from framework_kit import light_tokenizer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery
from llama_index_kit import EMBED, kv_keys, node, tiny_engine, tiny_workspace, wanted_keys
from lmcache_rag.integrations.llama_index import LMCacheVectorStore, as_blend_query_engine, node_text

from lmcache_rag.errors import PrecomputeError

TEXTS = [f"Passage {i} tells of {what}, and of nothing else." for i, what in enumerate(("keys", "ships", "lions"))]
names, texts, colours = st.sampled_from("abc"), st.sampled_from(TEXTS), st.sampled_from(["red", "blue"])
contents = st.tuples(texts, colours, colours)


def document(name: str, content: tuple[str, str, str]) -> Document:
    """A document with metadata that the model reads, and some that it does not.

    No two have one hash: of such, a pipeline that deletes what is missing would delete one only.
    """
    text, shown, hidden = content
    return Document(
        text=text,
        id_=name,
        metadata={"shown": shown, "hidden": hidden, "name": name},
        excluded_llm_metadata_keys=["hidden", "name"],
        excluded_embed_metadata_keys=["hidden", "name"],
    )


class Life(RuleBasedStateMachine):
    """What lives is kept here as content by document, beside the real thing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.indexed: dict[str, tuple[str, str, str]] = {}
        self.piped: dict[str, tuple[str, str, str]] = {}
        self.hashed: dict[str, tuple[str, str, str]] = {}  # what the pipeline believes to stand in the store
        self.added: dict[str, str] = {}
        self.docstore = SimpleDocumentStore()
        self.open()

    def open(self) -> None:
        self.engine = tiny_engine(self.folder / "kv", light_tokenizer())
        self.workspace = tiny_workspace(self.folder, self.engine)
        self.store = LMCacheVectorStore(None, self.workspace)
        self.index = VectorStoreIndex.from_vector_store(
            self.store, embed_model=EMBED, transformations=[SentenceSplitter()]
        )

    def close(self) -> None:
        self.store.inner.close()
        self.workspace.close()
        self.engine.close()

    def failing(self, fails: bool):
        """Let the engine fail at the next KV that it has to compute."""
        real = self.engine.precompute

        def precompute(prompts, *, stop=None):
            waiting = iter(prompts)
            for prompt in waiting:
                if fails and self.engine.missing([prompt])[0]:
                    raise PrecomputeError("on demand")
                yield from real(itertools.chain([prompt], [] if fails else waiting))

        return mock.patch.object(self.engine, "precompute", precompute)

    # -- what happens -------------------------------------------------------------------------------------------

    @rule(name=names, content=contents, fails=st.booleans(), twin=st.booleans())
    def insert_or_update(self, name, content, fails, twin):
        name = f"i{name}"
        new = document(name, content)
        known = name in self.indexed
        self.indexed.pop(name, None)  # an update deletes first
        with self.failing(fails):
            try:
                if twin:
                    asyncio.run(self.index.aupdate_ref_doc(new) if known else self.index.ainsert(new))
                elif known:
                    self.index.update_ref_doc(new)
                else:
                    self.index.insert(new)
            except PrecomputeError:
                return
        self.indexed[name] = content

    @rule(name=names, twin=st.booleans())
    def delete(self, name, twin):
        if twin:
            asyncio.run(self.index.adelete_ref_doc(f"i{name}"))
        else:
            self.index.delete_ref_doc(f"i{name}")
        self.indexed.pop(f"i{name}", None)

    @rule(corpus=st.dictionaries(names.map("p{}".format), contents), fails=st.booleans(), cache=st.booleans())
    def run_pipeline(self, corpus, fails, cache):
        runs = IngestionPipeline(
            transformations=[SentenceSplitter(), EMBED],
            vector_store=self.store,
            docstore=self.docstore,
            docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
            disable_cache=not cache,
        )
        given = [document(name, content) for name, content in corpus.items()]
        # The pipeline first deletes what is missing or changed. Of what is missing it forgets the hash too; of what is
        # changed only when the new nodes are in. So an old text that comes back after a failed run is passed over.
        self.hashed = {name: content for name, content in self.hashed.items() if name in corpus}
        changed = {name: content for name, content in corpus.items() if self.hashed.get(name) != content}
        self.piped = {n: c for n, c in self.piped.items() if n in corpus and n not in changed}
        with self.failing(fails):
            try:
                runs.run(documents=given)
            except PrecomputeError:
                return
        self.piped |= changed
        self.hashed |= changed

    @rule(nodes=st.dictionaries(names.map("n{}".format), texts, min_size=1), fails=st.booleans())
    def add_nodes(self, nodes, fails):
        with self.failing(fails):
            try:
                self.store.add([node(text, "somewhere", name=name) for name, text in nodes.items()])
            except PrecomputeError:
                return
        self.added |= nodes

    @rule(gone=st.lists(names.map("n{}".format)))
    def delete_nodes(self, gone):
        self.store.delete_nodes(gone)
        for name in gone:
            self.added.pop(name, None)

    @rule()
    def clear(self):
        self.store.clear()
        self.docstore = SimpleDocumentStore()
        self.indexed, self.piped, self.hashed, self.added = {}, {}, {}, {}

    @rule()
    def restart(self):
        self.close()
        self.open()

    @rule()
    def lose_the_kv_and_warm(self):
        keys = kv_keys(self.folder / "kv", self.workspace)
        self.engine.forget([(self.workspace.prompts.fingerprint, key) for key in keys])
        assert self.store.warm().computed == len(keys)

    @rule()
    def ask(self):
        response = as_blend_query_engine(self.index, self.workspace, similarity_top_k=3).query("What?")
        assert {node_text(source.node) for source in response.source_nodes} <= self.living()
        if response.source_nodes:
            stats = response.metadata["lmcache_rag"]["stats"]
            assert (stats["chunks_hit"], stats["chunks_missed"]) == (len(response.source_nodes), 0)

    # -- what must be true --------------------------------------------------------------------------------------

    def living(self) -> set[str]:
        documents = itertools.chain(self.indexed.items(), self.piped.items())
        return {node_text(document(name, content)) for name, content in documents} | set(self.added.values())

    @invariant()
    def the_kv_is_that_of_the_living(self):
        registered = self.store.kv.texts()
        assert set(registered.values()) == self.living()
        assert set(registered) == self.store.inner.ids()
        assert len(registered) == len(self.indexed) + len(self.piped) + len(self.added)
        assert {chunk.text for chunk in self.workspace.store.registry.chunks()} == self.living()
        assert kv_keys(self.folder / "kv", self.workspace) == wanted_keys(self.workspace, self.living())

    def teardown(self) -> None:
        self.close()
        shutil.rmtree(self.folder)


def test_the_life_of_a_corpus():
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_nodes_of_an_earlier_run_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(tmp_path / "kv", light_tokenizer())
    with tiny_workspace(tmp_path, engine) as workspace:
        for _ in range(2):
            store = LMCacheVectorStore(SimpleVectorStore(), workspace)
            store.add([node(text) for text in TEXTS])  # with random ids, as most programs' nodes
            for _ in range(2):
                store.query(VectorStoreQuery(query_embedding=EMBED.get_text_embedding("keys")))
        assert caplog.text.count("3 texts are registered for SimpleVectorStore that it does not hold") == 1
        assert "prune() of this vector store drops it" in caplog.text
        assert store.prune() == 3
        assert len(store.kv.ids()) == 3
    engine.close()
