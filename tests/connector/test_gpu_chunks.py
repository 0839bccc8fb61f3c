"""Hot chunks: found in vLLM's pool, pinned while in use, copied with moved keys."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import scheduler_kit
import torch
from models import tiny_model
from paged_kit import PagedModel

from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.gpu_chunks import GpuChunks, ResidentChunks, UncomputedBlocks, without_overlap
from lmcache_rag.connector.metadata import BlendResult, Match
from lmcache_rag.connector.model_runner import GpuCopy
from lmcache_rag.connector.scheduler import BlendScheduler
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.protocol import named_spans

BLOCK = 16


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0


@dataclass
class Pool:
    """Blocks under hashes, with reference counts, as vLLM's pool keeps them."""

    filed: dict[Any, Block] = field(default_factory=dict)
    ingested: list[list[int]] = field(default_factory=list)

    def key(self, block_hash: Any) -> Any:
        return ("key", block_hash)

    def get(self, keys: Any) -> Any:
        return map(self.filed.get, keys)

    @property
    def blocks(self) -> dict[int, Block]:
        return {block.block_id: block for block in self.filed.values()}

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            assert block.ref_cnt > 0
            block.ref_cnt -= 1

    def add(self, tokens: list[int]) -> None:
        """The blocks of a finished ingestion request."""
        self.ingested.append(tokens)
        for block_hash in hashes(tokens):
            self.filed.setdefault(self.key(block_hash), Block(len(self.filed) + 1))

    @property
    def held(self) -> int:
        return sum(block.ref_cnt for block in self.filed.values())


def hash_block(parent: Any, tokens: tuple[int, ...]) -> int:
    return hash((parent, tokens))


def hashes(tokens: list[int]) -> list[int]:
    parent, result = None, []
    for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hash_block(parent, tuple(tokens[first : first + BLOCK]))
        result.append(parent)
    return result


class Request:
    """What is read of vLLM's request."""

    def __init__(self, name: str, tokens: list[int], spans: list[list[int]]) -> None:
        self.request_id, self.prompt_token_ids, self.num_tokens = name, tokens, len(tokens)
        self.block_hashes = hashes(tokens)
        self.kv_transfer_params = {"lmcache_rag.chunks": spans}
        self.num_computed_tokens = 0
        self.cache_salt = None


def known(pool: Pool) -> ResidentChunks:
    """What was ingested after a prefix of 64 tokens."""
    chunks = ResidentChunks(pool, BLOCK)
    for tokens in pool.ingested:
        chunks.remember(array("q", tokens), hashes(tokens), 64)
    return chunks


@pytest.fixture
def world() -> Any:
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(1000) for _ in range(n)]  # noqa: E731
    prefix, chunks = ids(64), [ids(n) for n in (100, 64, 200)]
    pool = Pool()
    for chunk in chunks:
        pool.add(prefix + chunk)
    prompt, spans = list(prefix), []
    for chunk in (chunks[2], chunks[0], chunks[1]):
        spans.append([len(prompt), len(prompt) + len(chunk)])
        prompt += chunk + ids(3)
    return pool, Request("r", prompt + ids(20), spans)


def make(pool: Pool, lookups: list[Any] | None = None, **options: Any) -> BlendScheduler:
    chunks = known(pool)

    def look_up(request: Any) -> Any:
        assert lookups is not None, "LMCache is not asked when everything is hot"
        return lookups.pop()

    facts = {"least_tokens": 16} | options
    made = BlendScheduler(
        ConnectorOptions(**facts), 64, SimpleNamespace(look_up=look_up), SimpleNamespace(hide=lambda r, first: None)
    )
    made.gpu_chunks = GpuChunks(chunks)
    return made


