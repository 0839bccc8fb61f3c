"""Ingested chunks whose exact KV is still resident in vLLM's own block pool on the GPU.

A copy on the GPU instead of a load from LMCache. Blocks of finished requests stay in vLLM's pool until they are
evicted, cached under hashes of everything before them; so the blocks of an ingested chunk are found when it is known
where in a prompt the chunks are. A client sends that in kv_transfer_params, see lmcache_rag.protocol.CHUNKS.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol

from lmcache_rag.connector import vllm_internals
from lmcache_rag.connector.metadata import Match
from lmcache_rag.protocol import chunk_start, named_prefix, named_spans

_ATTEMPTS = 2
_match: Callable[[tuple[Any, ...]], Match] = partial(tuple.__new__, Match)


class BlockPool(Protocol):
    """The part of vLLM's BlockPool that is used here; see vllm_internals.CachedBlocks."""

    def key(self, block_hash: Any) -> Any:
        """The key under which a block with that hash is cached."""
        ...

    def get(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The block cached under each key; None where there is none."""
        ...

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by their ids."""
        ...

    def touch(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from being evicted."""
        ...

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Release them."""
        ...

    def remove(self, hashes: Iterable[Any]) -> int:
        """Take every block with one of these hashes out of the prefix cache."""
        ...


class PrefixCache:
    """Hides requests' KV from vLLM's prefix cache.

    Args:
        block_size: Tokens of a block that vLLM hashes.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def hide(self, request: Any, first_token: int) -> None:
        """Make a request's blocks from `first_token` on unreachable for other requests."""
        vllm_internals.hide_from_prefix_cache(request, first_token, self.block_size)


class UncomputedBlocks:
    """Blocks that were cached in the present step: their KV is not computed yet, though vLLM's prefix cache has them.

    vLLM caches a block under its hash when it schedules the block's tokens; the step's forward pass computes them. For
    vLLM that is early enough: another request that shares the block reads it in that pass at the earliest. A blend may
    run before the pass.

    Args:
        pool: The pool.
        block: Tokens in a block.
    """

    def __init__(self, pool: BlockPool, block: int) -> None:
        self._pool, self._block = pool, block
        self._ids: set[int] = set()

    def add(self, block_id: int) -> None:
        """A block was cached."""
        self._ids.add(block_id)

    def on_step(self) -> None:
        """The next step begins: blocks cached so far are computed before any requests of this step."""
        self._ids.clear()

    def computed(self, keys: Iterable[Any]) -> list[int]:
        """Ids of the blocks under these keys, up to the first that is missing or whose KV is not computed yet."""
        uncomputed, found = self._ids, []
        for block in self._pool.get(keys):
            if block is None or block.block_id in uncomputed:
                break
            found.append(block.block_id)
        return found

    def pending(self, hashes: Sequence[Any], tokens: int) -> bool:
        """Whether KV of a request's first tokens, which vLLM found in its cache, is not computed before this step."""
        if not self._ids:
            return False
        found = self._pool.get(map(self._pool.key, hashes[: tokens // self._block]))
        return any(block.block_id in self._ids for block in found if block is not None)


class ChunkLocation(NamedTuple):
    """Where a chunk is in a prompt, where it was when it was computed, and the keys of its blocks."""

    start: int
    end: int
    old_start: int
    keys: tuple[Any, ...]


class ResidentChunks:
    """Finds ingested chunks in vLLM's block pool.

    Only chunks that were ingested by this vLLM are found: their block hashes are known, so that nothing is hashed block
    by block, and a chunk in a query costs one hash of its tokens.

    Args:
        pool: The pool.
        block: Tokens in a block.
        uncomputed: Blocks that were cached in this step; these are not found.
        max_tokens: How many tokens of chunks are known; more than the pool holds would be of no use.
    """

    def __init__(
        self, pool: BlockPool, block: int, *, uncomputed: UncomputedBlocks | None = None, max_tokens: int = 1 << 22
    ) -> None:
        self._pool, self.block, self._max_tokens = pool, block, max_tokens
        self._known: OrderedDict[tuple[Any, bytes], tuple[int, tuple[Any, ...]]] = OrderedDict()  # (start, keys)
        self._tokens = 0  # of the blocks that are known
        self._digests: Counter[bytes] = Counter()  # of the chunks that are known, after whatever prefix
        self._pinned: dict[str, list[Any]] = {}
        self._uncomputed = UncomputedBlocks(pool, block) if uncomputed is None else uncomputed

    def remember(self, tokens: array[int], hashes: Sequence[Any], prefix: int, start: int = 0) -> None:
        """Remember a chunk, by the request that computed it.

        Args:
            tokens: Its prompt, prefix + neutral passages + chunk, as 64-bit numbers.
            hashes: The prompt's block hashes, as vLLM made them.
            prefix: Tokens of the prefix, which fills whole blocks.
            start: Where the chunk begins, at a block's beginning; 0: right after the prefix.
        """
        start = start or prefix
        before = self._blocks_before(hashes, prefix)
        own = hashes[start // self.block : len(tokens) // self.block]
        if not before or not own or start % self.block:
            return
        name = self._name(hashes[before - 1], tokens[start:])
        self._forget(name)
        self._known[name] = start, tuple(map(self._pool.key, own))
        self._digests[name[1]] += 1
        self._tokens += len(own) * self.block
        while self._tokens > self._max_tokens and len(self._known) > 1:
            self._forget(next(iter(self._known)))

    def forget(self, tokens: array[int], hashes: Sequence[Any], prefix: int, start: int = 0) -> None:
        """Forget a chunk; the arguments are those of `remember`."""
        if before := self._blocks_before(hashes, prefix):
            self._forget(self._name(hashes[before - 1], tokens[start or prefix :]))

    def locate(
        self, tokens: array[int], hashes: Sequence[Any], spans: Sequence[tuple[int, int]]
    ) -> list[ChunkLocation]:
        """The keys of the blocks of those spans that are known.

        Args:
            tokens: The prompt, as 64-bit numbers.
            hashes: The prompt's own block hashes, as vLLM made them.
            spans: Where the chunks are; the prefix ends where the first begins, and fills whole blocks.
        """
        prefix = spans[0][0] if spans else 0
        before = self._blocks_before(hashes, prefix) if self._known else 0
        if not before:
            return []
        parent, locations = hashes[before - 1], []
        for start, end in spans:
            name = self._name(parent, tokens[start:end])
            if (known := self._known.get(name)) is not None:
                self._known.move_to_end(name)
                locations.append(ChunkLocation(start, end, *known))
        return locations

    def _blocks_before(self, hashes: Sequence[Any], prefix: int) -> int:
        """Blocks of the prefix; 0 where there is none that can be known."""
        return prefix // self.block if prefix % self.block == 0 and prefix // self.block <= len(hashes) else 0

    def _name(self, parent: Any, tokens: array[int]) -> tuple[Any, bytes]:
        return parent, _digest(tokens)

    def _forget(self, name: tuple[Any, bytes]) -> None:
        if known := self._known.pop(name, None):
            self._tokens -= len(known[1]) * self.block
            self._digests[name[1]] -= 1
            if not self._digests[name[1]]:
                del self._digests[name[1]]

    def known_tokens(self, tokens: array[int], spans: Sequence[tuple[int, int]]) -> int:
        """How many tokens of these spans were ingested after some prefix; may be gone. Other threads may call it."""
        return sum(end - start for start, end in spans if self._digests and _digest(tokens[start:end]) in self._digests)

    @property
    def tokens(self) -> int:
        """Tokens of the blocks that are known."""
        return self._tokens

    def find(self, locations: Sequence[ChunkLocation]) -> list[Match]:
        """Resident blocks that hold the chunks' beginnings, each with the place where it was computed."""
        found: list[Match] = []
        for start, _, old, keys in locations:
            blocks, size = self._uncomputed.computed(keys), self.block
            here, there = (range(at, at + (len(blocks) + 1) * size, size) for at in (start, old))
            # With map and zip, which ends with the blocks: half of the time that 500 calls of Match take.
            found += map(_match, zip(here, here[1:], there, there[1:], repeat(None), blocks, strict=False))
        return found

    def estimate(self, locations: Sequence[ChunkLocation]) -> int:
        """About how many tokens `find` would find, from the last block of each chunk: much faster."""
        return sum(end - start for start, end, _, keys in locations if self._uncomputed.computed(keys[-1:]))

    def pin(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Keep these blocks until they are unpinned; they replace what was pinned for the request before."""
        every = self._pool.blocks
        blocks = [every[number] for number in block_ids]
        self._pool.touch(blocks)
        self.unpin(request_id)
        self._pinned[request_id] = blocks

    def unpin(self, request_id: str) -> None:
        """Release a request's blocks. Safe to call when there are none."""
        blocks = self._pinned.pop(request_id, None)
        if blocks:
            self._pool.free_blocks(blocks[::-1])

    @property
    def pinned(self) -> int:
        """Requests that hold blocks."""
        return len(self._pinned)


@dataclass
class _Request:
    locations: list[ChunkLocation]
    tokens: int  # of all chunks
    attempts: int = 0


@dataclass
class GpuChunks:
    """Resident chunks of the requests in the scheduler, pinned while they are in use.

    Blocks are pinned when they are claimed, since the allocation that follows may evict blocks that no request holds.
    What was claimed and not allocated in the same step is unpinned; after two such steps a request continues without,
    or pins and allocation might wait for each other for ever in a small pool.

    Args:
        resident: Finds the chunks.
        share: Share of a request's chunks that must be resident to skip LMCache's look-up.
    """

    resident: ResidentChunks
    share: float = 0.9
    _requests: dict[str, _Request] = field(default_factory=dict)
    _unallocated: set[str] = field(default_factory=set)  # pinned in this step, not allocated yet

    def on_new_request(self, request: Any, tokens: array[int]) -> None:
        """Note where a new request's chunks are in its prompt."""
        spans = named_spans(request.kv_transfer_params, len(tokens))
        locations = self.resident.locate(tokens, request.block_hashes, spans)
        if locations:
            self._requests[request.request_id] = _Request(locations, sum(end - start for start, end in spans))

    def on_ingested(self, request: Any) -> None:
        """Remember the chunk of an ingestion request that has been computed."""
        prompt = request.prompt_token_ids or ()
        prefix = named_prefix(request.kv_transfer_params, len(prompt))
        if 0 < prefix < len(prompt) <= request.num_computed_tokens:
            start = chunk_start(request.kv_transfer_params, len(prompt))
            self.resident.remember(array("q", prompt), request.block_hashes, prefix, start)

    def seems_enough(self, request: Any) -> bool:
        """Whether so much seems to be resident that a look-up at LMCache is not needed."""
        known = self._requests.get(request.request_id)
        return known is not None and self.resident.estimate(known.locations) >= self.share * known.tokens

    def may_be_enough(self, params: Any, prompt: Sequence[int]) -> bool:
        """Whether `seems_enough` may be true of a request, before its blocks are hashed. Other threads may call it."""
        spans = named_spans(params, len(prompt))
        tokens = sum(end - start for start, end in spans)
        return 0 < self.share * tokens <= self.resident.known_tokens(array("q", prompt), spans)

    def find(self, request: Any) -> list[Match]:
        """The request's resident matches at this time."""
        known = self._requests.get(request.request_id)
        if known is None or known.attempts >= _ATTEMPTS:
            return []
        found = self.resident.find(known.locations)
        if not found:  # evicted: it is not searched for again in each step that the request waits
            del self._requests[request.request_id]
        return found

    def is_enough(self, request: Any, matches: Sequence[Match]) -> bool:
        """Whether so much is resident that a look-up at LMCache is not needed."""
        known = self._requests.get(request.request_id)
        return known is not None and len(matches) * self.resident.block >= self.share * known.tokens

    def claim(self, request_id: str, matches: Sequence[Match]) -> None:
        """Pin the resident ones among the matches that are claimed."""
        blocks = [match.block for match in matches if match.block >= 0]
        if blocks:
            self.resident.pin(request_id, blocks)
            self._unallocated.add(request_id)

    def on_allocated(self, request_id: str) -> None:
        """A plan holds the blocks now, until `unpin`."""
        self._unallocated.discard(request_id)

    def on_step(self) -> None:
        """The next step begins: unpin blocks that were claimed and not allocated."""
        for request_id in self._unallocated:
            self.resident.unpin(request_id)
            if known := self._requests.get(request_id):
                known.attempts += 1
        self._unallocated.clear()

    def unpin(self, request_id: str) -> None:
        """A plan was carried out, or is not going to be."""
        self.resident.unpin(request_id)
        self._unallocated.discard(request_id)

    def on_finished(self, request_id: str) -> None:
        """The request ended; a plan that is under way keeps its blocks."""
        self._requests.pop(request_id, None)


def _digest(tokens: array[int]) -> bytes:
    return hashlib.blake2b(tokens, digest_size=16).digest()


def without_overlap(matches: Sequence[Match], resident: Sequence[Match], prompt: int) -> list[Match]:
    """The resident matches, and those of the others that overlap none of them."""
    if not matches or not resident:
        return [*resident, *matches]
    covered = bytearray(prompt)
    for match in resident:
        covered[match.start : match.end] = b"\1" * (match.end - match.start)
    return [*resident, *(m for m in matches if not any(covered[m.start : m.end]))]
