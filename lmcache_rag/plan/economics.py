"""What keeping chunk KV costs and gains: GPU time, time to the first token, break-even bandwidths, a recommendation.

Times come from the costs that a server measured itself and shows on /metrics (`lmcache_rag.costs`), or from those that
servers in docs/results measured, scaled to another model by parameters and size of the KV; `Costs.source` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from lmcache_rag.budget import AutoRule
from lmcache_rag.errors import ConfigError
from lmcache_rag.plan.cache import GPU, MEMORY, USABLE, WATERMARK, Curve, Found
from lmcache_rag.plan.geometry import Geometry
from lmcache_rag.protocol import LMCACHE_CHUNK

GB: Final = 1e9
GIB: Final = 1 << 30  # LMCache's --l1-size-gb counts these (lmcache/v1/distributed/config.py)
WORTH: Final = 0.1  # a mean TTFT that is shorter by less is not worth the work
TIER_WORTH: Final = 0.05  # the same for a second tier
SECOND_WORTH: Final = 0.01  # so many hits more are worth another admission
FEW, MANY = 1024, 8192  # tokens of the figures
_NEEDED: Final = (f"prefill_{FEW}", f"prefill_{MANY}")
_BLENDS: Final = ("blend_query", "recompute_100_query")

# What servers on one H200 measured themselves: docs/results/never-slower-h200.md. (parameters, KV bytes of a token, ms)
MEASURED: Final[Mapping[str, tuple[int, int, Mapping[str, float]]]] = {
    "an 8B Llama shape (never-slower-h200-8b-4.json)": (
        6_979_321_856,
        131_072,
        {
            "prefill_1024": 25.2,
            "prefill_8192": 203.165,
            "blend_query": 19.473,
            "recompute_100_query": 2.144,
            "lookup_1024": 2.786,
            "lookup_8192": 3.244,
            "load_l1_1024": 4.646,
            "load_l1_8192": 23.516,
            "load_hot_1024": 0.798,
            "load_hot_8192": 2.411,
        },
    ),
    "Qwen2.5-Coder-1.5B (never-slower-h200-1.5b-2.json)": (
        1_310_195_712,
        28_672,
        {
            "prefill_1024": 10.421,
            "prefill_8192": 46.427,
            "blend_query": 14.552,
            "recompute_100_query": 0.353,
            "lookup_1024": 4.02,
            "lookup_8192": 6.231,
            "load_l1_1024": 3.15,
            "load_l1_8192": 8.293,
            "load_hot_1024": 0.855,
            "load_hot_8192": 1.188,
        },
    ),
    "SmolLM2-135M (never-slower-h200-135m.json)": (
        106_168_320,
        23_040,
        {
            "prefill_1024": 13.091,
            "prefill_8192": 17.149,
            "blend_query": 19.551,
            "recompute_100_query": 0.663,
            "lookup_1024": 3.966,
            "lookup_8192": 8.914,
            "load_l1_1024": 3.422,
            "load_l1_8192": 8.413,
            "load_hot_1024": 0.953,
            "load_hot_8192": 1.113,
        },
    ),
}


@dataclass(frozen=True)
class Tier:
    """A second tier.

    Attributes:
        name: Its name.
        gigabytes: Its size, in 10^9 bytes; 0: without a limit.
        bandwidth: 10^9 bytes a second that are read from it.
    """

    name: str
    gigabytes: float
    bandwidth: float

    @classmethod
    def parse(cls, text: str) -> Tier:
        """From NAME:GB:GB/s, for example disk:2000:6.

        Raises:
            ConfigError: It has another form.
        """
        name, *numbers = text.split(":")
        try:
            size, rate = (float(number) for number in numbers)
        except ValueError:
            size = rate = math.nan
        if not name or not (math.isfinite(size) and size >= 0 and math.isfinite(rate) and rate > 0):
            raise ConfigError(
                f"--tier {text!r} is not NAME:GB:GB/s.",
                remedy="For example --tier disk:2000:6; 0 GB is without a limit.",
            )
        if name in (GPU, MEMORY):
            raise ConfigError(f"--tier {text!r}: {name} is a tier that is always there.", remedy="Choose another name.")
        return cls(name, size, rate)


@dataclass(frozen=True)
class Costs:
    """What an engine's work takes.

    Attributes:
        figures: Milliseconds by the names of `lmcache_rag.costs.CostModel.figures`.
        source: Where they come from, for people.
        measured: Whether the server that is planned for measured them itself.
    """

    figures: Mapping[str, float]
    source: str
    measured: bool = False

    def __post_init__(self) -> None:
        if not all(self.figures.get(name, 0.0) > 0 for name in _NEEDED):
            raise ConfigError(
                f"{self.source}: what a prefill takes is not known.", remedy="Ask it some questions first."
            )

    @property
    def blends(self) -> bool:
        """Whether it is known what a blend takes."""
        return all(name in self.figures for name in _BLENDS)

    @property
    def token_ms(self) -> float:
        """What one more token of a prefill takes, in milliseconds, above 0."""
        few, many = (self.figures[name] for name in _NEEDED)
        return max(many - few, 0.01 * many) / (MANY - FEW)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a long prefill a second."""
        return 1000 / self.token_ms

    def prefill_ms(self, tokens: float) -> float:
        """What a prefill of so many tokens takes: a line through both figures, or a parabola if they rise faster."""
        few, many = (self.figures[name] for name in _NEEDED)
        if tokens <= 0:
            return 0.0
        if many > few * MANY / FEW:  # attention: a*n + b*n*n
            bend = (many / MANY - few / FEW) / (MANY - FEW)
            return tokens * (few / FEW + bend * (tokens - FEW))
        return max(few + (tokens - FEW) * self.token_ms, 0.0)

    def lookup_ms(self, tokens: float) -> float:
        """What a look-up takes for a prompt of so many tokens."""
        return self._line("lookup", tokens)

    def load_ms(self, tier: str, tokens: float) -> float:
        """What loading so many tokens takes: "l1", LMCache's memory, or "hot", vLLM's own cache."""
        return self._line(f"load_{tier}", tokens) if tokens > 0 else 0.0

    def _line(self, name: str, tokens: float) -> float:
        few, many = (self.figures.get(f"{name}_{size}", 0.0) for size in (FEW, MANY))
        return max(few + (tokens - FEW) / (MANY - FEW) * (many - few), 0.0)

    def scaled(self, compute: float, load: float, source: str) -> Costs:
        """For another model: prefills and passes take `compute` times as long, loads `load` times."""
        return Costs(
            {
                name: ms * (load if name.startswith("load") else 1.0 if name.startswith("lookup") else compute)
                for name, ms in self.figures.items()
            },
            source,
        )


