"""Settings of the connector, from vLLM's kv_connector_extra_config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from lmcache_rag.budget import FORMS, Budget, Ratio, parse_budget, read_budget
from lmcache_rag.errors import ConfigError
from lmcache_rag.policies import get_policy
from lmcache_rag.protocol import DEFAULT_MIN_GAIN, DEFAULT_POLICY, DEFAULT_RATIO, RATIO, shown

STORES = ("ingest", "second", "all")


@dataclass(frozen=True)
class ConnectorOptions:
    """Settings of the connector; the key of each is ``lmcache_rag.<name>``.

    Attributes:
        policy: Recompute policy where a request names none.
        ratio: How many cached tokens to recompute where a request does not say: "auto", a share in [0, 1], or
            {"tokens": N}.
        blend: Whether to blend requests that do not specify it.
        deadline: Longest wait for LMCache in a step, in seconds; then everything is computed.
        lookup_deadline: Longest that a request waits for its look-up, in seconds.
        poll: How long a step waits for a look-up that is under way while nothing else runs, in seconds.
        least_tokens: Fewer matched tokens than this are not blended.
        tail_tokens: The rest of the prompt after the last cached chunk is computed with the blend up to this length.
        hot: Whether chunks that are resident in vLLM's own KV cache are copied instead of loaded.
        overlap: Whether KV is loaded and blended during the steps of other requests. If not, a step waits for it.
        step_tokens: Most tokens that blends compute in one step while other requests run: a bound on how long these
            wait. Without overlap, the first blend of a step is not bounded.
        idle_tokens: A blend that computes more runs in pieces of step_tokens even while no other request does, so that
            a new request waits for one piece only. 0: every blend.
        store: Whose KV LMCache stores: of "all" requests; of those that "ingest" (lmcache_rag.protocol.INGEST) only; or
            of these and of what other prompts begin with for the "second" time, see second_use.
        self_check: Whether a blend is compared with a full prefill at start, see lmcache_rag.connector.self_check.
        fp8_kv: Whether an FP8 KV cache is blended, which was not measured on a GPU yet.
        chunk_size: Tokens of an LMCache chunk, published on /metrics; 0: not published. Does not configure LMCache.
        ingest_key_file: File of the key that ingesting and forgetting need; "": every client may do both.
        secret_file: File with the secret by which token ids are mapped, see lmcache_rag.connector.secret; "": the
            environment has it.
        prefix_tokens: Prompts of clients that name no prefix share KV by their first so many tokens, a multiple of
            LMCache's chunk; 0: by their first chunk.
        tenants: Whether LMCache's server is told whose KV it is, for budgets of tenants.
        min_gain: A request is blended if that is predicted to give its first token earlier by at least this share of
            the time that computing it takes, in [0, 1). null or "off": always, whatever it takes.
    """

    policy: str = DEFAULT_POLICY
    ratio: Ratio = DEFAULT_RATIO
    blend: bool = True
    deadline: float = 5.0
    lookup_deadline: float = 5.0
    poll: float = 0.03
    least_tokens: int = 128
    tail_tokens: int = 512
    hot: bool = True
    overlap: bool = True
    step_tokens: int = 2048
    idle_tokens: int = 8192
    store: str = "all"
    self_check: bool = True
    fp8_kv: bool = False
    chunk_size: int = 0
    ingest_key_file: str = ""
    secret_file: str = ""
    prefix_tokens: int = 0
    tenants: bool = False
    min_gain: float | None = DEFAULT_MIN_GAIN

    def __post_init__(self) -> None:
        get_policy(self.policy)
        if read_budget(self.ratio) is None:
            raise ConfigError(f"{RATIO} is not {FORMS}; got {shown(self.ratio)}.")
        if self.min_gain is not None and not 0 <= self.min_gain < 1:
            raise ConfigError(f"lmcache_rag.min_gain must be off, or at least 0 and below 1; got {self.min_gain}.")
        if self.store not in STORES:
            raise ConfigError(f"lmcache_rag.store must be one of {', '.join(STORES)}; got {self.store!r}.")
        if self.step_tokens < 1:
            raise ConfigError(f"lmcache_rag.step_tokens must be at least 1; got {self.step_tokens}.")
        for name in (
            "prefix_tokens",
            "deadline",
            "lookup_deadline",
            "poll",
            "least_tokens",
            "tail_tokens",
            "idle_tokens",
            "chunk_size",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"lmcache_rag.{name} must not be negative; got {getattr(self, name)}.")

    @property
    def budget(self) -> Budget:
        """The ratio as a budget."""
        return parse_budget(self.ratio)

    @classmethod
    def read(cls, get: Callable[[str, Any], Any]) -> ConnectorOptions:
        """Read the settings by vLLM's get_from_extra_config(key, default).

        Raises:
            ConfigError: A value is out of range or of the wrong type.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            value = get(f"lmcache_rag.{item.name}", item.default)
            if item.name == "ratio":
                budget = read_budget(value)  # of several types, checked in __post_init__
                values["ratio"] = value if budget is None else budget.wire
                continue
            if item.name == "min_gain" and value in (None, "off"):
                values[item.name] = None
                continue
            kind: type = type(item.default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"lmcache_rag.{item.name} must be of type {kind.__name__}; got {value!r}.")
            values[item.name] = value
        return cls(**values)
