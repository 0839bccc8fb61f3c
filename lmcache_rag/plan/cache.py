"""Which share of the retrieved chunks a cache of some size holds: stack distances for all sizes, and LMCache itself.

**All sizes in one pass.** In a cache that evicts the least recently used chunk, a chunk is found exactly if all that
was used since its last use, itself included, fits (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage
hierarchies, IBM Systems Journal 9, 1970). `Curve` holds these stack distances, so one pass answers for every size.

**LMCache.** What its memory does was read in LMCache 0.5.6:

- An object is one LMCache chunk (64 tokens with `lmcache-rag serve`); what is left of a passage is not stored
  (`lmcache_rag.plan.geometry`).
- Once a second, if WATERMARK of the memory is used or more, EVICTED of all objects are deleted, by their number, the
  least recently used first (``L1EvictionController.eviction_loop`` in
  lmcache/v1/distributed/storage_controllers/eviction_controller.py, ``LRUEvictionPolicy.get_eviction_actions`` in
  eviction_policy/lru.py). So between 64% and 80% of `--l1-gb` is in use: `Curve.lmcache_rate` takes the middle.
- A hit marks an object as used; so does the end of a request, for all objects of its prompt, the last ones first: of
  one passage the end is evicted before the beginning (``touch_keys`` in prefetch_controller.py and in
  multiprocess/modules/lookup.py; ``on_keys_touched`` reverses the keys).
- What does not fit between two passes of the eviction is not stored (``L1Manager.reserve_write``: OUT_OF_MEMORY).
- Objects that are being read are locked, and are skipped by the eviction (``L1Manager.is_key_evictable``): with few
  requests at once that is a small part, and is left out here.
- Second tiers get all that is stored (``DefaultStorePolicy`` in storage_controllers/store_policy.py) and evict by the
  same rule if they have a limit. What is loaded from one is not kept in memory, unless LMCache's
  ``--l2-prefetch-policy`` is ``retain`` (``DefaultPrefetchPolicy.plan_l1_retention`` in prefetch_policy.py).
- In `lmcache-rag serve` ingested chunks are evicted after all other KV, in an order of their own (``IngestedLast``),
  so they are counted alone here.

Nothing here needs numpy: a million uses take some seconds on one core.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from lmcache_rag.errors import ConfigError

WATERMARK: Final = 0.8  # EvictionConfig.trigger_watermark, of lmcache/v1/distributed/config.py
EVICTED: Final = 0.2  # EvictionConfig.eviction_ratio
USABLE: Final = WATERMARK * (1 - EVICTED / 2)  # of the memory, on average
HEAD: Final = 100_000  # of Zipf's law, ranks that are drawn by their exact weights
GPU, MEMORY = "gpu", "memory"  # tiers that are always there: vLLM's own KV cache, LMCache's memory


@dataclass
class Workload:
    """The chunks that a sequence of requests uses.

    Attributes:
        requests: For each request the numbers of its chunks, each once.
        sizes: Of each chunk by its number, in LMCache's objects; at least 1.
        chained: Whether a chunk is found only after all before it in its request: exact prefixes, nothing blended.
    """

    requests: list[tuple[int, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    chained: bool = False

    @classmethod
    def of(cls, requests: Iterable[tuple[Sequence[str], Sequence[int]]], *, chained: bool = False) -> Workload:
        """Number the chunks of requests.

        Args:
            requests: (names, sizes) of the chunks of each.
            chained: A chunk is another one after other chunks, as in exact prefixes.
        """
        numbers: dict[object, int] = {}
        found = cls(chained=chained)
        for names, sizes in requests:
            own: dict[int, None] = {}
            before: tuple[int, ...] | str = ""
            for name, size in zip(names, sizes, strict=True):
                key = (before, name) if chained else name
                number = numbers.setdefault(key, len(numbers))
                if number == len(found.sizes):
                    found.sizes.append(max(size, 1))
                own[number] = None
                before = (number,)
            found.requests.append(tuple(own))
        return found

    @property
    def uses(self) -> Iterator[int]:
        """The chunks' numbers, one use after the other."""
        return (number for request in self.requests for number in request)

    @property
    def footprint(self) -> int:
        """All different chunks together, in objects."""
        return sum(self.sizes)


