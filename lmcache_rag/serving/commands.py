"""What to run: LMCache's blend server, and vLLM with our connector, each with every flag."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmcache_rag.errors import ConfigError

PLUGIN = "lmcache_rag"
CONNECTOR = {
    "kv_connector": "CacheBlendConnector",
    "kv_connector_module_path": "lmcache_rag.connector.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",  # vLLM's own default ends the request
}
BLOCK = 16  # vLLM's own default on CUDA
MOST_BATCHED_TOKENS = 8192  # a pass over a whole prompt of usual length fits into one
MOST_GRAPH_TOKENS = 2048  # a blend's longest piece: launched kernel by kernel, several ranks wait for the host
GPU_SHARE = 0.85  # LMCache's server needs memory of its own on the GPU
WAIT_S, HEARTBEAT_S = 60, 5  # LMCache's own defaults let vLLM wait for minutes
L1_GB, L1_SHARE = 20.0, 0.4
_GRAPHS = (
    "--enforce-eager",
    "--max-cudagraph-capture-size",
    "--cudagraph-capture-sizes",
    "-cc",
    "--compilation-config",
)
_SIZES = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))


@dataclass(frozen=True)
class ServeOptions:
    """What the user asks for.

    Attributes:
        model: Folder or Hugging Face name.
        vllm: Options for vLLM as they stand; they win over ours.
        host: Where vLLM listens.
        port: Where vLLM listens.
        policy: Recompute policy where a request names none.
        ratio: Share of the cached tokens to recompute.
        l1_gb: Gigabytes of CPU memory for KV; None: 20, or 40% of the machine's memory where that is less.
        l2: Second tiers: a folder, redis://host:port, or LMCache's JSON.
        chunk_size: Tokens of an LMCache chunk.
        lmcache_port: Where LMCache listens for vLLM.
        lmcache_http_port: Where LMCache listens for health checks.
        step_tokens: Most tokens that blends compute in a step while other requests run; None: the connector's default.
    """

    model: str
    vllm: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    policy: str = "query"
    ratio: float = 0.15
    l1_gb: float | None = None
    l2: tuple[str, ...] = ()
    chunk_size: int = 64
    lmcache_port: int = 5555
    lmcache_http_port: int = 8089
    step_tokens: int | None = None


@dataclass(frozen=True)
class Commands:
    """Two commands and where their servers answer.

    Attributes:
        lmcache: Arguments of ``lmcache``.
        vllm: Arguments of ``vllm``.
        environment: Variables for vLLM on top of the present ones.
        url: vLLM's address as seen from this machine.
        lmcache_url: LMCache's address for health checks.
        api_key: Key that vLLM asks for, or "".
        blends: Whether vLLM is started with our connector.
        l1_gb: Gigabytes of CPU memory for KV.
    """

    lmcache: tuple[str, ...]
    vllm: tuple[str, ...]
    url: str
    lmcache_url: str
    environment: Mapping[str, str] = field(default_factory=dict)
    api_key: str = ""
    blends: bool = True
    l1_gb: float = L1_GB

    def lmcache_run(self) -> list[str]:
        """The command, independent of PATH."""
        return [sys.executable, "-m", "lmcache.cli.main", *self.lmcache]

    def vllm_run(self) -> list[str]:
        """The command, independent of PATH."""
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", *self.vllm]

    def shell(self) -> list[str]:
        """Both as lines for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [shlex.join(["lmcache", *self.lmcache]), " ".join([*variables, shlex.join(["vllm", *self.vllm])])]


