"""Ingestion killed at any moment and run again, and several ingestions at once: the same end, nothing done twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kill_kit import CHUNK_TOKENS, MOMENTS, Attempt, Nursery, kv_checksums
from store_kit import kv_keys, problems

from lmcache_rag.ingest import IngestReport
from lmcache_rag.store import Store
from lmcache_rag.weights import tokenizer_digest
from lmcache_rag.workspace import Workspace

ROOT = Path(__file__).parents[2]
KILLS = 20
QUESTIONS = ("What is a key?", "How long is the river?", "Who wrote the letters?", "When was the town founded?")

pytestmark = pytest.mark.slow


# -- what is looked at ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """All that a finished store is: equal states answer every question alike."""

    files: frozenset[str]
    documents: tuple[Any, ...]
    chunks: tuple[Any, ...]
    kv: tuple[Any, ...]
    checksums: dict[str, str]
    vectors: dict[int, bytes]
    answers: tuple[Any, ...]


def kv_files(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished KV file. Writing one again makes a new inode: the old file is replaced."""
    files = {path: path.stat() for path in store.glob("kv/*/*/*.safetensors")}
    return {path.name: (facts.st_ino, facts.st_mtime_ns) for path, facts in files.items()}


def state(store: Path, embedder: Any) -> State:
    """The state of a store that nobody is working on; it must be sound."""
    names = frozenset(path.name for path in store.iterdir())
    with Store.open(store, read_only=True) as opened:
        registry, index = opened.registry, opened.index
        assert problems(registry) == []
        assert registry.trash() == []
        chunks = list(registry.chunks())
        stats = registry.stats()
        assert index.ids() == {chunk.chunk_id for chunk in chunks}
        assert (stats.chunks_without_embedding, len(stats.kv)) == (0, 1)
        rows = list(registry.kv_rows(stats.kv[0].fingerprint))
        documents = [
            (
                (record.doc_id, record.content_hash, record.splitter, record.source, record.metadata),
                [chunk.chunk_id for chunk in registry.document_chunks(record.doc_id)],
            )
            for record in registry.documents()
        ]
        hits = [index.search(embedder.embed_query(question), 5) for question in QUESTIONS]
        ids = [chunk.chunk_id for chunk in chunks]
        vectors = {key: row.tobytes() for key, row in zip(ids, index.vectors(ids), strict=True)}
    sums = kv_checksums(store)
    assert {row.chunk_id for row in rows} == set(ids)
    assert len(sums) == len({row.key for row in rows}) + 1, "each chunk has its file, and so has the prefix"
    return State(
        files=names,
        documents=tuple(documents),
        chunks=tuple((chunk.chunk_id, chunk.text, chunk.tokens) for chunk in chunks),
        kv=tuple((row.chunk_id, row.key, row.tokens) for row in rows),
        checksums=sums,
        vectors=vectors,
        answers=tuple([(hit.chunk_id, hit.score, hit.documents) for hit in found] for found in hits),
    )


@dataclass(frozen=True)
class Wreck:
    """What a killed ingestion left: what it had finished must not be done again."""

    documents: dict[str, str]
    texts: set[str]
    recorded: int
    files: dict[str, tuple[int, int]]


