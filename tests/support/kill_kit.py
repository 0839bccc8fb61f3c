"""Ingestion as processes that can be killed: a nursery that has loaded everything forks one for each attempt.

An attempt is the real command line with the real embedder and a tiny random Llama. It writes the hash of each text that
it embeds into a file, so that work done twice shows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_rag.settings import Settings
    from lmcache_rag.workspace import Workspace

SUPPORT = Path(__file__).parent
CHUNK_TOKENS = 32
BATCH_CHUNKS = 8

# -- in the tests -----------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One process that ingests."""

    nursery: Nursery
    pid: int
    folder: Path
    begin: float
    status: int = 0
    seconds: float = 0.0

    def kill(self, after: float = 0.0) -> Attempt:
        """SIGKILL so many seconds after the start; see `killed` for whether it was still at work."""
        time.sleep(max(self.begin + after - time.perf_counter(), 0.0))
        os.kill(self.pid, signal.SIGKILL)  # its parent has not asked for it yet, so the number is still its own
        return self.wait()

    def wait(self) -> Attempt:
        """Wait for its end. A negative status is the signal that ended it."""
        answer = self.nursery.ask({"wait": self.pid})
        self.status, self.seconds = answer["status"], answer["seconds"]
        return self

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def report(self) -> dict[str, Any]:
        """What it wrote with --json."""
        return dict(json.loads((self.folder / "stdout").read_text()))

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def embedded(self) -> list[str]:
        """Hash of each text that it embedded, in order."""
        file = self.folder / "embedded"
        return file.read_text().split() if file.exists() else []