def zipf_workload(chunks: int, requests: int, *, top_k: int, exponent: float, size: int = 1, seed: int = 0) -> Workload:
    """Requests that draw their chunks by Zipf's law: the n-th most popular one is drawn with weight n**-exponent.

    Args:
        chunks: Chunks in the corpus.
        requests: Number of requests.
        top_k: Different chunks of each, at most as many as there are.
        exponent: 0: all alike; about 1: most texts and web pages.
        size: Of each chunk, in objects.
        seed: The same seed draws the same requests.

    Raises:
        ConfigError: A number is too small.
    """
    if chunks < 1 or requests < 1 or top_k < 1 or size < 1 or exponent < 0 or not math.isfinite(exponent):
        raise ConfigError(
            "A Zipf workload needs chunks, requests, top-k and size above 0, and an exponent of 0 or more."
        )
    dice = random.Random(seed)  # noqa: S311 - not a secret
    draw = _zipf(dice, chunks, exponent)
    wanted = min(top_k, chunks)
    numbers: dict[int, int] = {}  # only of chunks that are drawn: a corpus may have a billion
    requests_made: list[tuple[int, ...]] = []
    for _ in range(requests):
        own: dict[int, None] = {}
        for _ in range(64):  # a popular chunk is drawn again and again: some requests of a steep law have fewer
            own |= dict.fromkeys(draw() for _ in range(wanted - len(own)))
            if len(own) >= wanted:
                break
        requests_made.append(tuple(numbers.setdefault(rank, len(numbers)) for rank in own))
    return Workload(requests_made, [size] * len(numbers))


def _zipf(dice: random.Random, chunks: int, exponent: float) -> Callable[[], int]:
    """Draws ranks from 1 on: the first HEAD by their own weights, the others by the integral of the weight."""
    head = list(accumulate(rank**-exponent for rank in range(1, min(chunks, HEAD) + 1)))
    first, last, power = HEAD + 0.5, chunks + 0.5, 1 - exponent
    logarithmic = abs(power) < 1e-9
    rest = 0.0
    if chunks > HEAD:
        rest = math.log(last / first) if logarithmic else (last**power - first**power) / power

    def draw() -> int:
        place = dice.random() * (head[-1] + rest)
        if place < head[-1]:
            return bisect_right(head, place) + 1
        place -= head[-1]
        at: float = first * math.exp(place) if logarithmic else (first**power + place * power) ** (1 / power)
        return min(max(round(at), HEAD + 1), chunks)

    return draw


# -- all sizes in one pass --------------------------------------------------------------------------------------------


