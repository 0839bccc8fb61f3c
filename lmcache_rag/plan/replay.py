"""Send a trace to a real server, and compare the hit rate that was predicted with the one that was measured.

The prompts are made of random tokens, the same ones for equal names of chunks: what a cache holds depends on which
tokens are equal, not on what they say. So no text leaves the trace, and none is needed. Each replay draws other tokens,
so that nothing is cached before.

A server that blends is asked prefix ⧺ chunks ⧺ question, and then given the chunks that it missed, as with lazy fill.
Of one that does not, such as vLLM on a CPU, only exact prefixes can be found: a chunk is another one after others.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lmcache_rag import protocol
from lmcache_rag.errors import EngineError
from lmcache_rag.plan.cache import Found, Place, Workload, simulate
from lmcache_rag.plan.geometry import Geometry, objects

if TYPE_CHECKING:
    from lmcache_rag.engines.vllm_client import VLLMClient

IDS: Final = range(300, 15_000)  # ids of plain text in the usual vocabularies; none of them special
QUESTION: Final = 7  # tokens; less than an LMCache chunk, so that nothing of them is stored
WITHIN: Final = 0.03  # predicted and measured hit rates should differ by no more
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """What a server says of itself.

    Attributes:
        model: The model's name in requests.
        chunk: Tokens of its LMCache chunks.
        blends: Whether it blends.
        context: Longest prompt with its answer, in tokens; 0: unknown.
        gpu_tokens: Tokens that vLLM's own prefix cache holds; 0: it is off, or unknown.
    """

    model: str
    chunk: int
    blends: bool
    context: int = 0
    gpu_tokens: int = 0

    @classmethod
    def of(cls, client: VLLMClient) -> Server:
        """Ask a server.

        Raises:
            EngineError: It runs without our connector, so that its answers do not say what was reused.
            EngineUnavailableError: It cannot be reached.
        """
        served = client.served_model(None)
        metrics = client.metrics()
        found = _ask(client, served.name, _ids("", "probe", 2 * protocol.LMCACHE_CHUNK), {}, 0)
        info = dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if (match := _CACHE_INFO.search(metrics)) else {}
        cached = info.get("enable_prefix_caching") == "True"
        blocks = [info.get(name, "") for name in ("num_gpu_blocks", "block_size")]
        tokens = int(blocks[0]) * int(blocks[1]) if cached and all(map(str.isdigit, blocks)) else 0
        return cls(
            served.name,
            served.chunk or protocol.LMCACHE_CHUNK,
            found.get(protocol.CAN_BLEND) is not False,
            served.context_length,
            tokens,
        )


@dataclass(frozen=True)
class Replayed:
    """The comparison.

    Attributes:
        requests: Requests that were sent.
        predicted: Share of the chunks' tokens, in whole LMCache chunks, that the simulation found.
        measured: The share that the server found.
        refused: LMCache chunks that, by the simulation, were not stored since the memory was full.
        blends: Whether the server blends; else exact prefixes are compared.
        seconds: How long it took.
        left_out: Requests that are longer than the model's context.
    """

    requests: int
    predicted: float
    measured: float
    refused: int
    blends: bool
    seconds: float
    left_out: int = 0

    @property
    def difference(self) -> float:
        """Measured minus predicted."""
        return self.measured - self.predicted

    @property
    def agrees(self) -> bool:
        """Whether they differ by at most WITHIN."""
        return abs(self.difference) <= WITHIN


def replay(
    client: VLLMClient,
    server: Server,
    requests: Sequence[tuple[Sequence[str], Sequence[int]]],
    model: Geometry,
    *,
    memory_bytes: int,
    tiers: Sequence[Place] = (),
    retain: bool = True,
    per_second: float = 0.0,
    seed: str = "",
    on_request: Callable[[int, int], None] | None = None,
) -> Replayed:
    """Send requests one after the other, and simulate them.

    Of the answers the simulation knows only when the next request began: LMCache evicts once a second.

    Args:
        client: The server's client.
        server: What it says of itself.
        requests: (names, tokens) of each request's chunks.
        model: The size of its KV.
        memory_bytes: LMCache's memory (`--l1-gb`).
        tiers: Its second tiers.
        retain: What is read from one stays in memory, as with `lmcache-rag serve`.
        per_second: Requests a second; 0: as fast as they are answered.
        seed: Draws the tokens; "": others each time.
        on_request: Called with (done, all) after each.

    Raises:
        EngineError: The server refuses a request.
        EngineUnavailableError: It cannot be reached.
    """
    seed = seed or str(time.time_ns())
    chunk, fitting = server.chunk, []
    for names, tokens in requests:
        kept = [(name, objects(count, chunk)) for name, count in zip(names, tokens, strict=True) if count >= chunk]
        length = chunk * (1 + sum(size for _, size in kept)) + QUESTION + 1
        if kept and (not server.context or length < server.context):
            fitting.append((tuple(name for name, _ in kept), tuple(size for _, size in kept)))
    prefix = _ids(seed, "prefix", chunk)
    begin, found, asked, times = time.monotonic(), 0, 0, []
    for at, (names, sizes) in enumerate(fitting):
        if per_second:
            time.sleep(max(begin + at / per_second - time.monotonic(), 0))
        times.append(time.monotonic())
        unique = dict(zip(names, sizes, strict=True))
        chunks = {name: _ids(seed, name, size * chunk) for name, size in unique.items()}
        question = _ids(seed, f"question {at}", QUESTION)
        prompt = [*prefix, *(token for ids in chunks.values() for token in ids), *question]
        statistics = _ask(client, server.model, prompt, {protocol.PREFIX: chunk}, chunk)
        reused = sum(int(statistics.get(name, 0)) for name in ("prefix_tokens", "reused_tokens", "recomputed_tokens"))
        whole = sum(map(len, chunks.values()))
        found, asked = found + min(max(reused - chunk, 0), whole), asked + whole
        if server.blends and reused - chunk < whole:
            _ingest(client, server, prefix, chunks.values())
        if on_request:
            on_request(at + 1, len(fitting))
    predicted = predict(fitting, server, model, memory_bytes=memory_bytes, tiers=tiers, retain=retain, times=times)
    return Replayed(
        len(fitting),
        predicted.rate,
        found / asked if asked else 0.0,
        predicted.refused,
        server.blends,
        time.monotonic() - begin,
        len(requests) - len(fitting),
    )


def predict(
    requests: Iterable[tuple[Sequence[str], Sequence[int]]],
    server: Server,
    model: Geometry,
    *,
    memory_bytes: int,
    tiers: Sequence[Place] = (),
    retain: bool = True,
    times: Sequence[float] = (),
) -> Found:
    """What the simulation finds of requests (names, LMCache chunks) that begin at these times, in seconds."""
    each = model.object_bytes(server.chunk)
    return simulate(
        Workload.of(requests, chained=not server.blends),
        memory_bytes // each,
        tiers,
        gpu=server.gpu_tokens // server.chunk,
        retain=retain,
        times=times,
        shared=1,
    )


def _ingest(client: VLLMClient, server: Server, prefix: Sequence[int], chunks: Iterable[Sequence[int]]) -> None:
    """Have the KV of chunks computed; those that the server has already cost it a look-up."""
    for ids in chunks:
        params = {protocol.INGEST: True, protocol.PREFIX: len(prefix), protocol.BLEND: "off"}
        _ask(client, server.model, [*prefix, *ids], params, 0)


def _ask(client: VLLMClient, model: str, prompt: Sequence[int], params: dict[str, Any], prefix: int) -> dict[str, Any]:
    """The reuse statistics of an answer of one token."""
    request = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": 1,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "kv_transfer_params": params},
    }
    response = client.complete(request, ingest=protocol.ingests(params))
    found = protocol.answer_statistics(response)
    if found is None:
        raise EngineError(
            "The server's answers have no statistics: it runs without lmcache-rag's connector.",
            remedy="Start it by lmcache-rag serve.",
        )
    return found


def _ids(seed: str, name: str, count: int) -> list[int]:
    """Random token ids, the same for the same names."""
    dice = random.Random(hashlib.sha256(f"{seed}\0{name}".encode()).digest())  # noqa: S311 - not a secret
    return dice.choices(IDS, k=count)
