"""What an engine's work takes, and from that whether blending a prompt starts its answer earlier than computing it.

Each `Cost` (a prefill, a look-up, a load, a blend's passes) is a sum of few terms with coefficients that are never
negative: a constant, a price per token, a higher price from some sizes on, attention. So it never falls with the number
of tokens. The coefficients are fitted to observations, which are kept in bins by size: of each bin the last few, of
which the median counts. One outlier changes little, and a lasting change is followed after a few observations.

A cost that was hardly observed is unknown, and counts as nothing where a blend is predicted: the engine blends, and
learns what that takes. Needs neither vLLM nor PyTorch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

LEAST: Final = 3  # fewer observations of a cost say nothing: the first may have compiled something
KEEP: Final = 5  # observations in a bin
BINS: Final = 64  # of a cost; the one that was observed least recently is dropped
FADE: Final = 64  # observations of a cost after which a bin without any counts half
LIMIT: Final = 4.0  # an observation counts at most so many times what was predicted, more above all observed sizes
REACH: Final = 4  # prefills of up to so many times the largest one observed are predicted
REFIT: Final = 0.03  # prices are fitted again when a bin's median changes by this share
NOTICEABLE: Final = 0.05  # a pass takes noticeably longer from this share on
SMALLEST: Final = 16  # tokens of the smallest pass
SPREAD: Final = 8  # what more tokens take is known if so many times more were observed
EXPLORE: Final = 32  # of the time of the requests that are computed, measuring again takes one part in so many
RECHECK: Final = 256  # blends of a size after which a prompt of it is computed once, to measure that again
DOUBTFUL: Final = 3.0  # not where blending seems faster by so many times
MOST_TOKENS: Final = 131_072  # a boundary is looked for up to here
SHOWN: Final = (1024, 8192)  # sizes of the figures that are shown
HEAD: Final = 64  # tokens of a typical prompt without KV: its question
SELECTING: Final = ("query", "hkvd")  # policies that need passes of their own to select
USED: Final = 16  # latest blends whose number of recomputed tokens says what the next one recomputes
_RIDGE: Final = 1e-4  # a price per token must explain something: times of a single size are explained by a constant
_BEND: Final = 5e-3  # a higher price from some sizes on, or attention, must explain more: between two sizes is a line
_LEVEL: Final = 1e-8  # the same for a constant, so that there is one solution
_VERSION: Final = 1

Terms = Callable[[Sequence[float]], tuple[float, ...]]


def _above(tokens: float, first: float) -> float:
    return max(0.0, tokens - first)


def _per_token(inputs: Sequence[float]) -> tuple[float, ...]:
    (tokens,) = inputs
    return 1.0, tokens


def _prefill(inputs: Sequence[float]) -> tuple[float, ...]:
    tokens, context, served = inputs
    attended = tokens * (context + tokens / 2)
    return 1.0, served, tokens, _above(tokens, 128), _above(tokens, 512), _above(tokens, 2048), attended


def _blend(inputs: Sequence[float]) -> tuple[float, ...]:
    tokens, context, selects = inputs
    some = float(tokens > 0)
    return selects, selects * context, some, tokens, _above(tokens, 128), _above(tokens, 512), tokens * context


def _load(inputs: Sequence[float]) -> tuple[float, ...]:
    return tuple(term for tokens in inputs for term in (float(tokens > 0), tokens))


# -- one cost ---------------------------------------------------------------------------------------------------------


@dataclass
class _Bin:
    last: int = 0  # number of the cost's observation that came last
    fitted: float = 0.0  # its median when prices were fitted
    seen: deque[tuple[tuple[float, ...], float]] = field(default_factory=lambda: deque(maxlen=KEEP))

    def median(self) -> tuple[tuple[float, ...], float]:
        """Its sizes and its time. Of two times the lower one: a time is only ever too long."""
        half = (len(self.seen) - 1) // 2
        sizes = zip(*(inputs for inputs, _ in self.seen), strict=True)
        return tuple(sorted(each)[half] for each in sizes), sorted(ms for _, ms in self.seen)[half]


class Cost:
    """Milliseconds of one kind of work by its sizes.

    Args:
        terms: Makes the terms of the sum from the sizes. They must not fall when a size grows.
        constants: Numbers of the terms that do not grow with a size.
        bends: Numbers of the terms by which more tokens take more than in proportion.
        reach: First sizes above so many times the largest one observed are unknown; 0: all are known once one is.
    """

    def __init__(
        self, terms: Terms, constants: Collection[int] = (0,), *, bends: Collection[int] = (), reach: int = 0
    ) -> None:
        self._terms, self._constants, self._bends, self._reach = terms, constants, bends, reach
        self._bins: dict[tuple[int, ...], _Bin] = {}
        self._count = self._fitted = 0
        self._least: tuple[float, ...] = ()  # the smallest of each size
        self._most: tuple[float, ...] = ()  # the largest of each size
        self._prices: tuple[float, ...] | None = None
        self._stale = False  # whether the prices are to be fitted again

    @property
    def count(self) -> int:
        """Observations so far."""
        return self._count

    def observe(self, inputs: Sequence[float], ms: float) -> None:
        """Add an observation: the sizes, and the milliseconds that it took."""
        sizes = tuple(float(size) for size in inputs)
        if not all(math.isfinite(size) and size >= 0 for size in sizes) or not (math.isfinite(ms) and ms >= 0):
            return
        key = tuple(round(2 * math.log2(size)) if size >= 1 else -1 for size in sizes)
        found = self._bins.get(key)
        known = self.predict(sizes) or 0.0
        if found is not None:
            known = max(known, found.median()[1])
        if known:
            beyond = max(size / max(most, 1.0) for size, most in zip(sizes, self._most, strict=True))
            ms = min(ms, LIMIT * known * max(beyond, 1.0))
        if found is None:
            found = self._bins[key] = _Bin()
            if len(self._bins) > BINS:
                del self._bins[min(self._bins, key=lambda each: self._bins[each].last)]
        self._count += 1
        found.last = self._count
        found.seen.append((sizes, ms))
        usual = found.median()[1]
        changed = len(found.seen) <= LEAST or abs(usual - found.fitted) > REFIT * usual
        self._stale = self._stale or changed or self._count - self._fitted >= FADE
        if self._stale and self._count - self._fitted > len(self._bins) // 4:
            self._prices = None  # not after each observation: a fit over many bins takes a millisecond
        self._least = tuple(map(min, self._least or sizes, sizes))
        self._most = tuple(map(max, self._most or sizes, sizes))

    def observed(self, size: int) -> tuple[float, float]:
        """The smallest and the largest value of a size so far."""
        return (self._least[size], self._most[size]) if self._count else (0.0, 0.0)

    def predict(self, inputs: Sequence[float]) -> float | None:
        """Milliseconds for these sizes; None if it is unknown."""
        if self._count < LEAST or (self._reach and inputs[0] > self._reach * self._most[0]):
            return None
        if self._prices is None:
            self._prices, self._fitted, self._stale = self._fit(), self._count, False
        return sum(price * term for price, term in zip(self._prices, self._terms(inputs), strict=True))

    def _fit(self) -> tuple[float, ...]:
        """Prices by least squares of the relative errors, none below zero."""
        rows = []
        for found in self._bins.values():
            sizes, ms = found.median()
            found.fitted = ms
            trust = min(len(found.seen), 3) / 3 * 0.5 ** ((self._count - found.last) / FADE)
            rows.append((self._terms(sizes), ms, trust / max(ms, 0.05) ** 2))
        return non_negative_least_squares(rows, self._constants, self._bends)

    def as_list(self) -> list[Any]:
        """For JSON."""
        return [[found.last, [[*sizes, ms] for sizes, ms in found.seen]] for found in self._bins.values()]

    def load(self, bins: Any) -> None:
        """Take what `as_list` made.

        Raises:
            ValueError: It made something else.
        """
        try:
            for _, seen in sorted(bins, key=lambda each: each[0]):
                for *sizes, ms in seen:
                    self._terms(sizes)  # as many as there must be
                    self.observe(sizes, ms)
        except (TypeError, KeyError, IndexError, ValueError) as problem:
            raise ValueError(f"not a cost: {problem}") from problem


def non_negative_least_squares(
    rows: Iterable[tuple[Sequence[float], float, float]],
    constants: Collection[int] = (),
    bends: Collection[int] = (),
) -> tuple[float, ...]:
    """Prices that are not negative, and by which the terms explain the values best (Lawson and Hanson's method).

    Args:
        rows: (terms, value, weight) of each.
        constants: Numbers of the terms that do not grow: they explain what the rows leave open.
        bends: Numbers of terms that explain only what the others cannot.
    """
    found = [([math.sqrt(weight) * term for term in terms], math.sqrt(weight) * value) for terms, value, weight in rows]
    width = len(found[0][0])
    scales = [max(abs(terms[at]) for terms, _ in found) or 1.0 for at in range(width)]
    gram = [[0.0] * width for _ in range(width)]
    target = [0.0] * width
    for terms, value in found:
        unit = [term / scale for term, scale in zip(terms, scales, strict=True)]
        for i, left in enumerate(unit):
            target[i] += value * left
            for j in range(i + 1):
                gram[i][j] += left * unit[j]
    for i in range(width):
        gram[i][i] += _LEVEL if i in constants else _BEND if i in bends else _RIDGE
        for j in range(i):
            gram[j][i] = gram[i][j]
    prices = [0.0] * width
    active: list[int] = []
    tolerance = 1e-6 * max(max(target), 1e-300)
    for _ in range(3 * width):
        slopes = [target[i] - sum(gram[i][j] * prices[j] for j in active) for i in range(width)]
        best = max((i for i in range(width) if i not in active), key=lambda i: slopes[i], default=None)
        if best is None or slopes[best] <= tolerance:
            break
        active.append(best)
        while True:
            wanted = _solve([[gram[i][j] for j in active] for i in active], [target[i] for i in active])
            if min(wanted) > 0:
                break
            share = min(
                (prices[i] / (prices[i] - value) for i, value in zip(active, wanted, strict=True) if value <= 0),
                default=0.0,
            )
            for i, value in zip(active, wanted, strict=True):
                prices[i] += share * (value - prices[i])
            kept = [i for i, value in zip(active, wanted, strict=True) if value > 0 or prices[i] > 1e-12]
            if len(kept) == len(active):
                kept.remove(active[wanted.index(min(wanted))])
            for i in set(active) - set(kept):
                prices[i] = 0.0
            active = kept
            if not active:
                return tuple(0.0 for _ in scales)
        for i, value in zip(active, wanted, strict=True):
            prices[i] = value
    return tuple(price / scale for price, scale in zip(prices, scales, strict=True))


def _solve(matrix: list[list[float]], values: list[float]) -> list[float]:
    """Solve a small system of equations, by Cholesky's method."""
    size = len(values)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(max(rest, 1e-12)) if i == j else rest / lower[j][j]
    forward: list[float] = []
    for i in range(size):
        forward.append((values[i] - sum(lower[i][k] * forward[k] for k in range(i))) / lower[i][i])
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (forward[i] - sum(lower[k][i] * found[k] for k in range(i + 1, size))) / lower[i][i]
    return found


# -- all costs of an engine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one prompt takes, blended and computed.

    Attributes:
        prompt: Its tokens.
        local: Tokens at its beginning whose exact KV the engine itself holds.
        exact: Tokens at its beginning whose exact KV is used in either case; those after `local` are loaded.
        placed: Tokens of chunk KV that a blend places, by tier.
        computed: Tokens that the blend computes: the selected ones, and those without KV.
        rest: Tokens that are left to the engine after the blend.
        policy: The recompute policy.
        selects: Whether it needs passes of its own to select.
        looked_up: Whether the prompt is looked up when it is blended.
        exact_tier: The tier of what is loaded of the exact prefix.
    """

    prompt: int
    local: int = 0
    exact: int = 0
    placed: Mapping[str, int] = field(default_factory=dict)
    computed: int = 0
    rest: int = 0
    policy: str = "query"
    selects: bool = True
    looked_up: bool = True
    exact_tier: str = "l1"


@dataclass(frozen=True)
class Forecast:
    """Predicted milliseconds to the first token, blended and computed.

    Attributes:
        blend_ms: Blended; at least so many where a part of it is unknown.
        compute_ms: Computed.
        known: Whether all parts are known.
    """

    blend_ms: float
    compute_ms: float
    known: bool = True

    def gains(self, share: float) -> bool:
        """Whether blending takes less by at least that share."""
        return self.blend_ms <= (1 - share) * self.compute_ms


TIERS: Final = ("hot", "l1", "l2")  # the engine's own KV, memory beside it, files


class CostModel:
    """The costs of an engine, from its own measurements.

    Args:
        step_tokens: A prefill is computed in steps of at most so many tokens; 0: in one.

    Attributes:
        prefill: By tokens of a step, the tokens before them, and 1 for a step of a request, 0 for a bare pass.
        lookup: By tokens of the prompt.
        load: By tokens of each of TIERS.
        passes: Of each policy: by tokens that a blend computes, tokens of the prompt, and 1 if it selected, else 0.
        finish: What a blend that leaves one token to the engine takes besides its load and its passes: by 1.
    """

    def __init__(self, step_tokens: int = 0) -> None:
        self.step_tokens = step_tokens
        self.prefill = Cost(_prefill, (0, 1), bends=(3, 4, 5, 6), reach=REACH)
        self.lookup, self.finish = Cost(_per_token), Cost(_per_token)
        self.load = Cost(_load, (0, 2, 4))
        self.passes: dict[str, Cost] = {}
        self._used: dict[str, deque[float]] = {}

    def observe_recomputed(self, policy: str, tokens: int, most: int) -> None:
        """A blend recomputed so many tokens where its budget allowed `most`."""
        if 0 <= tokens <= most and most:
            self._used.setdefault(policy, deque(maxlen=USED)).append(tokens / most)

    def recomputed(self, policy: str, most: int) -> int:
        """How many tokens a blend probably recomputes where its budget allows `most`: as the latest ones did."""
        if not (used := sorted(self._used.get(policy, ()))):
            return most
        return round(most * used[len(used) // 2])

    def observe_passes(self, policy: str, tokens: int, context: int, ms: float, *, selects: bool = True) -> None:
        """Add the time of a blend's passes."""
        self._passes(policy).observe((tokens, context, float(selects)), ms)

    def _passes(self, policy: str) -> Cost:
        return self.passes.setdefault(policy, Cost(_blend, (0, 2), bends=(4, 5, 6)))

    # -- predictions; None: unknown -----------------------------------------------------------------------------------

    def prefill_ms(self, tokens: int, context: int = 0, *, served: bool = True) -> float | None:
        """Time to compute so many tokens after `context` others, as a request or as bare passes."""
        total, size = 0.0, self.step_tokens or max(tokens, 1)
        for first in range(0, tokens, size):
            step = self.prefill.predict((min(size, tokens - first), context + first, float(served)))
            if step is None:
                return None
            total += step
        return total

    def lookup_ms(self, prompt: int) -> float | None:
        """Time of a prompt's look-up; what is read from slower tiers during it counts to it."""
        return self.lookup.predict((prompt,))

    def load_ms(self, tier: str, tokens: int) -> float | None:
        """Time to load and place KV of so many tokens from a tier."""
        return self._load_ms({tier: tokens})

    def _load_ms(self, tokens: Mapping[str, int]) -> float | None:
        return self.load.predict([float(tokens.get(tier, 0)) for tier in TIERS])

    def passes_ms(self, policy: str, tokens: int, context: int, *, selects: bool = True) -> float | None:
        """Time of selecting in a prompt of `context` tokens, and of computing `tokens` of them."""
        known = self.passes.get(policy)
        return known.predict((tokens, context, float(selects))) if known is not None else None

    def _blend_parts(self, work: Work) -> list[float | None]:
        loads = dict(work.placed)
        loads[work.exact_tier] = loads.get(work.exact_tier, 0) + max(work.exact - work.local, 0)
        return [
            self._load_ms(loads) if any(loads.values()) else 0.0,
            self.passes_ms(work.policy, work.computed, work.prompt, selects=work.selects),
            self.lookup_ms(work.prompt) if work.looked_up else 0.0,
            self._rest_ms(work),
            self.finish.predict((1,)) or 0.0,
        ]

    def _rest_ms(self, work: Work) -> float | None:
        """Time of what is left to the engine after a blend; one token is computed with it."""
        return self.prefill_ms(work.rest, work.prompt - work.rest, served=False) if work.rest > 1 else 0.0

    def compute_ms(self, work: Work, *, looked_up: bool = True) -> float | None:
        """Time to the first token if all is computed but the exact prefix.

        Args:
            work: The prompt.
            looked_up: Whether it has been looked up, so that this time has passed.
        """
        exact = work.exact if looked_up else work.local
        loaded = exact - work.local
        parts = [
            self.prefill_ms(work.prompt - exact, exact),
            self.load_ms(work.exact_tier, loaded) if loaded > 0 else 0.0,
            self.lookup_ms(work.prompt) if looked_up and work.looked_up else 0.0,
        ]
        return _sum(parts)

    def forecast(self, work: Work, *, looked_up: bool = True) -> Forecast | None:
        """Both times; `looked_up` is of the computed one, see compute_ms. None if that one is unknown."""
        compute = self.compute_ms(work, looked_up=looked_up)
        return None if compute is None else _forecast(self._blend_parts(work), compute)

    def gpu_forecast(self, work: Work) -> Forecast | None:
        """What both take of the GPU's time where other requests run: loads and look-ups wait beside their steps.

        A prefill joins steps that run anyway, so only its tokens count; a blend's passes are extra ones.
        """
        whole = self.prefill_ms(work.prompt - work.exact, work.exact, served=False)
        bare, rest = self.prefill_ms(1, served=False), self._rest_ms(work)
        if whole is None or bare is None:
            return None
        passes = self.passes_ms(work.policy, work.computed, work.prompt, selects=work.selects)
        return _forecast([passes, None if rest is None else max(rest - bare, 0.0)], max(whole - bare, 0.0))

    # -- figures for others -------------------------------------------------------------------------------------------

    def free_tokens(self, context: int, policy: str = "query") -> int:
        """How many tokens a blend can compute before its passes take noticeably longer than with SMALLEST; 0: unknown.

        Known only between the smallest and the largest number that was observed, and if those are far apart: from one
        size alone the whole time would count as constant, and every token as free. Nor is a token free that takes time
        in a prefill, where noise hides that in the times of blends.

        Args:
            context: Tokens of the prompt.
            policy: The recompute policy.
        """
        least = self.passes_ms(policy, SMALLEST, context)
        if not least:
            return 0
        few, many = self._passes(policy).observed(0)
        if many < SPREAD * max(few, SMALLEST):
            return 0
        low, high = SMALLEST, max(min(context, int(many)), SMALLEST)
        while low < high:
            middle = (low + high + 1) // 2
            more = (self.passes_ms(policy, middle, context) or 0.0) - least
            if max(more, self._more_prefill(middle)) <= NOTICEABLE * least:
                low = middle
            else:
                high = middle - 1
        return low

    def _more_prefill(self, tokens: int) -> float:
        """How much longer a bare prefill of so many tokens takes than one of SMALLEST; 0 if that is unknown."""
        few, many = self.prefill_ms(SMALLEST, served=False), self.prefill_ms(tokens, served=False)
        return many - few if few is not None and many is not None else 0.0

    def boundary(
        self, computed: Callable[[int], int], min_gain: float, *, tier: str = "l1", policy: str = "query"
    ) -> int | None:
        """From about how many tokens on a prompt is blended whose chunks all have KV; None: unknown, or never.

        Args:
            computed: How many tokens a blend selects among so many.
            min_gain: Share of the time that blending must save.
            tier: Where the KV is.
            policy: The recompute policy.
        """
        tokens: float = 2 * HEAD
        while tokens <= MOST_TOKENS:
            prompt = int(tokens)
            placed = prompt - HEAD
            work = Work(prompt, 0, 0, {tier: placed}, computed(placed) + HEAD, 1, policy, looked_up=tier != TIERS[0])
            forecast = self.forecast(work, looked_up=False)
            if forecast is None or not forecast.known:
                return None
            if forecast.gains(min_gain):
                return prompt
            tokens *= 1.1
        return None

    def figures(self) -> dict[str, float]:
        """What is known, by name, in milliseconds: for people and for metrics."""
        found = {f"prefill_{tokens}": self.prefill_ms(tokens) for tokens in SHOWN}
        found |= {f"lookup_{tokens}": self.lookup_ms(tokens) for tokens in SHOWN}
        for tier in TIERS:
            if self.load_ms(tier, 1):  # 0: it was never observed
                found |= {f"load_{tier}_{tokens}": self.load_ms(tier, tokens) for tokens in SHOWN}
        for policy in self.passes:
            found[f"blend_{policy}"] = self.passes_ms(policy, SMALLEST, SHOWN[-1])
            few, more = (self.passes_ms(policy, tokens, SHOWN[-1]) for tokens in (1024, 1124))
            found[f"recompute_100_{policy}"] = more - few if few is not None and more is not None else None
        return {name: round(ms, 3) for name, ms in found.items() if ms is not None}

    # -- kept state ---------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(cost.count for cost in self._costs().values())

    def _costs(self) -> dict[str, Cost]:
        own = {"prefill": self.prefill, "lookup": self.lookup, "load": self.load, "finish": self.finish}
        return own | {f"passes.{policy}": cost for policy, cost in self.passes.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        costs = {name: cost.as_list() for name, cost in self._costs().items() if cost.count}
        return {"version": _VERSION, "costs": costs}

    def update(self, state: Any) -> bool:
        """Add what `as_dict` made. Returns False, and changes nothing, if it made something else."""
        try:
            CostModel(self.step_tokens)._update(state)
        except (TypeError, KeyError, AttributeError, ValueError):
            return False
        self._update(state)
        return True

    def _update(self, state: Any) -> None:
        if state["version"] != _VERSION:
            raise ValueError("another version")
        for name, bins in state["costs"].items():
            kind, _, policy = name.partition(".")
            cost = self._passes(policy) if policy else self._costs()[kind]
            cost.load(bins)


def _sum(parts: Iterable[float | None]) -> float | None:
    found = list(parts)
    known = [part for part in found if part is not None]
    return sum(known) if len(known) == len(found) else None


def _forecast(blend: Sequence[float | None], compute: float) -> Forecast:
    return Forecast(sum(part or 0.0 for part in blend), compute, all(part is not None for part in blend))


class Exploration:
    """When a request that would be computed is blended nevertheless, so that its costs are measured again.

    By size of the prompt, once in EXPLORE requests; less often the more a blend costs, so that this takes one part in
    EXPLORE of the time at most. Counts, and draws nothing at random.
    """

    def __init__(self) -> None:
        self._debts: dict[int, float] = {}

    def is_due(self, prompt: int, forecast: Forecast) -> bool:
        """Whether this request is blended nevertheless. Each call counts as one request."""
        extra = max(forecast.blend_ms / max(forecast.compute_ms, 1e-6) - 1, 0.0)
        size = prompt.bit_length()
        saved = self._debts.get(size, 0.0) + 1 / EXPLORE
        due = saved >= max(extra, 1.0)
        self._debts[size] = 0.0 if due else saved
        return due


class Recheck:
    """When a request that would be blended is computed nevertheless, so that it is known what that takes now.

    A server that blends all prompts of a size measures no prefills of it. If they were slow while something else used
    the GPU, it would go on blending what it computes as fast. By size of the prompt; only where a mistake is likely.
    """

    def __init__(self) -> None:
        self._blends: dict[int, int] = {}

    def is_due(self, tokens: int, forecast: Forecast) -> bool:
        """Whether this request, of so many tokens without exact KV, is computed. Each call counts as one request."""
        if DOUBTFUL * forecast.blend_ms <= forecast.compute_ms:
            return False
        size = tokens.bit_length()
        due = self._blends.get(size, 0) >= RECHECK
        # Counted anew even if this one's time is not observed, since others run beside it: one in so many, not all.
        self._blends[size] = 0 if due else self._blends.get(size, 0) + 1
        return due

    def on_computed(self, tokens: int) -> None:
        """A step computed so many tokens: prompts of about that size need none."""
        for size in range(tokens.bit_length() - 1, tokens.bit_length() + 2):
            self._blends.pop(size, None)
