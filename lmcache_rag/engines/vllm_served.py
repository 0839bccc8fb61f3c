"""What a vLLM server serves: its model, its version, its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lmcache_rag.engines.vllm_client import Servers
from lmcache_rag.engines.vllm_errors import speaking
from lmcache_rag.errors import EngineError
from lmcache_rag.protocol import chunk_tokens

log = logging.getLogger("lmcache_rag")

STREAMS_TELL = (0, 33)  # first vLLM whose streams carry kv_transfer_params without our plugin
CHAT_TAKES_IDS = (0, 32)  # first whose chat completions take kv_transfer_params.prompt_token_ids
_PROBE = "The KV cache of 12,345 tokens: naïve façade, 日本語.\n\n  def f(x): return x"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of its model.

    Attributes:
        name: By which it is asked for.
        root: Where the server has it from: a Hugging Face name or a folder over there.
        context_length: Most tokens of prompt and answer together.
        streams_tell: Whether its streams carry reuse statistics.
        streams_may_tell: Whether they do if our plugin is loaded there, as it is where our connector runs.
        chat_takes_ids: Whether its chat completions take token ids.
        chunk: Tokens of an LMCache chunk; 0 where the server does not say.
        block: Tokens of a block of vLLM's own prefix cache; 0 where the server does not say.
        local: A folder here that was named for it; "" where none was.
    """

    name: str
    root: str
    context_length: int
    streams_tell: bool
    streams_may_tell: bool
    chat_takes_ids: bool
    chunk: int = 0
    block: int = 0
    local: str = ""


def served_model(servers: Servers, wanted: str | None) -> ServedModel:
    """The one model that all the servers serve.

    Args:
        servers: The servers.
        wanted: If given, it must be the model's name or root, or a folder here whose name they end with.

    Raises:
        EngineError: A server serves another model than wanted, or than the first server, or is no vLLM.
        EngineUnavailableError: It cannot be reached.
    """
    first, *others = [_served(servers, url, wanted) for url in servers.urls]
    for url, other in zip(servers.urls[1:], others, strict=True):
        if (other.name, other.root) != (first.name, first.root):
            raise EngineError(
                f"{url} serves {other.name} ({other.root}), {servers.urls[0]} serves {first.name} ({first.root}).",
                remedy="Name servers of the same model.",
            )
        if other.chunk and first.chunk and other.chunk != first.chunk:
            raise EngineError(
                f"{url} keeps KV in chunks of {other.chunk} tokens, {servers.urls[0]} of {first.chunk}.",
                remedy="Start them with the same --chunk-size.",
            )
    every = [first, *others]
    return replace(
        first,
        context_length=min(each.context_length for each in every),
        streams_tell=all(each.streams_tell for each in every),
        streams_may_tell=all(each.streams_may_tell for each in every),
        chat_takes_ids=all(each.chat_takes_ids for each in every),
        chunk=max(each.chunk for each in every),
        # Where they differ, the smaller: a chunk that is held may then count as missing, and is sent once more.
        block=min(each.block for each in every),
    )


def served_names(servers: Servers) -> list[str]:
    """Names of the models that the first server serves, adapters left out.

    Raises:
        EngineUnavailableError: It cannot be reached.
        EngineError: It is no vLLM.
    """
    url = servers.urls[0]
    with speaking(url, servers.timeout):
        cards = list(servers.client(url).models.list())
    return list(dict.fromkeys(card.id for card in cards if getattr(card, "parent", None) is None))


def check_tokenizer(servers: Servers, model: str, tokenizer: Any) -> None:
    """See that the servers tokenize as we do, where they have an endpoint for that.

    Raises:
        EngineError: One does not: prompts would mean something else over there.
    """
    body = {"model": model, "prompt": _PROBE, "add_special_tokens": False}
    for url in servers.urls:
        answer = _aside(partial(servers.client(url).post, f"{url}/tokenize", body=body, cast_to=object))
        theirs = answer.get("tokens")
        if theirs is not None and theirs != list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]):
            raise EngineError(
                f"The tokenizer of {model} on {url} is not the one found here.",
                remedy="Name the very model that the server runs, by its Hugging Face name or a folder (--model).",
            )


def _served(servers: Servers, url: str, wanted: str | None) -> ServedModel:
    local = Path(wanted).resolve() if wanted and Path(wanted).is_dir() else None
    with speaking(url, servers.timeout):
        cards = list(servers.client(url).models.list())
    facts = [(card.id, str(getattr(card, "root", None) or card.id), card) for card in cards]
    if wanted:
        facts = [fact for fact in facts if _is(wanted, local, fact[:2])]
    facts.sort(key=lambda fact: getattr(fact[2], "parent", None) is not None)  # adapters come last
    if not facts:
        raise EngineError(
            f"{url} serves {', '.join(card.id for card in cards) or 'nothing'}, not {wanted or 'a model'}.",
            remedy="Name the server's model by --model, or another server by --engine.",
        )
    name, root, card = facts[0]
    length = getattr(card, "max_model_len", None)
    if not length:
        raise EngineError(
            f"{url} does not say how long its context is.", remedy="Name a vLLM server: lmcache-rag serve MODEL."
        )
    version, metrics = _version(servers, url), _metrics(servers, url)
    chunk = chunk_tokens(metrics)
    return ServedModel(
        name,
        root,
        int(length),
        streams_tell=version >= STREAMS_TELL,
        streams_may_tell=version >= STREAMS_TELL or chunk > 0,
        chat_takes_ids=version >= CHAT_TAKES_IDS,
        chunk=chunk,
        block=vllm_block(metrics),
        local=str(local or ""),
    )


def _is(wanted: str, local: Path | None, names: Sequence[str]) -> bool:
    return wanted in names or (local is not None and local.name in [Path(name).name for name in names])


def _version(servers: Servers, url: str) -> tuple[int, ...]:
    answer = _aside(partial(servers.client(url).get, f"{url}/version", cast_to=object))
    version = re.match(r"(\d+)\.(\d+)", str(answer.get("version", "")))
    return (int(version[1]), int(version[2])) if version else (0, 0)


def _metrics(servers: Servers, url: str) -> str:
    return str(_ask(partial(servers.client(url).get, f"{url}/metrics", cast_to=str)) or "")


def vllm_block(metrics: str) -> int:
    """Tokens of a block of vLLM's prefix cache, by the text of its /metrics; 0 when it does not say."""
    found = re.search(r'^vllm:cache_config_info\{(?:[^}]*,)?block_size="(\d+)"', metrics, re.MULTILINE)
    return int(found[1]) if found else 0


def _aside(ask: Callable[[], object]) -> dict[str, Any]:
    answer = _ask(ask)
    return answer if isinstance(answer, dict) else {}


def _ask(ask: Callable[[], object]) -> object:
    """Ask for something that a server need not have."""
    try:
        return ask()
    except Exception as problem:  # what it is shows as soon as it matters
        log.debug("%s: %s", type(problem).__name__, problem)
        return None