class _Stack:
    """The sizes of all chunks in the order of their last uses; sums over the end of it take a few small slices.

    Three levels of sums, of which slices are added up; a Fenwick tree gives the same sums, in loops over its nodes.
    """

    def __init__(self, room: int) -> None:
        self._wide = max(8, math.ceil(room ** (1 / 3)))
        self.room = self._wide**3
        self._sizes = [0] * self.room
        self._small = [0] * self._wide**2
        self._large = [0] * self._wide

    def add(self, place: int, size: int) -> None:
        self._sizes[place] += size
        place //= self._wide
        self._small[place] += size
        self._large[place // self._wide] += size

    def after(self, place: int) -> int:
        """The sum of all sizes after a place."""
        wide = self._wide
        small = place // wide
        large = small // wide
        return (
            sum(self._sizes[place + 1 : (small + 1) * wide])
            + sum(self._small[small + 1 : (large + 1) * wide])
            + sum(self._large[large + 1 :])
        )


def stack_distances(uses: Iterable[int], sizes: Sequence[int]) -> Iterator[int]:
    """For each use, the size of all different chunks since the last use of the same one, itself included; 0: its first.

    Args:
        uses: Numbers of the chunks.
        sizes: Their sizes by number, above 0.
    """
    room = 4096
    last: dict[int, int] = {}
    stack, time = _Stack(room), 0
    for number in uses:
        if time == stack.room:  # full of places that are no longer anybody's last use
            order = sorted(last, key=last.__getitem__)
            stack, time = _Stack(max(4 * len(order), room)), len(order)
            for place, each in enumerate(order):
                last[each] = place
                stack.add(place, sizes[each])
        size, before = sizes[number], last.get(number, -1)
        if before < 0:
            yield 0
        else:
            yield stack.after(before) + size
            stack.add(before, -size)
        stack.add(time, size)
        last[number] = time
        time += 1


@dataclass(frozen=True)
class Curve:
    """Hit rate by the size of the cache.

    Attributes:
        sizes: Sizes in objects at which the rate rises, ascending.
        hits: Hits with at least so large a cache.
        uses: Uses that were counted.
    """

    sizes: tuple[int, ...]
    hits: tuple[int, ...]
    uses: int

    def rate(self, objects: float) -> float:
        """Share of the uses that find their chunk in a cache of so many objects that evicts the least recently used."""
        at = bisect_right(self.sizes, objects)
        return self.hits[at - 1] / self.uses if at and self.uses else 0.0

    def lmcache_rate(self, objects: float) -> float:
        """The same in LMCache's memory of so many objects, of which it keeps USABLE in use."""
        return self.rate(objects * USABLE)

    @property
    def most(self) -> float:
        """The rate of a cache that holds everything."""
        return self.hits[-1] / self.uses if self.hits and self.uses else 0.0


def hit_curve(work: Workload, *, admission: int = 1, ingested: Collection[int] = (), skip: int = 0) -> Curve:
    """The hit rate of every size of cache, in one pass.

    Args:
        work: The uses; each one counts alone, as in blending.
        admission: A chunk is stored at this use of it: 1, or 2 for admission on the second use.
        ingested: Chunks that are stored beforehand, in this order.
        skip: So many requests at the beginning are not counted, while the cache fills.

    Raises:
        ConfigError: The admission is neither 1 nor 2.
    """
    if admission not in (1, 2):
        raise ConfigError(f"Chunks are admitted on their first or second use, not on use {admission}.")
    seen: set[int] = set()
    uncounted = len(ingested) + sum(len(request) for request in work.requests[:skip])
    counted, found = 0, Counter[int]()

    def admitted() -> Iterator[int]:
        yield from ingested
        for number in work.uses:
            if admission == 1 or number in seen:
                yield number
            else:  # not stored, so that it displaces nothing; it is found by nobody
                seen.add(number)
                skipped[0] += 1

    skipped = [0]
    seen.update(ingested)
    total = sum(map(len, work.requests)) + len(ingested)
    for at, distance in enumerate(stack_distances(admitted(), work.sizes)):
        if distance and at + skipped[0] >= uncounted:
            found[distance] += 1
    counted = total - uncounted
    sizes = sorted(found)
    return Curve(tuple(sizes), tuple(accumulate(found[size] for size in sizes)), counted)


# -- one size, as LMCache does it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A second tier.

    Attributes:
        name: Its name.
        objects: Objects that fit; None: it has no limit, and evicts nothing.
    """

    name: str
    objects: int | None = None


@dataclass(frozen=True)
class Found:
    """What a simulation found.

    Attributes:
        requests: For each counted request, objects by the tier that they were found in; "" for those not found.
        refused: Objects that were not stored, since the memory was full.
    """

    requests: list[dict[str, int]]
    refused: int = 0

    @property
    def objects(self) -> Counter[str]:
        """Objects by tier, over all requests."""
        total: Counter[str] = Counter()
        for request in self.requests:
            total.update(request)
        return total

    @property
    def rate(self) -> float:
        """Share of the objects that were found in any tier."""
        total = self.objects
        return 1 - total[""] / whole if (whole := sum(total.values())) else 0.0


class _Tier:
    """Chunks in the order of their last uses, with the number of their objects that are still there."""

    def __init__(self, objects: int | None) -> None:
        self.room = objects
        self.held: OrderedDict[int, int] = OrderedDict()
        self.used = 0

    def store(self, number: int, objects: int) -> bool:
        """Store the objects that are missing of a chunk; False if they do not fit."""
        more = objects - self.held.get(number, 0)
        if self.room is not None and self.used + more > self.room:
            return False
        self.used += more
        self.held[number] = objects
        self.held.move_to_end(number)
        return True

    def touch(self, number: int) -> None:
        if number in self.held:
            self.held.move_to_end(number)

    def evict(self) -> None:
        """One pass of LMCache's eviction."""
        if self.room is not None and self.used >= WATERMARK * self.room:
            self.drop(max(int(self.used * EVICTED), 1))

    def drop(self, objects: int) -> None:
        """Delete so many objects, the least recently used first, of one chunk its last ones first."""
        while objects > 0 and self.held:
            number, own = next(iter(self.held.items()))
            gone = min(own, objects)
            objects, self.used = objects - gone, self.used - gone
            if gone == own:
                del self.held[number]
            else:
                self.held[number] = own - gone


def simulate(
    work: Workload,
    memory: int,
    tiers: Sequence[Place] = (),
    *,
    gpu: int = 0,
    retain: bool = False,
    admission: int = 1,
    ingested: Collection[int] = (),
    times: Sequence[float] = (),
    shared: int = 0,
    skip: int = 0,
) -> Found:
    """What LMCache finds of each request, request by request.

    Args:
        work: The requests.
        memory: Objects that fit into LMCache's memory.
        tiers: Second tiers, in the order in which they are asked.
        gpu: Objects that fit into vLLM's own KV cache, which evicts one by one; 0: it is not counted.
        retain: What is loaded from a second tier stays in memory (LMCache's ``--l2-prefetch-policy retain``).
        admission: A chunk is stored at this use of it.
        ingested: Chunks that are stored beforehand, in this order.
        times: When each request begins, in seconds, ascending: LMCache evicts once a second. Empty: it evicts after
            each request that needs it, as with a request a second or fewer.
        shared: Objects in memory that every request uses, so that they are never evicted: those of the prefix.
        skip: So many requests at the beginning are not counted.
    """
    hot, main, below = _Tier(gpu), _Tier(memory), [(place.name, _Tier(place.objects)) for place in tiers]
    main.used = shared
    uses: Counter[int] = Counter()
    counted: list[dict[str, int]] = []
    refused, passes = 0, 0.5
    for number in ingested:
        uses[number] = admission
        refused += _store(number, work.sizes[number], main, below)
        _evict(main, below)
    for at, request in enumerate(work.requests):
        while times and passes < times[at] - times[0]:
            _evict(main, below)
            passes += 1
        found: Counter[str] = Counter()
        misses, whole = [], True
        for number in request:
            size = work.sizes[number]
            place, held = _look_up(number, size, hot, main, below) if whole else ("", 0)
            if held:
                found[place] += held
            if held < size:
                found[""] += size - held
                misses.append(number)
                whole = whole and not work.chained
        for number in reversed(request):
            uses[number] += 1
            for _, tier in below:
                tier.touch(number)
            main.touch(number)
            loaded = retain and number not in main.held and any(number in tier.held for _, tier in below)
            if loaded or (number in misses and uses[number] >= admission):
                refused += _store(number, work.sizes[number], main, () if loaded else below)
            if gpu:
                hot.touch(number)
                hot.drop(hot.used - hot.held.get(number, 0) + work.sizes[number] - gpu)
                hot.store(number, work.sizes[number])
        if not times:
            _evict(main, below)
        if at >= skip:
            counted.append(dict(found))
    return Found(counted, refused)


def _look_up(number: int, size: int, hot: _Tier, main: _Tier, below: Sequence[tuple[str, _Tier]]) -> tuple[str, int]:
    """(tier, objects): the first tier that has all of a chunk, or else most of it."""
    best = ("", 0)
    for name, tier in ((GPU, hot), (MEMORY, main), *below):
        held = min(tier.held.get(number, 0), size)
        if held > best[1]:
            best = (name, held)
        if held == size:
            break
    return best


def _store(number: int, size: int, main: _Tier, below: Iterable[tuple[str, _Tier]]) -> int:
    """Store a chunk in memory, and from there in second tiers; returns how many objects did not fit into memory."""
    more = size - main.held.get(number, 0)
    if not main.store(number, size):
        return more
    for _, tier in below:
        if not tier.store(number, size):
            tier.evict()
            tier.store(number, size)
    return 0


def _evict(main: _Tier, below: Iterable[tuple[str, _Tier]]) -> None:
    main.evict()
    for _, tier in below:
        tier.evict()
