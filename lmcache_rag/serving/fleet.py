"""Checks of `lmcache-rag doctor` over several servers: whether they can share KV, and whether one finds another's.

Nothing here makes an answer wrong: KV that does not fit is under another name. What differs makes servers compute, each
for itself, what one of them has already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmcache_rag import protocol
from lmcache_rag.engines.vllm_client import ModelCard, VLLMClient
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.protocol import ALWAYS_BLEND, INGEST, MAX_OFFLOAD_TOKENS, NO_BLEND
from lmcache_rag.serving.doctor import (
    PAUSE_S,
    Prompts,
    ask,
    chunk_size,
    examine,
    found_again,
    http_host,
)
from lmcache_rag.serving.lmcache_checks import answers, get_json, get_text
from lmcache_rag.serving.machine import Check

SHARED_S = 15.0  # in which others find what one ingested: stores, the tier, and the coordinator's events take 2 or 3
TRIES = 8
FACTS_S = 3.0  # a server publishes them with its first request


class Fact(NamedTuple):
    """Something that servers have to have in common.

    Attributes:
        words: What it is.
        effect: What a difference does.
        remedy: What to do about it.
        harmless: Whether servers share KV all the same.
    """

    words: str
    effect: str
    remedy: str
    harmless: bool = False


_NOTHING = "none finds KV of the others"
_MODEL = "Serve the same files, or the same revision, with the same options."
FACTS: Mapping[str, Fact] = {
    "model": Fact("the model's name", "a client does not take them for one engine", "Serve one model, by one name."),
    "chunk": Fact("LMCache's chunk size", f"{_NOTHING}, and a client refuses them", "Start all with one --chunk-size."),
    "weights": Fact("the model's weights (digest)", _NOTHING, _MODEL),
    "config": Fact("the model's configuration or data type (digest)", _NOTHING, _MODEL),
    "layout": Fact(
        "the layout of KV (digest of vLLM's version, device, block size, parallel sizes, attention)",
        _NOTHING,
        "Start all with one version of vLLM, on GPUs of one kind, with the same options.",
    ),
    "secret": Fact("the secret (digest)", _NOTHING, "Copy one secret to all: --secret-file."),
    "prefix_tokens": Fact(
        "the prefix of clients that name none (tokens)",
        "these share no KV from one server to another; clients of lmcache-rag do",
        "Start all with one --prefix-tokens.",
        harmless=True,
    ),
    "hash": Fact(
        "LMCache's hash or its seed (digest)", _NOTHING, "Leave --hash-algorithm alone, or set one PYTHONHASHSEED."
    ),
    "vllm": Fact("vLLM's version", "KV is stored once for each version", "Install one version.", harmless=True),
    "lmcache": Fact("LMCache's version", "0.5.6 and 0.5.7 do not work together", "Install one version.", harmless=True),
    "lmcache_rag": Fact("the version of lmcache-rag", "see its changelog", "Install one version.", harmless=True),
}


def examine_all(
    urls: Sequence[str],
    *,
    lmcache_urls: Sequence[str] = (),
    coordinator: str = "",
    model: str = "",
    api_key: str = "",
    ingest_key: str = "",
) -> Iterator[Check]:
    """Check each server as `doctor.examine` does, and then all of them together.

    Args:
        urls: Addresses of vLLM servers.
        lmcache_urls: HTTP addresses of LMCache servers: of each vLLM server, in the same order, or some of them.
        coordinator: Address of LMCache's coordinator; it names more of these.
        model: See `doctor.examine`.
        api_key: vLLM's key, of all servers, or "".
        ingest_key: Likewise.

    Raises:
        ConfigError: An address is not valid.
    """
    for url in (*urls, *lmcache_urls, *([coordinator] if coordinator else [])):
        http_host(url)
    keys = {"api_key": api_key, "ingest_key": ingest_key}
    several = len(urls) > 1
    for number, url in enumerate(urls or [""]):
        own = lmcache_urls[number] if number < len(lmcache_urls) else ""
        for check in examine(url, lmcache_url=own, model=model, alone=not number, **keys):
            yield check.at(url) if several else check
    pages = {url.rstrip("/"): get_text(url.rstrip("/"), "/metrics") for url in lmcache_urls}
    if coordinator:
        check, known = coordinator_check(coordinator.rstrip("/"))
        yield check
        # Without the key: a coordinator has none itself, and anyone may have told it these addresses.
        pages |= {url: page for url in known if url not in pages and (page := get_text(url, "/metrics", key=False))}
    if several:
        yield from _together(urls, shared=bool(coordinator), **keys)
    if len(pages) > 1:
        yield compare("LMCache servers", {url: protocol.lmcache_facts(page) for url, page in pages.items()})


def _together(urls: Sequence[str], *, shared: bool, api_key: str, ingest_key: str) -> Iterator[Check]:
    servers = [VLLMClient(url, attempts=1, api_key=api_key, ingest_key=ingest_key) for url in urls]
    try:
        there = [(server, card) for server in servers if (card := _card(server)) is not None]
        if len(there) < 2:
            yield Check("Servers", "skipped", "fewer than two answer")
            return
        yield compare("Servers", {server.url: _facts(server, card) for server, card in there})
        yield from share_checks(there, required=shared)
    finally:
        for server in servers:
            server.close()


def _card(server: VLLMClient) -> ModelCard | None:
    try:
        return server.first_model()
    except LMCacheRAGError:
        return None  # a check of its own reported it


def _facts(server: VLLMClient, card: ModelCard) -> dict[str, str]:
    end = time.monotonic() + FACTS_S
    while not (found := protocol.server_facts(server.metrics())) and time.monotonic() < end:
        time.sleep(0.2)
    return found and {"model": card.name, **found}


def compare(name: str, servers: Mapping[str, Mapping[str, str]]) -> Check:
    """What servers do not have in common, in one line, and what that does.

    Args:
        name: Of the check.
        servers: For each address what the server published; nothing if it did not.
    """
    silent = [url for url, found in servers.items() if not found]
    if silent:
        remedy = "Update lmcache-rag there, and start vLLM without --disable-log-stats."
        return Check(name, "warning", f"{', '.join(silent)} does not publish what could be compared", remedy)
    differ: dict[str, str] = {}
    same: list[str] = []
    for fact, about in FACTS.items():
        values: dict[str, list[str]] = {}
        for url, found in servers.items():
            if fact in found:
                values.setdefault(found[fact], []).append(url)
        if len(values) > 1:
            parts = "; ".join(f"{value} at {', '.join(where)}" for value, where in values.items())
            differ[fact] = f"{about.words} differs ({parts}): {about.effect}"
        elif values:
            same.append(f"{about.words} {next(iter(values))}")
    if not differ:
        return Check(name, "ok", f"{len(servers)} have in common {', '.join(same)}")
    failed = not all(FACTS[fact].harmless for fact in differ)
    remedies = " ".join(dict.fromkeys(FACTS[fact].remedy for fact in differ))
    return Check(name, "failed" if failed else "warning", ". ".join(differ.values()), remedies)


def coordinator_check(url: str) -> tuple[Check, list[str]]:
    """Whether a coordinator answers: (check, HTTP addresses of the LMCache servers that it knows)."""
    remedy = "lmcache-rag serve MODEL --coordinator start starts one; without, each server blends what it knows."
    if not answers(url, "/healthz") or (document := get_json(url, "/instances", key=False)) is None:
        return Check("Coordinator", "failed", f"{url} does not answer", remedy), []
    known = {str(each.get("instance_id")): each for each in document.get("instances") or ()}
    if not known:
        remedy = "Start servers with --coordinator and its address; they register within some seconds."
        return Check("Coordinator", "warning", f"{url} answers, and knows no server", remedy), []
    stats = get_json(url, "/directory/stats", key=False) or {}
    chunks = (stats.get("blend") or {}).get("num_chunks")
    result = f"{url} knows {len(known)} servers ({', '.join(sorted(known))})"
    result += f", and {chunks:,} chunks" if isinstance(chunks, int) else ""
    places = [f"http://{each.get('ip')}:{each.get('http_port')}" for each in known.values()]
    return Check("Coordinator", "ok", result), places


def share_checks(
    servers: Sequence[tuple[VLLMClient, ModelCard]],
    *,
    required: bool,
    pause: Callable[[float], Any] = time.sleep,
) -> Iterator[Check]:
    """Whether what the first server ingests is found by each of the others; a check for each of them.

    Args:
        servers: At least two, and their models.
        required: Whether it is a failure if it is not.
        pause: For waiting between two attempts.
    """
    (first, card), *others = servers
    size = chunk_size(first, {}) or protocol.LMCACHE_CHUNK
    for other, served in others:
        name = "Shared KV"
        try:
            found, how = _found_elsewhere((first, card.name), (other, served), size, pause)
        except LMCacheRAGError as problem:
            yield Check(name, "failed", problem.message, problem.remedy)
            continue
        if found:
            result = f"{other.url} found {found:,} tokens that {first.url} had ingested, {how}"
            yield Check(name, "ok", result)
            continue
        remedy = "serve --l2 with one tier for all, --coordinator, and one --secret-file. See also what differs, above."
        result = f"{other.url} does not find what {first.url} ingested: each computes its own KV"
        yield Check(name, "failed" if required else "warning", result, remedy)


def _found_elsewhere(
    first: tuple[VLLMClient, str], other: tuple[VLLMClient, ModelCard], size: int, pause: Callable[[float], Any]
) -> tuple[int, str]:
    """(Tokens that the other server found, how). Waits until stores and reports have arrived.

    Each attempt asks with a prompt that the other server never saw, so that it finds nothing of its own.
    """
    server, served = other
    prompts = [Prompts.draw(size, served.context_length) for _ in range(TRIES)]
    for each in prompts:
        for prompt in each.ingest()[:2]:
            ask(*first, prompt, params={**NO_BLEND, INGEST: True})
    begin = time.monotonic()
    for each in prompts:
        pause(PAUSE_S)
        kept = {MAX_OFFLOAD_TOKENS: 0}
        blended = ask(server, served.name, each.query(2), params={**ALWAYS_BLEND, **kept}).statistics
        if found := found_again(blended):
            return found, "in another order"
        if protocol.cannot_blend(blended) is not None:
            exact = ask(server, served.name, each.ingest()[1], params={**NO_BLEND, **kept}).statistics or {}
            found = int(exact.get("prefix_tokens", 0)) - len(each.prefix)  # the query before began with the prefix
            if found > 0:
                return found, "as exact prefixes"
        if time.monotonic() - begin > SHARED_S:
            break
    return 0, ""