def server_costs(figures: Mapping[str, float], url: str) -> Costs | None:
    """The costs that a server measured itself, by `lmcache_rag.protocol.costs`; None if it has measured no prefill."""
    if not all(figures.get(name, 0.0) > 0 for name in _NEEDED):
        return None
    return Costs(dict(figures), f"measured by {url} itself", measured=True)


def known_costs(model: Geometry, tokens_per_second: float = 0.0) -> Costs:
    """Costs of a model from what is in docs/results: those of the model nearest in size, scaled to this one.

    Args:
        model: The model.
        tokens_per_second: Of its prefill, if that is known; 0: by its number of parameters.
    """
    wanted = model.parameters or 6_979_321_856 * model.bytes_per_token / 131_072
    name = min(MEASURED, key=lambda each: abs(math.log(MEASURED[each][0] / wanted)))
    parameters, nbytes, figures = MEASURED[name]
    costs, load = Costs(figures, f"docs/results: {name}, one H200"), model.bytes_per_token / nbytes
    if tokens_per_second > 0:
        per_token = 1000 / tokens_per_second
        source = f"--prefill-tokens-per-s {tokens_per_second:g}; the rest scaled from docs/results: {name}, one H200"
        made = costs.scaled(per_token / costs.token_ms, load, source)
        return replace(
            made, figures={**made.figures, **{n: s * per_token for n, s in zip(_NEEDED, (FEW, MANY), strict=True)}}
        )
    ratio = wanted / parameters
    if abs(ratio - 1) < 0.05 and abs(load - 1) < 0.05:
        return costs
    return costs.scaled(ratio, load, f"scaled by {ratio:.2g} from docs/results: {name}, one H200")