class Nursery:
    """Starts attempts within milliseconds. Close it at the end."""

    def __init__(self, folder: Path, model: Path, embedder: Path) -> None:
        self._folder = folder
        self._number = 0
        code = (
            f"import sys; sys.path[:0] = {[str(SUPPORT), str(SUPPORT.parents[1])]!r}; import kill_kit; kill_kit.serve()"
        )
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_RAG_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean | one | {"LMCACHE_RAG_CHUNK_TOKENS": str(CHUNK_TOKENS), "TOKENIZERS_PARALLELISM": "false"},
        )
        self.ask({"model": str(model), "embedder": str(embedder)})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def start(self, docs: Path, store: Path, *, at: str = "", **environment: str) -> Attempt:
        """Start `lmcache-rag ingest docs --store store --json`; `at` names a moment at which it kills itself."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        question = {"docs": str(docs), "store": str(store), "at": at, "folder": str(folder), "env": environment}
        pid = self.ask(question)["pid"]
        return Attempt(self, pid, folder, time.perf_counter())

    def run(self, docs: Path, store: Path, **options: str) -> Attempt:
        """Start one and wait for it."""
        return self.start(docs, store, **options).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def kv_checksums(store: Path) -> dict[str, str]:
    """Checksum of each KV file, by name, after it was compared with what the file holds."""
    from safetensors import safe_open

    from lmcache_rag.engines.kv_files import KVFiles

    found = {}
    for path in store.glob("kv/*/*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        assert KVFiles(store / "kv").load(facts["fingerprint"], facts["key"]) is not None  # raises where it is damaged
        found[path.name] = facts["checksum"]
    return found


# -- in the nursery's process -----------------------------------------------------------------------------------


class NotedEmbedder:
    """An embedder that writes down what it embeds."""

    def __init__(self, inner: Any, file: Path) -> None:
        self._inner, self._file = inner, file
        self.name, self.dimension, self.fingerprint = inner.name, inner.dimension, inner.fingerprint
        self.embed_query = inner.embed_query

    def embed_documents(self, texts: list[str]) -> Any:
        import numpy as np

        from lmcache_rag.store.types import text_hash

        rows = []
        with self._file.open("a", buffering=1) as file:
            for text in texts:  # one at a time, so that a vector does not depend to the last bit on its neighbours
                rows.append(self._inner.embed_documents([text])[0])
                file.write(text_hash(text) + "\n")
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.dimension)


def serve() -> None:
    """Load everything once, then fork for each line of stdin."""
    import tempfile

    import torch
    from models import tiny_model
    from transformers import AutoTokenizer

    from lmcache_rag import ingest
    from lmcache_rag.embedding import SentenceTransformerEmbedder
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.workspace import Workspace

    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    ingest._BATCH_CHUNKS = BATCH_CHUNKS  # so that a short run has as many commits as a long one
    paths = json.loads(sys.stdin.readline())
    tokenizer = AutoTokenizer.from_pretrained(paths["model"], local_files_only=True)
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    embedder = SentenceTransformerEmbedder(paths["embedder"], device="cpu")

    def engine(folder: Path) -> EmbeddedEngine:
        return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=folder)

    with tempfile.TemporaryDirectory() as name:  # whatever is loaded late is loaded now
        prompts = _warm_up(Path(name), engine, embedder)

    def opener(folder: Path) -> Callable[..., Workspace]:
        def opened(settings: Settings, *, create: bool) -> Workspace:
            noted = NotedEmbedder(embedder, folder / "embedded")
            workspace = Workspace(settings, create=create, engine=engine(settings.store / "kv"), embedder=noted)
            workspace.prompts = prompts  # the same for all, and slow to make
            return workspace

        return opened

    _answer({})
    begun: dict[int, float] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if pid := question.get("wait"):
            _, status = os.waitpid(pid, 0)
            seconds = time.perf_counter() - begun.pop(pid)
            _answer({"status": os.waitstatus_to_exitcode(status), "seconds": seconds})
            continue
        now = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _attempt(question, opener(Path(question["folder"])))
        begun[pid] = now
        _answer({"pid": pid})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _warm_up(folder: Path, engine: Callable[[Path], Any], embedder: Any) -> Any:
    from lmcache_rag.cli.app import app  # noqa: F401
    from lmcache_rag.workspace import Workspace

    (folder / "a.txt").write_text("Some text about rivers.")
    made = engine(folder / "store" / "kv")
    with Workspace.open(folder / "store", engine=made, embedder=embedder) as workspace:
        workspace.ingestor.ingest([folder / "a.txt"])
        return workspace.prompts


def _attempt(question: dict[str, Any], open_workspace: Callable[..., Workspace]) -> None:
    """The forked process: `lmcache-rag ingest` with its streams in files. Does not return."""
    from lmcache_rag.cli import main
    from lmcache_rag.cli.run import Services

    folder = Path(question["folder"])
    try:
        os.environ.update(question["env"])
        for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
            opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
            os.dup2(opened, number)
            os.close(opened)
        if question["at"]:
            MOMENTS[question["at"]]()
        sys.argv = ["lmcache-rag", "ingest", question["docs"], "--store", question["store"], "--json"]
        main(Services(open_workspace=open_workspace))
    except SystemExit as done:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code if isinstance(done.code, int) else int(done.code is not None))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


# -- moments at which a process kills itself --------------------------------------------------------------------


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_instead(owner: Any, name: str, *, call: int = 1) -> None:
    """Let the process die where it calls that function for the so-manieth time."""
    whole, calls = getattr(owner, name), iter(range(1, 1_000_000))
    setattr(owner, name, lambda *a, **k: _die() if next(calls) == call else whole(*a, **k))


def _die_after(owner: Any, name: str, *, call: int = 1) -> None:
    """Let the process die when that function has done its work for the so-manieth time."""
    whole, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def dying(*arguments: Any, **options: Any) -> Any:
        result = whole(*arguments, **options)
        if next(calls) == call:
            _die()
        return result

    setattr(owner, name, dying)


def _inside_the_commit() -> None:
    from lmcache_rag.store import sql

    _die_after(sql, "put_documents")


def _after_the_commit() -> None:
    from lmcache_rag.store import Registry

    _die_after(Registry, "put_documents")


def _before_the_trash_is_cleared() -> None:
    from lmcache_rag.store import Registry

    _die_instead(Registry, "clear_trash")


def _while_a_kv_file_is_written() -> None:
    import safetensors.torch

    _die_after(safetensors.torch, "save_file", call=3)


def _before_kv_is_recorded() -> None:
    from lmcache_rag.store import Registry

    _die_instead(Registry, "record_kv")


def _before_the_index_file_is_known() -> None:
    from lmcache_rag.store import index

    _die_after(index, "write_index")


MOMENTS: dict[str, Callable[[], None]] = {
    "inside the commit": _inside_the_commit,
    "after the commit": _after_the_commit,
    "before the trash is cleared": _before_the_trash_is_cleared,
    "while a KV file is written": _while_a_kv_file_is_written,
    "before KV is recorded": _before_kv_is_recorded,
    "before the index file is known": _before_the_index_file_is_known,
}
