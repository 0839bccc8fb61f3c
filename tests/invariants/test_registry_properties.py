"""Any sequence of adding, changing, removing, recording, crashing and reopening keeps the registry's counts right."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_kit import EMBEDDER, document, kv_keys, problems, vector, withdraw_kv

from lmcache_rag.errors import StoreError
from lmcache_rag.store import KVRow, NewDocument, Store

IDS = st.sampled_from(["a", "b", "c"])
TEXTS = st.lists(st.sampled_from(["one", "two", "ONE", "three", "é", ""]), max_size=4)
BATCHES = st.lists(st.tuples(IDS, TEXTS), min_size=1, max_size=3)
FINGERPRINTS = st.sampled_from(["f1", "f2"])


def key_of(text: str) -> str:
    """Texts that differ only in case stand for texts of the same token ids: they share their key."""
    return f"key of {text.lower()}"


class RegistryMachine(RuleBasedStateMachine):
    """The model is a dictionary of documents, and for each fingerprint the texts whose KV was recorded."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="registry-"))
        self.crashes = 0
        self.store = Store.open(self.root / "0")
        self.docs: dict[str, list[str]] = {}
        self.recorded: defaultdict[str, set[str]] = defaultdict(set)
        self.engine: set[tuple[str, str]] = set()  # what an engine would keep: all that was recorded and not dropped
        self.ids: dict[int, str] = {}  # every id that was ever given, with its text

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.the_index_holds_exactly_the_chunks_with_their_vectors()
            self.store.close()
            shutil.rmtree(self.root)

    # What the model does

    def live(self) -> set[str]:
        return {text for texts in self.docs.values() for text in texts}

    def settle(self) -> None:
        for texts in self.recorded.values():
            texts &= self.live()

    def apply(self, batch: list[tuple[str, list[str]]]) -> None:
        self.docs.update(batch)
        self.settle()

    @staticmethod
    def new(batch: list[tuple[str, list[str]]]) -> list[NewDocument]:
        return [document(doc_id, *texts) for doc_id, texts in batch]

    # Rules

    @rule(batch=BATCHES)
    def put(self, batch: list[tuple[str, list[str]]]) -> None:
        before, held = self.live(), dict(self.docs)
        results = self.store.registry.put_documents(self.new(batch), embedder=EMBEDDER)
        for result, (doc_id, texts) in zip(results, batch, strict=True):
            old = held.get(doc_id)
            assert result.status == ("added" if old is None else "unchanged" if old == texts else "updated")
            held[doc_id] = texts
        self.apply(batch)
        # Texts that come and go within the batch count on both sides.
        added, removed = sum(r.added_chunks for r in results), sum(r.removed_chunks for r in results)
        assert added - removed == len(self.live()) - len(before)

    @rule(doc_ids=st.lists(IDS, max_size=3))
    def remove(self, doc_ids: list[str]) -> None:
        before, wanted = self.live(), set(doc_ids)
        result = self.store.registry.remove_documents(doc_ids)
        assert set(result.unknown) == wanted - set(self.docs)
        for doc_id in wanted:
            self.docs.pop(doc_id, None)
        self.settle()
        assert result.removed_chunks == len(before) - len(self.live())

    @rule(fingerprint=FINGERPRINTS, data=st.data())
    def record(self, fingerprint: str, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.ids.items())), max_size=4)) if self.ids else []
        rows = [KVRow(chunk_id, key_of(text), 1, 10) for chunk_id, text in chosen]
        current = {chunk.chunk_id for chunk in self.store.registry.chunks()}
        recorded = self.store.registry.record_kv(fingerprint, {}, rows)
        assert recorded == sum(chunk_id in current for chunk_id, _ in chosen)
        self.recorded[fingerprint] |= {text for chunk_id, text in chosen if chunk_id in current}
        self.engine |= {(fingerprint, key_of(text)) for _, text in chosen}

    @rule(fingerprint=FINGERPRINTS, texts=st.none() | TEXTS)
    def forget(self, fingerprint: str, texts: list[str] | None) -> None:
        keys = None if texts is None else [key_of(text) for text in texts]
        withdraw_kv(self.store.registry, fingerprint, keys)
        self.recorded[fingerprint] = {
            text for text in self.recorded[fingerprint] if keys is not None and key_of(text) not in keys
        }

    @rule(limit=st.none() | st.integers(1, 2))
    def empty_trash(self, limit: int | None) -> None:
        pairs = self.store.registry.trash(limit)
        self.engine -= set(pairs)
        assert self.store.registry.clear_trash(pairs) == []

    @rule(fingerprint=FINGERPRINTS)
    def empty_trash_while_all_of_it_comes_back(self, fingerprint: str) -> None:
        pairs = self.store.registry.trash()
        self.put([("a", ["one", "two", "ONE", "three", "é", ""])])
        rows = [KVRow(chunk.chunk_id, key_of(chunk.text), 1, 10) for chunk in self.store.registry.chunks()]
        self.store.registry.record_kv(fingerprint, {}, rows)
        self.engine |= {(fingerprint, row.key) for row in rows}
        revived = self.store.registry.clear_trash(pairs)
        assert set(revived) == {pair for pair in pairs if pair[0] == fingerprint}
        self.engine -= set(pairs) - set(revived)  # a revived pair may still be there: it must stay in the trash
        dropped = {key for _, key in revived}
        self.recorded[fingerprint] = {text for text in self.live() if key_of(text) not in dropped}

    @rule(batch=BATCHES, steps=st.integers(1, 400), commit=st.booleans())
    def crash_inside_a_put(self, batch: list[tuple[str, list[str]]], steps: int, commit: bool) -> None:
        """Go on with what the disk held at some moment of a transaction, as after a kill."""
        self.with_interruption(steps, lambda: self.snapshot(), self.new(batch))
        if commit or not self.snapshot_taken():
            self.snapshot()  # after the commit: all of it must be there
            self.apply(batch)
        self.store.close()
        self.store = Store.open(self.folder(self.crashes))

    @rule(batch=BATCHES, steps=st.integers(1, 400))
    def fault_inside_a_put(self, batch: list[tuple[str, list[str]]], steps: int) -> None:
        """A statement fails; the transaction must be undone and the same store go on."""
        if not self.with_interruption(steps, lambda: 1, self.new(batch)):
            self.apply(batch)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.store.path)

    @rule()
    def save(self) -> None:
        with self.store.writing():
            pass

    @precondition(lambda self: (self.store.path / "index.faiss").exists())
    @rule(kept=st.integers(0, 400))
    def damage_the_index(self, kept: int) -> None:
        self.store.close()
        with (self.store.path / "index.faiss").open("r+b") as file:
            file.truncate(kept)
        self.store = Store.open(self.store.path)

    @rule()
    def the_index_holds_exactly_the_chunks_with_their_vectors(self) -> None:
        """A rule and no invariant, so that many changes come together before the index sees them."""
        chunks = list(self.store.registry.chunks())
        assert self.store.index.ids() == {chunk.chunk_id for chunk in chunks}
        rows = self.store.index.vectors([chunk.chunk_id for chunk in chunks])
        assert np.array_equal(rows.reshape(-1), np.array([vector(chunk.text) for chunk in chunks]).reshape(-1))

    # Faults

    def folder(self, number: int) -> Path:
        return self.root / str(number)

    def snapshot_taken(self) -> bool:
        return self.folder(self.crashes) != self.store.path

    def snapshot(self) -> None:
        self.crashes += 1
        self.folder(self.crashes).mkdir()
        for file in self.store.path.iterdir():
            if not file.name.startswith("lock"):
                shutil.copy(file, self.folder(self.crashes))

    def with_interruption(self, steps: int, act: Callable[[], object], new: list[NewDocument]) -> bool:
        """Store documents, with a fault after some steps of SQLite; returns whether that failed."""
        left = [0]  # only from now on: setting the handler is a transaction too, whose end is not to fail

        def handler() -> object:
            left[0] -= 1
            return act() if left[0] == 0 else None

        with self.store.registry._database.write() as connection:
            connection.set_progress_handler(handler, 20)
        left[0] = steps
        try:
            self.store.registry.put_documents(new, embedder=EMBEDDER)
        except StoreError:
            return True
        finally:
            with self.store.registry._database._write_turn:
                connection.set_progress_handler(None, 0)
        return False

    # What must be true after every step

    @invariant()
    def documents_and_chunks_are_those_of_the_model(self) -> None:
        registry = self.store.registry
        assert [record.doc_id for record in registry.documents()] == sorted(self.docs)
        for doc_id, texts in self.docs.items():
            assert [chunk.text for chunk in registry.document_chunks(doc_id)] == texts
        chunks = list(registry.chunks())
        assert sorted(chunk.text for chunk in chunks) == sorted(self.live())

    @invariant()
    def an_id_is_never_used_for_another_text(self) -> None:
        for chunk in self.store.registry.chunks():
            assert self.ids.setdefault(chunk.chunk_id, chunk.text) == chunk.text

    @invariant()
    def kv_is_recorded_for_exactly_the_chunks_that_have_it(self) -> None:
        registry = self.store.registry
        by_id = {chunk.chunk_id: chunk.text for chunk in registry.chunks()}
        for fingerprint in ("f1", "f2"):
            rows = list(registry.kv_rows(fingerprint))
            assert {by_id[row.chunk_id] for row in rows} == self.recorded[fingerprint]
            assert all(row.key == key_of(by_id[row.chunk_id]) for row in rows)
            assert kv_keys(registry, fingerprint) == {key_of(text) for text in self.recorded[fingerprint]}
            missing = {chunk.text for chunk in registry.chunks_without_kv(fingerprint)}
            assert missing == self.live() - self.recorded[fingerprint]

    @invariant()
    def every_key_that_an_engine_keeps_is_either_recorded_or_in_the_trash(self) -> None:
        trash = set(self.store.registry.trash())
        live = {(fp, key) for fp in ("f1", "f2") for key in kv_keys(self.store.registry, fp)}
        assert not trash & live
        assert self.engine == trash | live

    @invariant()
    def the_database_is_sound(self) -> None:
        assert problems(self.store.registry) == []


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestRegistryMachine = pytest.mark.slow(TestRegistryMachine)