# -- one prompt -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What all questions have in common.

    Attributes:
        model: The model.
        costs: Its costs.
        tiers: Second tiers.
        question: Tokens of a prompt that are always computed: question and template.
        chunk: Tokens of an LMCache chunk.
        blends: Whether chunks are blended; else only exact prefixes are reused.
    """

    model: Geometry
    costs: Costs
    tiers: tuple[Tier, ...] = ()
    question: int = 64
    chunk: int = LMCACHE_CHUNK
    blends: bool = True

    def without_ms(self, tokens: int) -> float:
        """TTFT of a prompt of so many tokens without reuse, beyond HTTP and scheduling."""
        return self.costs.prefill_ms(tokens + self.question)

    def with_ms(self, found: Mapping[str, int], chunks: int) -> float:
        """TTFT of a prompt of which these tokens were found, by tier, "" for those that were not.

        A blend looks up, loads, selects, and computes what was not found, the question and what `auto` recomputes at
        least. Where computing the whole prompt takes no longer the server does that, as with `min_gain`.

        Args:
            found: Tokens by tier.
            chunks: Chunks of the prompt.
        """
        tokens = sum(found.values())
        reused = tokens - found.get("", 0)
        whole = self.without_ms(tokens)
        if not reused:
            return whole
        time = self.costs.lookup_ms(tokens) + self.costs.load_ms("hot", found.get(GPU, 0))
        time += self.costs.load_ms("l1", reused - found.get(GPU, 0))  # from a tier it comes by way of the memory
        time += sum(self.read_ms(tier, found.get(tier.name, 0)) for tier in self.tiers)
        left = found.get("", 0) + self.question
        if not self.blends or not self.costs.blends:
            return min(time + self.costs.prefill_ms(tokens + self.question) - self.costs.prefill_ms(reused), whole)
        recomputed = AutoRule().bounds(max(round(chunks * reused / tokens), 1), reused)[0]
        time += (
            self.costs.figures["blend_query"] + (recomputed + left) * self.costs.figures["recompute_100_query"] / 100
        )
        return min(time, whole)

    def read_ms(self, tier: Tier, tokens: int) -> float:
        """What reading so many tokens from a second tier takes."""
        return tokens * self.model.bytes_per_token / tier.bandwidth / 1e6

    def break_even(self, tokens: int) -> float:
        """Bandwidth of a tier in GB/s below which reading a chunk of so many tokens takes longer than computing it.

        Computing is what a blend takes to compute the chunk in full, or a prefill if that is faster. The way from
        memory to the GPU, and the tokens that `auto` recomputes of each chunk at least, count to reading. Infinite if
        these alone take as long as computing.
        """
        each = self.costs.token_ms
        redo = 0.0
        if self.blends and self.costs.blends:
            one = self.costs.figures["recompute_100_query"] / 100
            each, redo = min(each, one), one * (AutoRule.per_chunk or 0)
        saved = tokens * each - redo
        saved -= self.costs.load_ms("l1", FEW + tokens) - self.costs.load_ms("l1", FEW)
        return tokens * self.model.bytes_per_token / saved / 1e6 if saved > 0 else math.inf


# -- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """What may be retrieved. `tokens` is the mean length of a chunk."""

    chunks: int
    tokens: int

    def __post_init__(self) -> None:
        if self.chunks < 1 or self.tokens < 1:
            raise ConfigError(
                "A corpus has at least one chunk of at least one token.", remedy="--chunks, --chunk-tokens"
            )


@dataclass(frozen=True)
class Plan:
    """The whole answer.

    Attributes:
        setup: Model, costs, tiers.
        corpus: The corpus.
        trace: What the requests are, for people.
        memory_gb: CPU memory for KV, as `--l1-gb` counts it (GiB).
        curves: Hit rates by the name of a policy: "lru", "second use".
        found: Of the memory with all tiers, request by request.
        memory_only: The same without second tiers.
        chunks: Mean number of chunks of a request.
    """

    setup: Setup
    corpus: Corpus
    trace: str
    memory_gb: float
    curves: Mapping[str, Curve]
    found: Found
    memory_only: Found
    chunks: float
    notes: tuple[str, ...] = field(default=())

    @property
    def chunk_bytes(self) -> int:
        """What LMCache keeps of one chunk, in bytes."""
        return self.setup.model.chunk_bytes(self.corpus.tokens, self.setup.chunk)

    @property
    def corpus_bytes(self) -> int:
        """What it keeps of all of them."""
        return self.chunk_bytes * self.corpus.chunks

    @property
    def gpu_hours(self) -> float:
        """Hours that one GPU takes to compute the KV of all chunks."""
        return self.corpus.chunks * self.corpus.tokens * self.setup.costs.token_ms / 3.6e6

    @property
    def gpu_time(self) -> str:
        """The same in words."""
        hours = self.gpu_hours
        return f"{hours:,.1f} GPU hours" if hours >= 1 else f"{60 * hours:,.1f} GPU minutes"

    def objects(self, gigabytes: float) -> float:
        """LMCache objects in so many GiB of memory."""
        return gigabytes * GIB / self.setup.model.object_bytes(self.setup.chunk)

    @property
    def sizes(self) -> list[float]:
        """Sizes of memory for the curve, in GiB: up to what holds everything, each so many times the last."""
        whole = max(self.curves["lru"].sizes[-1:] or (1,))
        most = 1.05 * whole * self.setup.model.object_bytes(self.setup.chunk) / GIB / USABLE  # 1.05: rounded below
        steps = 14
        least = max(most / 4000, 1e-6)
        made = [least * (most / least) ** (step / (steps - 1)) for step in range(steps)]
        return sorted({*(float(f"{size:.2g}") for size in made), self.memory_gb})

    def rates(self) -> list[tuple[float, dict[str, float]]]:
        """(GiB, hit rate by policy), ascending."""
        return [
            (size, {name: curve.lmcache_rate(self.objects(size)) for name, curve in self.curves.items()})
            for size in self.sizes
        ]

    def ttft(self, found: Found) -> tuple[float, float]:
        """Mean TTFT (with, without) in milliseconds, over all requests."""
        with_ms = without = 0.0
        for request in found.requests:
            tokens = {tier: count * self.setup.chunk for tier, count in request.items()}
            with_ms += self.setup.with_ms(tokens, max(round(self.chunks), 1))
            without += self.setup.without_ms(sum(tokens.values()))
        count = max(len(found.requests), 1)
        return with_ms / count, without / count

    def best_ttft(self) -> tuple[float, float]:
        """The same for a prompt of which everything is in memory."""
        tokens = round(self.chunks) * (self.corpus.tokens // self.setup.chunk) * self.setup.chunk
        return self.setup.with_ms({MEMORY: tokens}, max(round(self.chunks), 1)), self.setup.without_ms(tokens)

    def fits(self) -> bool:
        """Whether all chunks stay in memory: LMCache evicts nothing below its watermark."""
        return self.corpus_bytes < WATERMARK * self.memory_gb * GIB

    def gain(self, found: Found) -> float:
        """By which share the mean TTFT is shorter."""
        with_ms, without = self.ttft(found)
        return 1 - with_ms / without if without else 0.0


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Attributes:
        number: 1: all fits; 2: the hot part fits; 3: a second tier pays; 4: precomputing does not pay.
        title: In a few words.
        reasons: Why, a sentence each.
        commands: What to run.
    """

    number: int
    title: str
    reasons: tuple[str, ...]
    commands: tuple[str, ...]


