"""Whatever a user has in hand (an LLM object of a framework, a URL, an engine, a workspace) as one workspace."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache_rag.engines.base import Engine
from lmcache_rag.errors import ConfigError, EngineError, EngineUnavailableError
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

_lock = threading.Lock()
_by_server: dict[tuple[str, str | None, str | None, str], Workspace] = {}
# A workspace keeps its engine alive, so an id stands for one engine as long as its entry is here.
_by_engine: weakref.WeakValueDictionary[tuple[int, str], Workspace] = weakref.WeakValueDictionary()

# Where the frameworks' OpenAI clients keep their server, key and model.
_URLS = ("openai_api_base", "api_base", "base_url")
_KEYS = ("openai_api_key", "api_key")
_MODELS = ("model_name", "model")


def as_workspace(source: Any, *, store: str | Path | None = None, model: str | None = None) -> Workspace:
    """The workspace that vector store, retriever and answers share; the same source gives the same one.

    So all of them make the same prompts, and what was computed at ingestion is found by the question.

    Args:
        source: A Workspace; an engine; the URL of a vLLM server; or an LLM object that has one (langchain_openai's
            OpenAI and ChatOpenAI, LlamaIndex's OpenAILike). Its API key goes to the server that it names, nowhere else.
        store: Folder of the registry; None: as the settings say (LMCACHE_RAG_STORE, or lmcache-rag-store).
        model: Name or folder of the model, where the server's own name does not lead to its tokenizer.

    Raises:
        ConfigError: The source is something else, or an LLM object without a server of its own.
        EngineUnavailableError: The server cannot be reached.
        EngineError: It serves another model.
    """
    if isinstance(source, Workspace):
        return source
    place = str(Settings.load(store).store.resolve())
    if isinstance(source, str):
        return _served(source, None, model, place)
    if isinstance(source, Engine):
        with _lock:
            workspace = _by_engine.get((id(source), place))
            if workspace is None:
                workspace = _by_engine[id(source), place] = Workspace.open(place, engine=source)
            return workspace
    url = _attribute(source, _URLS)
    if url is None or "api.openai.com" in str(url):
        raise ConfigError(
            f"{type(source).__name__} names no vLLM server.",
            remedy="Give a langchain_openai or OpenAILike object with its URL, a URL, an engine or a Workspace.",
        )
    return _served(str(url), _attribute(source, _KEYS), model or _attribute(source, _MODELS), place)


def _served(url: str, key: Any, model: str | None, store: str) -> Workspace:
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.engines.vllm_client import server_urls
    from lmcache_rag.ingest_key import key_of

    secret: Callable[[], str] | None = getattr(key, "get_secret_value", None)
    word = secret() if secret else key
    name = (",".join(server_urls(url)), word if isinstance(word, str) else None, model, store)
    with _lock:
        if name in _by_server and not _still_serves(_by_server[name]):
            _by_server.pop(name).engine.close()
        if name not in _by_server:
            engine = VLLMEngine(name[0], model, api_key=name[1], ingest_key=key_of(Settings.load(store)))
            _by_server[name] = Workspace.open(store, engine=engine)
        return _by_server[name]


def _still_serves(workspace: Workspace) -> bool:
    """Whether a server was not started anew with another model. One that is down may come back as it was."""
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