def test_a_chunk_is_found_after_its_own_prefix_only(world: Any) -> None:
    """Nor for another tenant, whose salt is in the hash of the first block: only where it was computed."""
    pool, request = world
    chunks = known(pool)
    asked = lambda other: chunks.find(  # noqa: E731
        chunks.locate(
            array("q", other.prompt_token_ids), other.block_hashes, other.kv_transfer_params["lmcache_rag.chunks"]
        )
    )
    assert asked(request)
    tokens = [token + 1 for token in request.prompt_token_ids[:64]] + request.prompt_token_ids[64:]
    assert asked(Request("other prefix", tokens, request.kv_transfer_params["lmcache_rag.chunks"])) == []
    salted = Request("other tenant", request.prompt_token_ids, request.kv_transfer_params["lmcache_rag.chunks"])
    salted.block_hashes = [hash(("salt", own)) for own in salted.block_hashes]
    assert asked(salted) == []
    assert asked(request)


def test_whole_blocks_of_chunks_are_found_in_place(world: Any) -> None:
    pool, request = world
    spans = named_spans(request.kv_transfer_params, request.num_tokens)
    chunks = known(pool)
    found = chunks.find(chunks.locate(array("q", request.prompt_token_ids), request.block_hashes, spans))
    for start, end in spans:
        mine = [m for m in found if start <= m.start < end]
        assert [m.start for m in mine] == list(range(start, end - BLOCK + 1, BLOCK))
        assert [m.old_start for m in mine] == [64 + m.start - start for m in mine]


def test_another_prefix_finds_nothing(world: Any) -> None:
    pool, request = world
    request.prompt_token_ids[0] += 1
    request.block_hashes = hashes(request.prompt_token_ids)
    spans = named_spans(request.kv_transfer_params, request.num_tokens)
    chunks = known(pool)
    assert chunks.find(chunks.locate(array("q", request.prompt_token_ids), request.block_hashes, spans)) == []


@pytest.mark.parametrize(
    "spans", [None, "x", [[1]], [[5, 3]], [[0, 10], [5, 20]], [[0, 10**9]], [[0.5, 3]], [[True, 3]], [["0", "3"]]]
)
def test_spans_that_make_no_sense_are_left_out(spans: Any) -> None:
    assert named_spans({"lmcache_rag.chunks": spans}, 100) == []


def test_more_spans_than_blocks_make_no_sense() -> None:
    assert named_spans({"lmcache_rag.chunks": [[at, at + 1] for at in range(1 << 17)]}, 1 << 17) == []
    assert len(named_spans({"lmcache_rag.chunks": [[at, at + 16] for at in range(0, 1600, 16)]}, 1600)) == 100


def test_only_the_first_chunk_may_be_below_a_block() -> None:
    spans = [[64, 70], [70, 80], [80, 96]]
    assert named_spans({"lmcache_rag.chunks": spans}, 100) == [(64, 70), (80, 96)]


def test_blocks_are_pinned_from_claim_to_result(world: Any) -> None:
    pool, request = world
    side = make(pool)
    claimed = side.match(request, 0)
    assert claimed == request.num_tokens - 1  # the short rest is claimed too
    assert pool.held > 0
    side.on_allocated(request, list(range(50)), claimed, None)
    ((plan,), _) = side.build_plans()
    assert all(match.block >= 0 for match in plan.matches)
    held = pool.held
    assert held == len(plan.matches)
    tokens = len(plan.matches) * BLOCK
    side.on_results([BlendResult("r", 0, tokens, 0, 0, 0.0, 0.0, "", tokens)])
    assert pool.held == 0
    told = side.finish(request)
    assert told is not None
    assert told["hot_tokens"] == tokens


def test_an_abort_during_a_plan_keeps_the_blocks(world: Any) -> None:
    pool, request = world
    side = make(pool)
    side.on_allocated(request, list(range(50)), side.match(request, 0) or 0, None)
    side.build_plans()
    side.finish(request)
    assert pool.held > 0
    side.on_results([BlendResult("r", 0, 0, 0, 0, 0.0, 0.0)])
    assert pool.held == 0


