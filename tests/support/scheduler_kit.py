"""A blend server's books, and requests and look-ups as the connector's scheduler side sees them.

LMCache's look-up is a double that keeps books of its locks as the blend server does.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.metadata import Match
from lmcache_rag.connector.scheduler import BlendScheduler

CHUNK = 16


@dataclass
class Server:
    """The blend server's books. A restart forgets everything; nothing of before is ever answered."""

    held: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # locked prefix chunks by session
    results: set[str] = field(default_factory=set)  # sessions with a look-up's result
    ended: set[str] = field(default_factory=set)
    up: bool = True
    answers: bool = True
    life: int = 0

    def restart(self) -> None:
        self.held.clear()
        self.results.clear()
        self.life += 1

    def give_back(self, session: str, start: int, end: int) -> None:
        if not self.up or session not in self.results:
            return  # as LMCache's: nothing is sent to a dead server, and one without the result gives nothing back
        assert start % CHUNK == end % CHUNK == 0, "the server's handler dies of other numbers, without an answer"
        chunks = set(range(start // CHUNK, end // CHUNK))
        assert chunks <= self.held[session], "a lock was given back twice"
        self.held[session] -= chunks

    def end_session(self, session: str) -> None:
        if self.up:
            assert not self.held[session], "the session's end does not give back locks of exact prefixes"
            self.results.discard(session)
            self.ended.add(session)


@dataclass
class Request:
    """A request as vLLM's scheduler knows it."""

    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None
    cached: tuple[int, tuple[Match, ...]]
    polls: int
    outputs: int
    num_tokens: int = 0
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    computed: int = 0
    runs: bool = False
    hidden: list[int] = field(default_factory=list)
    block_hashes: list[Any] = field(default_factory=list)
    lora_request: Any = None

    @property
    def num_computed_tokens(self) -> int:
        return self.computed

    @property
    def prompt(self) -> int:
        return len(self.prompt_token_ids)


def hash_block(parent: Any, tokens: tuple[int, ...]) -> Any:
    return hash((parent, tokens))


def chunk_hashes(parent: Any, tokens: list[int], block: int) -> list[Any]:
    """Of a chunk's whole blocks, after a block with the hash `parent`."""
    parts = (tuple(tokens[first : first + block]) for first in range(0, len(tokens) - block + 1, block))
    return list(accumulate(parts, hash_block, initial=parent))[1:]


@dataclass(eq=False)
class Block:
    """A block of vLLM's pool."""

    block_id: int
    users: int = 0


class Pool:
    """vLLM's pool of blocks: who uses one keeps it."""

    def __init__(self) -> None:
        self.filed: dict[Any, Block] = {}
        self.blocks: dict[int, Block] = {}
        self.touched: list[Block] = []
        self.made = 0

    def file(self, parent: Any, tokens: list[int], block: int) -> None:
        for block_hash in chunk_hashes(parent, tokens, block):
            if block_hash not in self.filed:
                self.made += 1
                self.filed[block_hash] = self.blocks[self.made] = Block(self.made)

    def evict(self) -> None:
        self.filed = {key: block for key, block in self.filed.items() if block.users}

    def key(self, block_hash: Any) -> Any:
        return block_hash

    def get(self, keys: Any) -> Any:
        return map(self.filed.get, keys)

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.users += 1
            self.touched.append(block)

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            assert block.users > 0, "let go twice"
            block.users -= 1


class PrefixCache:
    """Notes what is hidden of a request."""

    block_size = 8

    def hide(self, request: Any, first_token: int) -> None:
        request.hidden.append(first_token)


class Lookup:
    """A look-up that takes some polls, of the server's life in which it was asked.

    Where it takes any, the server has its locks one poll before its result is seen: the answer is on the way.
    """

    def __init__(self, server: Server, request: Request) -> None:
        self.server, self.request, self.life, self.left = server, request, server.life, request.polls
        self.request_id = request.request_id
        self.result: tuple[int, tuple[Match, ...]] | None = None
        self.closed = self.answered = False

    def poll(self, seconds: float) -> bool:
        assert not self.closed
        if self.result is None and self.server.up and self.server.answers and self.life == self.server.life:
            self.left -= 1
            if self.left <= 0 and not self.answered:
                self.answered = True
                self.server.results.add(self.request.request_id)
                self.server.held[self.request.request_id] = set(range(self.request.cached[0] // CHUNK))
            if self.left < 0:
                self.result = self.request.cached
        return self.result is not None

    def release_prefix(self, start: int, end: int) -> None:
        if self.life == self.server.life:
            self.server.give_back(self.request.request_id, start, end)

    def end_session(self) -> None:
        self.closed = True
        self.server.end_session(self.request.request_id)


class Once:
    """One request in one schedule, with LMCache holding two exact chunks and two matches behind them."""

    MATCHES = (Match(40, 56, 80, 96), Match(60, 76, 96, 112))

    def __init__(self, **options: Any) -> None:
        self.server = Server()
        self.lookups: list[Lookup] = []
        made = ConnectorOptions(**{"least_tokens": 16, "tail_tokens": 0} | options)
        self.side = BlendScheduler(made, CHUNK, self, PrefixCache())

    changed = False  # whether adapters' files have

    def adapter_changed(self, lora_request: Any) -> bool:
        return lora_request is not None and self.changed

    def look_up(self, request: Request) -> Lookup:
        self.lookups.append(Lookup(self.server, request))
        return self.lookups[-1]

    def request(self, name: str = "a", polls: int = 0, cached: Any = (32, MATCHES)) -> Request:
        return Request(name, list(range(100)), None, cached, polls, 0, num_tokens=100)

    def finish(self, request: Request) -> dict[str, Any] | None:
        stats = self.side.finish(request)
        if not self.side.keeps_session(request.request_id):
            self.server.end_session(request.request_id)  # LMCache's own connector, see CacheBlendConnector
        return stats