def wreck(store: Path, scratch: Path) -> Wreck:
    """Look at a copy, so that the next run finds the wreck as it is; the store must be sound all the same."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(store, scratch, ignore=shutil.ignore_patterns("kv"))
    files = kv_files(store)
    if not (store / "store.db").exists():
        return Wreck({}, set(), 0, files)
    with Store.open(scratch) as opened:
        registry = opened.registry
        assert problems(registry) == []
        chunks = list(registry.chunks())
        assert opened.index.ids() == {chunk.chunk_id for chunk in chunks}
        fingerprints = [part.fingerprint for part in registry.stats().kv]
        keys = {key for fingerprint in fingerprints for key in kv_keys(registry, fingerprint)}
        assert {f"{key}.safetensors" for key in keys} <= set(files), "KV that is recorded exists"
        documents = {record.doc_id: record.content_hash for record in registry.documents()}
        return Wreck(documents, {chunk.text_hash for chunk in chunks}, len(keys), files)


# -- the ground -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery(smollm2_path: Path, embedder_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("attempts"), smollm2_path, embedder_path)
    yield made
    made.close()


@dataclass
class Ground:
    """A store that holds the first edition of some documents, and the second edition with many more."""

    base: Path
    docs: Path
    before: Wreck
    final: State
    seconds: float
    documents: dict[str, str]
    texts: set[str]

    def store(self, folder: Path) -> Path:
        """A copy of the store before the second edition."""
        return Path(shutil.copytree(self.base, folder))

    def agrees(self, attempt: Attempt, before: Wreck, store: Path, embedder: Any) -> None:
        """The run that went on after a kill did all that was left, nothing else, and ends like an undisturbed run."""
        assert attempt.status == 0, attempt.stderr
        report, after = attempt.report, kv_files(store)
        done = {doc_id for doc_id, name in before.documents.items() if self.documents.get(doc_id) == name}
        assert report["unchanged"] == len(done)
        assert set(report["added"]) | set(report["updated"]) == set(self.documents) - done
        assert report["failed"] == []
        # No text of the store was embedded again, no other text either, and none twice.
        assert sorted(attempt.embedded) == sorted(self.texts - before.texts)
        # Finished files stand as they were; the prefix alone, which is no chunk's, bears the time of its last use.
        kept = {name for name in after if name in before.files}
        assert {name: after[name][0] for name in kept} == {name: before.files[name][0] for name in kept}
        assert sum(after[name] != before.files[name] for name in kept) <= 1
        assert report["kv"]["computed"] == len(set(after) - kept) - (not before.files)
        assert state(store, embedder) == self.final


@pytest.fixture(scope="module")
def ground(nursery: Nursery, sentences: list[str], embedder: Any, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """Four documents, of which two change, and eight new ones; one of these is a copy."""
    folder = tmp_path_factory.mktemp("ground")
    docs, base = folder / "docs", folder / "base"
    docs.mkdir()
    supply = iter([sentence for sentence in dict.fromkeys(sentences) if len(sentence) < 160])
    texts = [[next(supply) for _ in range(3)] for _ in range(12)]
    for number in range(4):
        (docs / f"{number:02}.txt").write_text("\n\n".join(texts[number]))
    first = nursery.run(docs, base)
    assert first.status == 0, first.stderr
    for number in (0, 2):
        texts[number][1] = next(supply)
    texts[11] = list(texts[6])
    for number in range(12):
        (docs / f"{number:02}.txt").write_text("\n\n".join(texts[number]))
    whole = Path(shutil.copytree(base, folder / "whole"))
    undisturbed = nursery.run(docs, whole)
    assert undisturbed.status == 0, undisturbed.stderr
    report = undisturbed.report
    assert (len(report["added"]), len(report["updated"]), report["unchanged"]) == (8, 2, 2)
    assert report["chunks_removed"] >= 2
    scratch = folder / "scratch"
    before, end = wreck(base, scratch), wreck(whole, scratch)
    return Ground(base, docs, before, state(whole, embedder), undisturbed.seconds, end.documents, end.texts)


# -- kills ------------------------------------------------------------------------------------------------------


def test_killed_at_20_random_moments_it_ends_the_same(
    nursery: Nursery, ground: Ground, embedder: Any, tmp_path: Path
) -> None:
    moments, seconds = random.Random(20), ground.seconds
    killed, stages = 0, {"before the first commit": 0, "embedding or committing": 0, "KV": 0}
    for number in range(KILLS):
        for again in range(3):
            store = ground.store(tmp_path / f"{number}-{again}")
            at_first = kv_files(store)
            # One in each twentieth of the time, so that no part of the work is left out.
            victim = nursery.start(ground.docs, store).kill((number + moments.random()) / KILLS * seconds)
            if victim.killed:
                break
            seconds *= 0.8  # the machine is quicker than when the time was taken
        left = wreck(store, tmp_path / "scratch")
        if victim.killed:
            killed += 1
            stages["before the first commit"] += left.documents == ground.before.documents
            stages["embedding or committing"] += not set(victim.embedded) <= left.texts
            stages["KV"] += 0 < len(set(left.files) - set(at_first)) < len(ground.final.checksums)
        ground.agrees(nursery.run(ground.docs, store), left, store, embedder)
        shutil.rmtree(store)
    assert killed >= KILLS * 3 // 4, "the kills came too late"
    assert all(stages.values()), stages


def test_killed_repeatedly_it_still_ends_the_same(
    nursery: Nursery, ground: Ground, embedder: Any, tmp_path: Path
) -> None:
    moments, store, kills = random.Random(3), ground.store(tmp_path / "store"), 0
    left = wreck(store, tmp_path / "scratch")
    for _ in range(8):
        attempt = nursery.start(ground.docs, store).kill(moments.uniform(0.15, 0.45) * ground.seconds)
        if not attempt.killed:
            break
        kills += 1
        before, left = left, wreck(store, tmp_path / "scratch")
        assert before.texts - left.texts <= ground.before.texts - ground.texts, "only what the new edition dropped"
        assert all(left.files[name][0] == before.files[name][0] for name in set(left.files) & set(before.files))
        assert not set(attempt.embedded) & before.texts
    assert kills > 1
    left = wreck(store, tmp_path / "scratch")
    ground.agrees(nursery.run(ground.docs, store), left, store, embedder)


@pytest.mark.parametrize("at", MOMENTS)
def test_killed_at_the_worst_moments(at: str, nursery: Nursery, ground: Ground, embedder: Any, tmp_path: Path) -> None:
    store = ground.store(tmp_path / "store")
    victim = nursery.run(ground.docs, store, at=at)
    assert victim.killed, victim.stderr
    left = wreck(store, tmp_path / "scratch")
    ground.agrees(nursery.run(ground.docs, store), left, store, embedder)


# -- several at once --------------------------------------------------------------------------------------------


@pytest.fixture
def halves(ground: Ground, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with a half of the documents each; two of them hold the same text."""
    folders = (tmp_path / "even", tmp_path / "odd")
    for folder in folders:
        folder.mkdir()
    for number, path in enumerate(sorted(ground.docs.iterdir())):
        shutil.copy(path, folders[number % 2])
    return folders