def commands(options: ServeOptions, environment: Mapping[str, str] | None = None) -> Commands:
    """Work out both commands.

    Args:
        options: What the user asks for.
        environment: Present environment variables; default: this process's.

    Raises:
        ConfigError: Options that cannot work together.
    """
    environment = os.environ if environment is None else environment
    given = _Given(options.vllm)
    _check_chunk(options, given)
    port = given.value("--port") or str(options.port)
    if not port.isdigit():
        raise ConfigError(f"--port {port!r} is no number.")
    l1_gb = _default_l1_gb() if options.l1_gb is None else options.l1_gb
    if l1_gb <= 0:
        raise ConfigError(f"--l1-gb must be more than 0; got {l1_gb:g}.")
    lmcache = [
        "server",
        *("--engine-type", "blend"),
        *("--supported-transfer-mode", "lmcache_driven"),
        *("--chunk-size", str(options.chunk_size)),
        *("--l1-size-gb", f"{l1_gb:g}"),
        *("--eviction-policy", "LRU"),
        *("--host", "localhost"),
        *("--port", str(options.lmcache_port)),
        *("--http-host", "127.0.0.1"),
        *("--http-port", str(options.lmcache_http_port)),
    ]
    if (gpus := given.gpus()) > 1:
        lmcache += ["--max-gpu-workers", str(gpus)]  # one for each GPU, or they wait for each other
    for tier in options.l2:
        lmcache += ["--l2-adapter", second_tier(tier)]
    extra = {
        "lmcache.mp.host": "tcp://localhost",
        "lmcache.mp.port": options.lmcache_port,
        "lmcache.mp.mq_timeout": WAIT_S,
        "lmcache.mp.heartbeat_interval": HEARTBEAT_S,
        "lmcache_rag.policy": options.policy,
        "lmcache_rag.ratio": options.ratio,
        "lmcache_rag.chunk_size": options.chunk_size,
    }
    if options.step_tokens is not None:
        extra["lmcache_rag.step_tokens"] = options.step_tokens
    ours = {
        "--host": options.host,
        "--port": str(options.port),
        "--max-num-batched-tokens": str(MOST_BATCHED_TOKENS),
        "--gpu-memory-utilization": str(GPU_SHARE),
        "--kv-transfer-config": json.dumps({**CONNECTOR, "kv_connector_extra_config": extra}),
    }
    if given.ranks() > 1 and not any(given.has(name) for name in _GRAPHS):
        ours["--max-cudagraph-capture-size"] = str(MOST_GRAPH_TOKENS)
    vllm = ["serve", options.model]
    for name, value in ours.items():
        if not given.has(name):
            vllm += [name, value]
    return Commands(
        tuple(lmcache),
        (*vllm, *options.vllm),
        _address(given.value("--host") or options.host, port, given),
        f"http://127.0.0.1:{options.lmcache_http_port}",
        _plugin_allowed(environment),
        given.value("--api-key") or environment.get("VLLM_API_KEY", ""),
        not given.has("--kv-transfer-config") or CONNECTOR["kv_connector"] in " ".join(options.vllm),
        l1_gb,
    )


def second_tier(text: str) -> str:
    """LMCache's JSON for a second tier: from a folder, redis://host:port, or that JSON itself.

    Raises:
        ConfigError: It is none of them.
    """
    remedy = 'Give a folder, redis://host:port, or LMCache\'s JSON with a "type" (see lmcache server --help).'
    if text.lstrip().startswith("{"):
        try:
            tier = json.loads(text)
        except ValueError as problem:
            raise ConfigError(f"--l2 {text!r} is no JSON: {problem}.", remedy=remedy) from None
        if not isinstance(tier.get("type"), str):
            raise ConfigError(f'--l2 {text!r} has no "type".', remedy=remedy)
        return json.dumps(tier)
    scheme, found, rest = text.partition("://")
    if not found:
        if not text.strip():
            raise ConfigError("--l2 is empty.", remedy=remedy)
        return json.dumps({"type": "fs", "base_path": text})
    host, _, port = rest.rstrip("/").rpartition(":")
    if scheme not in ("redis", "valkey") or not host or not port.isdigit() or "@" in host:
        raise ConfigError(f"--l2 {text!r} is not known.", remedy=remedy)
    return json.dumps({"type": "resp", "host": host.strip("[]"), "port": int(port)})


class _Given:
    """Options that vLLM was given. vLLM takes --a-b, --a_b, and --a-b=value."""

    def __init__(self, words: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for index, word in enumerate(words):
            if word.startswith("-"):
                name, found, value = word.partition("=")
                following = words[index + 1] if index + 1 < len(words) else ""
                self._values[name.replace("_", "-")] = value if found else following

    def has(self, name: str) -> bool:
        return any(known == name or known.startswith(f"{name}.") for known in self._values)

    def value(self, name: str) -> str:
        return self._values.get(name, "")

    def gpus(self) -> int:
        """How many vLLM takes: ranks of a replica, times replicas."""
        return math.prod(self._size(*names) for names in _SIZES)

    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self._size(*_SIZES[0])

    def _size(self, long: str, short: str) -> int:
        size = self.value(long) or self.value(short)
        return int(size) if size.isdigit() and int(size) else 1


def _check_chunk(options: ServeOptions, given: _Given) -> None:
    text = given.value("--block-size")
    block = int(text) if text.isdigit() and int(text) else BLOCK
    if options.chunk_size <= 0 or options.chunk_size % block:
        raise ConfigError(
            f"--chunk-size {options.chunk_size} is not a multiple of vLLM's block size, {block}.",
            remedy=f"For example --chunk-size {max(64 // block, 1) * block}.",
        )


def _address(host: str, port: str, given: _Given) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    scheme = "https" if given.has("--ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _plugin_allowed(environment: Mapping[str, str]) -> dict[str, str]:
    """VLLM_PLUGINS, once set, must name our plugin, or the connector is not given the model."""
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return {}
    return {"VLLM_PLUGINS": f"{allowed},{PLUGIN}" if allowed else PLUGIN}


def _default_l1_gb() -> float:
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return L1_GB
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
        memory = min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1.0, min(L1_GB, float(int(memory / 2**30 * L1_SHARE))))