def advise(plan: Plan, model: str, *, folder: str = "/var/lib/kv") -> Advice:
    """Which of four set-ups this is, why, and the commands.

    Args:
        plan: The plan.
        model: The model's name for the commands.
        folder: Where a tier on disk keeps its files.
    """
    best, without = plan.best_ttft()
    memory, whole = plan.gain(plan.memory_only), plan.gain(plan.found)
    serve = f"lmcache-rag serve {model} --l1-gb {plan.memory_gb:g}"
    if 1 - best / without < WORTH:
        reason = (
            f"Even with all KV in memory a prompt would start after {best:,.0f} ms instead of {without:,.0f}: prompts "
            "are too short, or the model too small, for loading to beat computing."
        )
        return Advice(4, "Precomputing does not pay", (reason,), (f"vllm serve {model}",))
    if plan.fits():
        reasons: tuple[str, ...] = (
            f"All {plan.corpus.chunks:,} chunks take {plan.corpus_bytes / GB:,.1f} GB, less than the "
            f"{WATERMARK * plan.memory_gb * GIB / GB:,.1f} GB that LMCache fills of --l1-gb {plan.memory_gb:g} before "
            "it evicts.",
            f"Computing them takes {plan.gpu_time}, once, and again when LMCache has restarted.",
        )
        commands = (serve, "lmcache-rag ingest DOCUMENTS --engine http://localhost:8000")
        return Advice(1, "All KV fits into memory", reasons, commands)
    tiers = plan.setup.tiers
    need = plan.setup.break_even(plan.corpus.tokens)
    fast = [tier for tier in tiers if tier.bandwidth >= need]
    slow = [tier for tier in tiers if tier.bandwidth < need]
    facts = [
        f"{tier.name} reads {tier.bandwidth:g} GB/s, {'above' if tier in fast else 'below'} the break-even of "
        f"{need:,.2g} GB/s."
        for tier in tiers
    ]
    facts += _second_use(plan)
    if max(memory, whole) < WORTH:
        low = (
            f"The mean TTFT would be shorter by {max(memory, whole):.0%} only: {plan.found.rate:.0%} of the chunks "
            "are found."
        )
        return Advice(4, "Precomputing does not pay", (low, *facts), (f"vllm serve {model}",))
    lazily = "lmcache-rag ingest DOCUMENTS --no-kv --engine http://localhost:8000"
    if fast and whole - memory >= TIER_WORTH:
        reasons = (
            f"With {', '.join(tier.name for tier in tiers)} {plan.found.rate:.0%} of the chunks are found instead of "
            f"{plan.memory_only.rate:.0%}, and the mean TTFT is shorter by {whole:.0%} instead of {memory:.0%}.",
            *facts,
        )
        shown = " ".join(f"--l2 '{tier_json(tier, folder)}'" for tier in tiers if tier not in slow)
        return Advice(3, "A second tier pays", reasons, (f"{serve} --store ingest {shown}", lazily))
    reasons = (
        f"{plan.memory_only.rate:.0%} of the chunks are found in {plan.memory_gb:g} GB of memory, and the mean TTFT is "
        f"shorter by {memory:.0%}.",
        f"The whole corpus would take {plan.corpus_bytes / GB:,.0f} GB and {plan.gpu_time}: keep what is asked for.",
        *facts,
    )
    return Advice(2, "The hot part fits into memory", reasons, (f"{serve} --store ingest", lazily))