@pytest.mark.parametrize("when", ["claimed", "allocated", "thrown away"])
def test_an_abort_before_that_lets_them_go(world: Any, when: str) -> None:
    pool, request = world
    side = make(pool)
    claimed = side.match(request, 0) or 0
    if when == "allocated":
        side.on_allocated(request, list(range(50)), claimed, None)
    elif when == "thrown away":
        side.on_allocated(request, list(range(50)), 0, None)
        assert pool.held == 0
    side.finish(request)
    assert pool.held == 0


def test_unallocated_chunks_are_given_up_in_the_end(world: Any) -> None:
    """Pins must not keep an allocation from succeeding for ever."""
    pool, request = world

    class Lookup:
        result = (0, ())

        def poll(self, seconds: float) -> bool:
            return True

        def release_prefix(self, start: int, end: int) -> None: ...

        def end_session(self) -> None: ...

    side = make(pool, [Lookup()])
    for _ in range(2):
        assert side.match(request, 0) == request.num_tokens - 1
        side.build_plans()
        assert pool.held == 0
    assert side.match(request, 0) == 0
    assert pool.held == 0


def test_hot_chunks_come_before_those_of_lmcache() -> None:
    hot = [Match(64, 80, 64, 80, block=3)]
    cold = [Match(70, 134, 0, 64), Match(134, 198, 64, 128)]
    assert without_overlap(cold, hot, 300) == [*hot, cold[1]]


