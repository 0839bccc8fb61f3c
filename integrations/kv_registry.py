"""KV for the texts of a framework's vector store, and the workspace that store, retriever and answers share."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lmcache_rag.engines.base import Engine
from lmcache_rag.errors import ConfigError, DocumentError, EngineError, EngineUnavailableError, LMCacheRAGError
from lmcache_rag.kv_manager import KVManager, KVTotals
from lmcache_rag.kv_policy import KVPolicy, kv_mode
from lmcache_rag.kv_removal import ForgetReport, IngestPrompts
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

if TYPE_CHECKING:
    from lmcache_rag.store import NewDocument, Store, StoredChunk

log = logging.getLogger("lmcache_rag")

_BATCH = 256  # texts between two commits
_USUAL = KVPolicy()


class KVRegistry:
    """Records which texts another store holds, by its ids, and keeps their KV. Safe to use from several threads.

    Each text is one chunk, as the other store has it. Equal texts share one chunk and one KV, which is dropped with the
    last id. Texts are committed before their KV is computed: repeat an addition that failed half-way, or call warm().

    Args:
        store: Our own store, which holds the registry.
        engine: Computes and stores KV.
        prompts: Builds the prompts, and so the keys of KV.
        space: Name of the other store, where several share ours.
        lock_timeout: Seconds to wait for another process that is writing.
        canonical: Converts an id to the form in which the other store returns it.
        more: Other prompts, for which KV is computed too.
        policy: When KV is computed, how fast, and how long it is kept.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: IngestPrompts,
        *,
        space: str = "",
        lock_timeout: float = 30.0,
        canonical: Callable[[str], str] = str,
        more: Sequence[IngestPrompts] = (),
        policy: KVPolicy = _USUAL,
    ) -> None:
        self.store, self.engine, self.prompts = store, engine, prompts
        self.space = space
        self.lock_timeout = lock_timeout
        self._canonical = canonical
        self.policy = policy
        self._manager = KVManager(store, engine, prompts, policy=policy)
        self._more = [
            (one, KVManager(store, engine, one, policy=policy))
            for one in more
            if one.fingerprint != prompts.fingerprint
        ]
        self._head = f"{space}\x1f"  # before each id; no framework's ids begin with this
        self._changes = _changes_of(store, space)
        self._leftovers_known = False

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        *,
        space: str = "",
        canonical: Callable[[str], str] = str,
        prompts: Sequence[IngestPrompts] = (),
        kv: str | None = None,
        pin: bool | None = None,
    ) -> KVRegistry:
        """Make one over the parts of a workspace.

        Args:
            workspace: The workspace.
            space: Name of the other store, where several share ours.
            canonical: Converts an id to the form in which the other store returns it.
            prompts: For which KV is computed; none: the workspace's.
            kv: When it is computed: "now", "lazy" or "none", see KVPolicy; None: by the workspace's settings.
            pin: Whether it is pinned on its server; None: by the workspace's settings.

        Raises:
            ConfigError: `kv` is none of these.
        """
        workspace.record_model()
        first, *more = prompts or [workspace.prompts]
        return cls(
            workspace.store,
            workspace.engine,
            first,
            more=more,
            space=space,
            lock_timeout=workspace.settings.lock_timeout_s,
            canonical=canonical,
            policy=replace(
                workspace.kv_policy,
                mode=kv_mode(kv) if kv else workspace.kv_policy.mode,
                pin=workspace.kv_policy.pin if pin is None else pin,
            ),
        )

    @property
    def fingerprints(self) -> set[str]:
        """The fingerprints of the prompts for which KV is computed."""
        return {prompts.fingerprint for prompts, _ in self._all_prompts()}

    # -- changes --------------------------------------------------------------------------------------------------

    def add(self, texts: Mapping[str, str], *, groups: Mapping[str, str] | None = None) -> KVTotals:
        """Register texts under their ids, replacing earlier ones; with the mode "now" compute the KV that is missing.

        A text without tokens, or longer than the context, is registered without KV.

        Args:
            texts: Text by id.
            groups: Group by id, for example the document that a text is part of; see ids().

        Raises:
            DocumentError: A text is not valid Unicode.
            StoreError: The store cannot be written.
            PrecomputeError: KV could not be computed. The texts are registered; add them again, or call warm().
        """
        items, groups = list(texts.items()), groups or {}
        totals = KVTotals()
        self._changes.touch(self._keys(texts))
        with self.store.writing(timeout=self.lock_timeout):
            for start in range(0, len(items), _BATCH):
                batch = items[start : start + _BATCH]
                self.store.registry.put_documents(
                    [self._document(key, text, groups.get(key, self.space)) for key, text in batch], embedder=None
                )
            for start in range(0, len(items) if self.policy.mode == "now" else 0, _BATCH):
                ids = self._keys(key for key, _ in items[start : start + _BATCH])
                for prompts, manager in self._all_prompts():
                    todo = self.store.registry.chunks_without_kv(prompts.fingerprint, doc_ids=ids)
                    totals += manager.compute(self._computable(todo, prompts))
            # Last: if KV cannot be computed, the caller may want to restore the earlier texts.
            self._manager.empty_trash()
        return totals

    async def aadd(self, texts: Mapping[str, str], *, groups: Mapping[str, str] | None = None) -> KVTotals:
        """Async version of add, in a thread."""
        return await asyncio.to_thread(self.add, dict(texts), groups=groups)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove ids, and KV that no other id needs. Ignores unknown ids. Returns how many were known."""
        keys = self._keys(ids)
        self._changes.touch(keys)
        if not keys:
            return 0
        with self.store.writing(timeout=self.lock_timeout):
            removed = self.store.registry.remove_documents(keys)
            self._manager.empty_trash()
        return removed.documents

    async def aremove(self, ids: Iterable[str]) -> int:
        """Async version of remove, in a thread."""
        return await asyncio.to_thread(self.remove, list(ids))

    def forget(self, ids: Iterable[str]) -> ForgetReport:
        """Remove ids, and delete KV that no other id needs on the server too; see Maintainer.forget."""
        keys = self._keys(ids)
        self._changes.touch(keys)
        with self.store.writing(timeout=self.lock_timeout):
            return self._manager.forget(keys)

    async def aforget(self, ids: Iterable[str]) -> ForgetReport:
        """Async version of forget, in a thread."""
        return await asyncio.to_thread(self.forget, list(ids))

    def clear(self) -> int:
        """Remove all ids of this space. Returns how many there were."""
        return self.remove(self.ids())

    def warm(self) -> KVTotals:
        """Compute the KV of every registered text for which the engine has none.

        Raises:
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        with self.store.writing(timeout=self.lock_timeout):
            totals, known = KVTotals(), list(self.store.registry.stored_texts(self.texts().values()).values())
            for prompts, manager in self._all_prompts():
                chunks = self._computable(known, prompts)
                absent = self.engine.missing([prompts.ingest(chunk.text) for chunk in chunks])
                totals += manager.compute([chunk for chunk, gone in zip(chunks, absent, strict=True) if gone])
            return totals

    async def awarm(self) -> KVTotals:
        """Async version of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    # -- lookups --------------------------------------------------------------------------------------------------

    def ids(self, group: str | None = None) -> set[str]:
        """Return all ids of this space, or those of one group."""
        return {key[len(self._head) :] for key in self.store.registry.doc_ids(self._head, source=group)}

    def texts(self) -> dict[str, str]:
        """Return this space's texts by id."""
        return {
            key: "".join(chunk.text for chunk in self.store.registry.document_chunks(self._head + key))
            for key in self.ids()
        }

    def entries(self, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return (text, group) by id, for those of the ids that are known."""
        size = len(self._head)
        return {
            record.doc_id[size:]: (
                "".join(chunk.text for chunk in self.store.registry.document_chunks(record.doc_id)),
                record.source,
            )
            for record in self.store.registry.documents(self._keys(ids))
        }

    def warn_of_leftovers(self, held: Iterable[str], *, name: str, remedy: str) -> None:
        """Warn once of registered ids that the other store does not hold, although it was filled: of earlier runs.

        For a store in memory, at its first search: it begins empty at each start of a program.

        Args:
            held: The ids that it holds.
            name: Its name, for the log line.
            remedy: The call that drops them.
        """
        if self._leftovers_known:
            return
        self._leftovers_known = True
        try:
            left = len(self.ids() - {self._canonical(key) for key in held})
        except LMCacheRAGError:  # a search does not fail with the registry
            return
        if left:
            log.warning(
                "%d texts are registered for %s that it does not hold: of an earlier run, or of another program with "
                "the same registry. Their KV is kept; %s drops it. If another program needs it, give each program's "
                "vector store a name, space=...",
                left,
                name,
                remedy,
            )

    # -- adoption -------------------------------------------------------------------------------------------------

    def watch_changes(self) -> Changes:
        """Note the ids that add(), remove() and forget() change from now on, in this process; see adopt()."""
        return self._changes.watch()

    def adopt(self, texts: Mapping[str, tuple[str, str]], *, changes: Changes) -> tuple[set[str], int]:
        """Register texts that the other store held before, without computing KV; see compute().

        Args:
            texts: (text, group) by id; "": no group.
            changes: Ids that were changed after `texts` were read; they are left as they are.

        Returns:
            The ids that were registered now, and how many texts cannot be registered (no valid Unicode).
        """
        new, unusable = [], 0
        with self.store.writing(timeout=self.lock_timeout), self._changes.lock:
            known = self.entries(texts)
            for key, (text, group) in texts.items():
                name = self._canonical(key)
                if self._head + name in changes.ids or (name in known and known[name][0] == text):
                    continue
                try:
                    new.append(self._document(key, text, group or self.space))
                except DocumentError as problem:
                    log.warning("It is left out: %s", problem)
                    unusable += 1
            self.store.registry.put_documents(new, embedder=None)
        return {document.doc_id[len(self._head) :] for document in new}, unusable

    def compute(self, ids: Iterable[str], *, stop: threading.Event) -> KVTotals:
        """Compute the KV of those of the ids for which none is recorded, until `stop` is set.

        Raises:
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        if self.policy.mode != "now":
            return KVTotals()
        with self.store.writing(timeout=self.lock_timeout):
            totals, keys = KVTotals(), list(self._keys(ids))
            for prompts, manager in self._all_prompts():
                todo = self.store.registry.chunks_without_kv(prompts.fingerprint, doc_ids=keys)
                wanted = itertools.takewhile(lambda _: not stop.is_set(), self._computable(todo, prompts))
                totals += manager.compute(wanted, stop=stop)
            self._manager.empty_trash()
        return totals

    # -- inside ---------------------------------------------------------------------------------------------------

    def _keys(self, ids: Iterable[str]) -> list[str]:
        return [self._head + self._canonical(key) for key in ids]

    def _document(self, key: str, text: str, group: str) -> NewDocument:
        from lmcache_rag.store import NewChunk, NewDocument, text_hash

        try:
            name = text_hash(text)
        except UnicodeEncodeError as problem:
            raise DocumentError(
                f"The text of {key!r} is not valid Unicode: {problem}.", remedy="Decode it with errors='replace'."
            ) from problem
        chunk = NewChunk(text, len(self.prompts.chunk_ids(text)), 0)
        return NewDocument(self._head + self._canonical(key), name, "", group, [chunk])

    def _all_prompts(self) -> list[tuple[IngestPrompts, KVManager]]:
        return [(self.prompts, self._manager), *self._more]

    def _computable(self, chunks: Sequence[StoredChunk], prompts: IngestPrompts) -> list[StoredChunk]:
        limit = self.engine.info.context_length - len(prompts.prefix_ids) - len(prompts.neutral_ids)
        sizes = [len(prompts.chunk_ids(chunk.text)) for chunk in chunks]
        if long := sum(size >= limit for size in sizes):
            log.warning("%d text(s) are longer than the model's context: they have no KV. Split them smaller.", long)
        return [chunk for chunk, size in zip(chunks, sizes, strict=True) if 0 < size < limit]


@dataclass(eq=False)
class Changes:
    """Ids that were changed, with the head of their space."""

    ids: set[str] = field(default_factory=set)
    any: bool = False  # also changes of no known ids


class _ChangesOfSpace:
    """Notes the changes of one space for those that adopt its texts meanwhile."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while texts are adopted
        self._watching: weakref.WeakSet[Changes] = weakref.WeakSet()

    def watch(self) -> Changes:
        with self.lock:
            self._watching.add(changes := Changes())
        return changes

    def touch(self, keys: Iterable[str]) -> None:
        with self.lock:
            for changes in self._watching:
                changes.ids.update(keys)
                changes.any = True


# All registries of a store's space: programs may wrap a vector store twice.
_spaces: weakref.WeakKeyDictionary[Store, dict[str, _ChangesOfSpace]] = weakref.WeakKeyDictionary()


def _changes_of(store: Store, space: str) -> _ChangesOfSpace:
    with _lock:
        return _spaces.setdefault(store, {}).setdefault(space, _ChangesOfSpace())


# -- the workspace of an LLM object, URL or engine --------------------------------------------------------------------

_lock = threading.Lock()
_by_server: dict[tuple[str, str | None, str | None, str], Workspace] = {}
# A workspace keeps its engine alive, so that an id identifies one engine as long as its entry is here.
_by_engine: weakref.WeakValueDictionary[tuple[int, str], Workspace] = weakref.WeakValueDictionary()

# Where the frameworks' OpenAI clients keep their server, key and model.
_URLS = ("openai_api_base", "api_base", "base_url")
_KEYS = ("openai_api_key", "api_key")
_MODELS = ("model_name", "model")
# LLM classes by the package that defines them: langchain_ollama, llama_index.llms.ollama, ...
_LLM_PACKAGES = re.compile(r"(?:llama_index\.llms\.|langchain_(?!core|classic|community))(\w+)")
_VLLM_CLIENTS = {"openai", "openai_like"}  # also what others derive from them: a server decides what it can
_HOSTED = (  # services that run no connector of ours
    "openai.com",
    "openai.azure.com",
    "anthropic.com",
    "googleapis.com",
    "mistral.ai",
    "deepseek.com",
    "groq.com",
    "openrouter.ai",
    "together.xyz",
    "fireworks.ai",
)


def as_workspace(source: Any, *, store: str | Path | None = None, model: str | None = None) -> Workspace:
    """Return the workspace that vector store, retriever and answers share; the same source gives the same one.

    All of them then build the same prompts, so that a question finds the KV that was computed at ingestion.

    Args:
        source: A Workspace; an engine; the URL of a vLLM server; or an LLM object that has one (langchain_openai's
            OpenAI and ChatOpenAI, LlamaIndex's OpenAILike). Its API key goes to the server that it names, nowhere else.
        store: Folder of the registry; None: from the settings (LMCACHE_RAG_STORE, or lmcache-rag-store).
        model: Name or folder of the model, if its tokenizer cannot be found by the server's name of it.

    Raises:
        ConfigError: The source is something else, or an LLM object without the URL of a vLLM server.
        EngineUnavailableError: The server cannot be reached.
        EngineError: It serves another model.
    """
    if isinstance(source, Workspace):
        return source
    folder = str(Settings.load(store).store.resolve())
    if isinstance(source, str):
        return _for_server(source, None, model, folder)
    if isinstance(source, Engine):
        with _lock:
            workspace = _by_engine.get((id(source), folder))
            if workspace is None:
                workspace = _by_engine[id(source), folder] = Workspace.open(folder, engine=source)
            return workspace
    url = server_url_of(source)
    return _for_server(url, _attribute(source, _KEYS), model or _attribute(source, _MODELS), folder)


def server_url_of(llm: Any) -> str:
    """Return the server that an LLM object of a framework calls.

    Raises:
        ConfigError: It is not a client of a vLLM server, as far as its class and URL show.
    """
    url, kind = _attribute(llm, _URLS), type(llm)
    others = [match[1] for cls in kind.__mro__ if (match := _LLM_PACKAGES.match(cls.__module__))]
    host = urlsplit(str(url)).hostname or "" if url else ""
    why = ""
    if others and not _VLLM_CLIENTS & set(others):
        other = others[0].replace("_", "-")
        why = (
            ": it does not use vLLM's OpenAI server" if other == "vllm" else f": it is the client of another ({other})"
        )
    elif any(host == name or host.endswith(f".{name}") for name in _HOSTED):
        why = f": it calls {host}"
    elif url:
        return str(url)
    raise ConfigError(
        f"{kind.__name__} has no vLLM server URL{why}. Only vLLM with this library's connector, and the embedded "
        "engine, reuse the KV of passages.",
        remedy='Start "lmcache-rag serve MODEL" and give the client of that server: OpenAILike(model="MODEL", '
        'api_base="http://localhost:8000/v1", api_key="none") in LlamaIndex, ChatOpenAI(model="MODEL", '
        'base_url="http://localhost:8000/v1", api_key="none") in LangChain, or its URL. Without a server, give '
        'Workspace.open("my-store", model="MODEL"), which answers in this process.',
    )


def _for_server(url: str, key: Any, model: str | None, store: str) -> Workspace:
    from lmcache_rag.credentials import ingest_key_for
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.engines.vllm_client import server_urls

    secret: Callable[[], str] | None = getattr(key, "get_secret_value", None)
    api_key = secret() if secret else key
    name = (",".join(server_urls(url)), api_key if isinstance(api_key, str) else None, model, store)
    with _lock:
        if name in _by_server and not _is_current(_by_server[name]):
            _by_server.pop(name).engine.close()
        if name not in _by_server:
            settings = Settings.load(store)
            engine = VLLMEngine(
                name[0],
                model,
                api_key=name[1],
                ingest_key=ingest_key_for(settings),
                concurrency=settings.ingest_in_flight,
            )
            _by_server[name] = Workspace.open(store, engine=engine)
        return _by_server[name]


def _is_current(workspace: Workspace) -> bool:
    """Return whether the server still serves the same model. A server that is down may come back with it."""
    engine: Any = workspace.engine
    try:
        engine.check()
    except EngineUnavailableError:
        return True
    except EngineError:
        return False
    return True


def _attribute(source: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(source, name, None)
        if value:
            return value
    return None