def _second_use(plan: Plan) -> list[str]:
    """A sentence where storing chunks at their second use finds more."""
    size = plan.objects(plan.memory_gb)
    first, second = (plan.curves[name].lmcache_rate(size) for name in ("lru", "second use"))
    if second - first < SECOND_WORTH:
        return []
    return [
        f"Chunks that are stored at their second use only (lazy_fill second) would be found in {second:.0%} instead of "
        f"{first:.0%} of their uses."
    ]


def tier_json(tier: Tier, folder: str) -> str:
    """LMCache's JSON of a second tier with a limit that it keeps to: its files on disk, or Valkey by its name."""
    limit = f', "max_capacity_gb": {tier.gigabytes * GB / GIB:.0f}, "eviction": {{"eviction_policy": "LRU"}}'
    limit = limit if tier.gigabytes else ""
    if tier.name.lower() in ("valkey", "redis"):
        return f'{{"type": "valkey", "startup_nodes": "localhost:6379"{limit}}}'
    return f'{{"type": "fs_native", "base_path": "{folder}"{limit}}}'


def worth_keeping(curve: Curve, share: float = 0.9) -> int:
    """The size of cache, in objects, that reaches this share of the most hits that there can be."""
    wanted = share * (curve.hits[-1] if curve.hits else 0)
    return next((size for size, hits in zip(curve.sizes, curve.hits, strict=True) if hits >= wanted), 0)


def by_tier(found: Found, tiers: Sequence[Tier]) -> dict[str, float]:
    """The share of objects that was found in each tier, the memory first; "" for those not found."""
    total = found.objects
    whole = sum(total.values()) or 1
    return {name: total[name] / whole for name in (GPU, MEMORY, *(tier.name for tier in tiers), "")}