@pytest.mark.parametrize("scaling", ["default", "yarn", "llama3"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
def test_a_copied_key_is_the_key_at_its_new_position(tokenizer: Any, scaling: str, layout: str) -> None:
    """Layer 0's keys depend on token and position alone, so the copy can be compared with a computation."""
    model = HFModel.wrap(tiny_model("llama", scaling), tokenizer)
    paged = PagedModel(model, layout=layout, block=BLOCK, blocks=40)
    ids = torch.randint(5, 40000, (48,))

    def computed(start: int) -> Any:
        cache = model.buffer(len(ids))
        scratch = torch.arange(start, start + len(ids))
        with torch.inference_mode():
            model.model.model(
                input_ids=ids[None], position_ids=scratch[None], use_cache=True, **model.cache_argument(cache)
            )
        return cache.layers[0].keys[0], cache.layers[0].values[0]

    keys, values = computed(64)
    source = PagedSequence.of(range(4, 11), BLOCK, "cpu")
    for layer in range(model.layers):
        paged.write(source, layer, 64, keys, values)
    places = torch.arange(512)
    cos, sin = model.rotary(torch.zeros(1, 1, 1), places[None])
    table = torch.cat([cos[0, :, :8], sin[0, :, :8]], -1)
    target = PagedSequence.of(range(20, 36), BLOCK, "cpu")
    for start in (7, 64, 130):  # backwards, in place, forwards
        matches = [
            Match(start + i, start + i + BLOCK, 64 + i, 80 + i, block=4 + (64 + i) // BLOCK) for i in (0, 16, 32)
        ]
        GpuCopy(paged.caches, table, neox=True).run(matches, target)
        want_keys, want_values = computed(start)
        got_keys, got_values = paged.read(target, 0, start + 48)
        torch.testing.assert_close(got_keys[:, start:], want_keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got_values[:, start:], want_values, atol=1e-4, rtol=1e-4)


def test_residency_is_estimated_without_all_blocks() -> None:
    pool = scheduler_kit.Pool()
    chunks = ResidentChunks(pool, 8)
    tokens, hashes = array("q", range(100)), ["a", "b", "c", "d"]
    for first, end in ((32, 56), (60, 92)):
        own = scheduler_kit.chunk_hashes("d", list(tokens[first:end]), 8)
        chunks.remember(array("q", [*tokens[:32], *tokens[first:end]]), [*hashes, *own], 32)
    pool.file("d", list(tokens[32:56]), 8)
    asked: list[Any] = []
    real = pool.get
    pool.get = lambda keys: (asked.extend(keys), real(keys))[1]  # type: ignore[method-assign]
    spans = [(32, 56), (60, 92)]
    places = chunks.locate(tokens, hashes, spans)
    assert chunks.estimate(places) == 24
    assert len(asked) == 2
    assert chunks.locate(tokens, hashes, []) == []
    assert chunks.locate(tokens, hashes[:3], spans) == [], "the prefix is longer than what is hashed"
    assert sum(m.end - m.start for m in chunks.find(places)) == 24


def test_a_chunk_is_known_by_vllms_own_hashes() -> None:
    """With an adapter too, whose name is in each of them."""
    tokens = array("q", range(100))
    own = ["a", "b", *(f"with an adapter {number}" for number in range(10))]
    chunks = ResidentChunks(scheduler_kit.Pool(), 8)
    chunks.remember(tokens, own, 16)
    query = array("q", [*tokens[:16], 1, 2, 3, *tokens[16:]])
    ((start, end, old, keys),) = chunks.locate(query, own[:2], [(16, 19), (19, 103)])
    assert (start, end, old, keys) == (19, 103, 16, tuple(own[2:]))


def test_a_chunk_inside_a_prefix_block_is_not_known() -> None:
    """Its own blocks would begin elsewhere than the chunk: keys would be moved from the wrong position."""
    pool, prefix, chunk = scheduler_kit.Pool(), list(range(20)), list(range(100, 150))
    hashes = scheduler_kit.chunk_hashes("salt", prefix + chunk, 8)
    pool.file("salt", prefix + chunk, 8)
    chunks = ResidentChunks(pool, 8)
    tokens = array("q", prefix + chunk)
    chunks.remember(tokens, hashes, len(prefix))
    assert chunks.tokens == 0
    assert chunks.find(chunks.locate(tokens, hashes, [(20, 70)])) == []


def test_a_chunk_is_not_found_after_part_of_a_block() -> None:
    """It was computed right after the prefix, and here would seem to have been after four more tokens."""
    pool, prefix, chunk = scheduler_kit.Pool(), list(range(16)), list(range(100, 148))
    hashes = scheduler_kit.chunk_hashes("salt", prefix + chunk, 8)
    pool.file("salt", prefix + chunk, 8)
    chunks = ResidentChunks(pool, 8)
    chunks.remember(array("q", prefix + chunk), hashes, len(prefix))
    query = [*prefix, 1, 2, 3, 4, *chunk]
    own = scheduler_kit.chunk_hashes("salt", query, 8)
    assert chunks.find(chunks.locate(array("q", query), own, [(20, 68)])) == []
    (first, *_) = chunks.find(chunks.locate(array("q", query), own, [(16, 20), (20, 68)]))
    assert (first.start, first.old_start) == (20, 16)


def test_a_chunk_after_neutral_passages_is_found() -> None:
    """Its keys are moved from where it stood at ingestion, and its name is that of prefix and chunk alone."""
    pool, prefix, neutral, chunk = scheduler_kit.Pool(), list(range(16)), list(range(500, 524)), list(range(100, 148))
    ingested = prefix + neutral + chunk
    pool.file("salt", ingested, 8)
    chunks = ResidentChunks(pool, 8)
    params = {"lmcache_rag.prefix": 16, "lmcache_rag.chunks": [[40, 88]]}
    request = Request("ingest", ingested, [])
    request.kv_transfer_params = params  # type: ignore[assignment]
    request.block_hashes, request.num_computed_tokens = scheduler_kit.chunk_hashes("salt", ingested, 8), len(ingested)
    GpuChunks(chunks).on_ingested(request)
    query = array("q", [*prefix, 7, 8, *chunk])
    own = scheduler_kit.chunk_hashes("salt", list(query), 8)
    found = chunks.find(chunks.locate(query, own, [(16, 18), (18, 66)]))
    assert [(match.start, match.old_start) for match in found] == [(18 + at, 40 + at) for at in range(0, 48, 8)]
    chunks.forget(array("q", ingested), request.block_hashes, 16, 40)
    assert (chunks.locate(query, own, [(16, 18), (18, 66)]), chunks.tokens) == ([], 0)


def test_known_chunks_are_bounded_by_their_tokens() -> None:
    chunks = ResidentChunks(scheduler_kit.Pool(), 8, max_tokens=200)
    for number in range(50):
        tokens = array("q", [1] * 16 + [number] * 84)
        chunks.remember(tokens, ["a", "b", *range(10)], 16)
        chunks.remember(tokens, ["a", "b", *range(10)], 16)
        assert chunks.tokens == min(80 * (number + 1), 160)
    prompt = array("q", [1] * 16 + [49] * 84 + [0] * 84)
    assert [place.start for place in chunks.locate(prompt, ["a", "b"], [(16, 100), (100, 184)])] == [16]


def test_only_ingested_chunks_are_remembered() -> None:
    pool = scheduler_kit.Pool()
    hot = ResidentChunks(pool, BLOCK)
    side = BlendScheduler(
        ConnectorOptions(least_tokens=16),
        64,
        SimpleNamespace(look_up=lambda r: None),
        SimpleNamespace(hide=lambda r, first: None),
    )
    side.gpu_chunks = GpuChunks(hot)
    prefix, chunks = list(range(64)), [list(range(100 * n, 100 * n + 64)) for n in (1, 2)]

    def ingest(name: str, chunk: list[int], computed: int, **more: Any) -> None:
        request = Request(name, prefix + chunk, [])
        request.kv_transfer_params = {"lmcache_rag.ingest": True, "lmcache_rag.prefix": 64} | more  # type: ignore[assignment]
        request.num_computed_tokens = computed
        side.start_early(request)
        side.finish(request)

    ingest("left at once", chunks[0], 0)
    ingest("is none", chunks[0], 128, **{"lmcache_rag.ingest": False})
    query = Request("query", prefix + chunks[1] + chunks[0] + [1, 2], [[64, 128], [128, 192]])
    side.start_early(query)
    side.finish(query)
    assert hot.tokens == 0
    ingest("whole", chunks[0], 128)
    assert hot.tokens == 64


def test_an_evicted_chunk_is_not_searched_in_each_step(world: Any) -> None:
    pool, request = world
    side = GpuChunks(known(pool))
    side.on_new_request(request, array("q", request.prompt_token_ids))
    pool.filed.clear()
    asked: list[Any] = []
    side.resident.find = lambda places: asked.extend(places) or []  # type: ignore[method-assign, func-returns-value]
    for _ in range(10):
        assert side.find(request) == []
    assert len(asked) == 3


def test_a_block_is_not_copied_before_it_is_computed() -> None:
    """vLLM files a block when it schedules its tokens; a copy in that step would come before the model's pass."""
    pool = scheduler_kit.Pool()
    filed = UncomputedBlocks(pool, 8)
    chunks = ResidentChunks(pool, 8, uncomputed=filed)
    tokens = array("q", range(100))
    pool.file("d", list(tokens[32:56]), 8)
    own = scheduler_kit.chunk_hashes("d", list(tokens[32:56]), 8)
    chunks.remember(tokens[:56], ["a", "b", "c", "d", *own], 32)
    places = chunks.locate(tokens, ["a", "b", "c", "d"], [(32, 56)])
    last = list(pool.filed.values())[-1]
    filed.add(last.block_id)
    assert chunks.estimate(places) == 0
    assert [match.end for match in chunks.find(places)] == [40, 48]
    filed.on_step()
    assert chunks.estimate(places) == 24
    assert [match.end for match in chunks.find(places)] == [40, 48, 56]