def begun(attempt: Attempt) -> Attempt:
    """Wait until it is in the middle of its work, and so holds the store's lock."""
    deadline = time.monotonic() + 30
    while not attempt.embedded:
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.002)
    return attempt


def everything_is_there(store: Path, docs: tuple[Path, ...], embedder: Any) -> None:
    found = state(store, embedder)
    assert {facts[0] for facts, _ in found.documents} == {str(path) for folder in docs for path in folder.iterdir()}


def test_two_ingestions_at_once_queue_and_are_whole(
    nursery: Nursery, halves: tuple[Path, Path], embedder: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = begun(nursery.start(halves[0], store))
    second = nursery.start(halves[1], store)
    for attempt in (first.wait(), second.wait()):
        assert attempt.status == 0, attempt.stderr
        assert len(attempt.report["added"]) == 6
    everything_is_there(store, halves, embedder)
    assert set(first.embedded).isdisjoint(second.embedded), "a text that both hold is embedded once"


def test_two_equal_ingestions_do_the_work_once(
    nursery: Nursery, halves: tuple[Path, Path], embedder: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    both = [nursery.start(halves[0], store), nursery.start(halves[0], store)]
    assert [attempt.wait().status for attempt in both] == [0, 0], [attempt.stderr for attempt in both]
    assert sorted(len(attempt.report["added"]) for attempt in both) == [0, 6]
    assert min(attempt.report["kv"]["computed"] for attempt in both) == 0
    everything_is_there(store, halves[:1], embedder)


def test_an_ingestion_without_wait_names_the_writer(
    nursery: Nursery, halves: tuple[Path, Path], embedder: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = begun(nursery.start(halves[0], store))
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not finish too early
    second = nursery.run(halves[1], store, LMCACHE_RAG_LOCK_TIMEOUT_S="0")
    os.kill(first.pid, signal.SIGCONT)
    assert second.status == 3
    assert second.report["error"]["type"] == "StoreLockedError"
    assert f"Process {first.pid}" in second.stderr
    assert "Wait until it has finished and run the same again" in second.stderr
    assert "Traceback" not in second.stderr
    assert second.embedded == []
    assert first.wait().status == 0
    everything_is_there(store, halves[:1], embedder)
    assert nursery.run(halves[1], store).status == 0
    everything_is_there(store, halves, embedder)


def test_who_waits_for_a_writer_that_is_killed_goes_on(
    nursery: Nursery, ground: Ground, embedder: Any, tmp_path: Path
) -> None:
    store = ground.store(tmp_path / "store")
    first = begun(nursery.start(ground.docs, store))
    time.sleep(ground.seconds / 4)
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not finish too early
    second = nursery.start(ground.docs, store)
    time.sleep(0.3)
    assert first.kill().killed
    assert second.wait().status == 0, second.stderr
    assert state(store, embedder) == ground.final


# -- the real model ---------------------------------------------------------------------------------------------


def test_the_real_model_killed_ends_with_the_same_kv(
    make_engine: Any, smollm2_path: Path, embedder_path: Path, embedder: Any, sentences: list[str], tmp_path: Path
) -> None:
    docs, store, whole = tmp_path / "docs", tmp_path / "store", tmp_path / "whole"
    docs.mkdir()
    for number in range(3):
        (docs / f"{number}.txt").write_text("\n\n".join(sentences[4 * number :][:4]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_RAG_")} | {
        "LMCACHE_RAG_MODEL": str(smollm2_path),
        "LMCACHE_RAG_EMBEDDER": str(embedder_path),
        "LMCACHE_RAG_CHUNK_TOKENS": str(CHUNK_TOKENS),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # the order of additions, and so the last bits, depend on the number of threads
    }
    command = [sys.executable, "-m", "lmcache_rag.cli", "ingest", str(docs), "--store", str(store)]
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len(kv_files(store)) < 4 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    _, said = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, said
    left = wreck(store, tmp_path / "scratch")

    def ingested(folder: Path) -> IngestReport:
        # The same model, as the command line names it.
        engine = make_engine(folder / "kv", name=smollm2_path.name, tokenizer_hash=tokenizer_digest(smollm2_path))
        with Workspace.open(folder, engine=engine, embedder=embedder, chunk_tokens=CHUNK_TOKENS) as workspace:
            return workspace.ingestor.ingest([docs])

    with one_thread():
        again = ingested(store)
        undisturbed = ingested(whole)
    final = state(store, embedder)
    assert 3 < len(left.files) < len(final.checksums)
    assert again.kv.computed == undisturbed.kv.computed - (len(left.files) - 1)
    assert again.unchanged == len(left.documents) == 3
    after = kv_files(store)
    assert all(after[name][0] == facts[0] for name, facts in left.files.items())
    assert final == state(whole, embedder)


@contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
