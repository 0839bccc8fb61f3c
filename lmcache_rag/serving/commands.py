"""The command lines of LMCache's blend server and of vLLM with our connector, with every flag and environment."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lmcache_rag.budget import Ratio, parse_budget
from lmcache_rag.connector.authorization import MIDDLEWARE
from lmcache_rag.connector.lmcache_server.settings import MODULE, ServerSettings
from lmcache_rag.connector.secret import FILE_VARIABLE, VARIABLE
from lmcache_rag.credentials import api_key, read_ingest_key, state_file
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import DEFAULT_MIN_GAIN, DEFAULT_POLICY, DEFAULT_RATIO, LMCACHE_CHUNK, VLLM_BLOCK
from lmcache_rag.serving import coordinator as fleet
from lmcache_rag.serving.coordinator import Coordinator
from lmcache_rag.serving.machine import VLLMBuild, recurrent
from lmcache_rag.serving.tiers import OPTION, checked_tier, second_tier, variables

PLUGIN = "lmcache_rag"
FILLS_IN = "lmcache_rag.serving.lmcache_server"  # LMCache's program, with placeholders filled in and tiers checked
CONNECTOR = {
    "kv_connector": "CacheBlendConnector",
    "kv_connector_module_path": "lmcache_rag.connector.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",  # vLLM's own default ends the request
}
MOST_BATCHED_TOKENS = 8192  # a pass over a whole prompt of usual length fits into one
MOST_GRAPH_TOKENS = 2048  # a blend's longest piece: launched kernel by kernel, several ranks would wait for the CPU
GPU_SHARE = 0.85  # LMCache's server needs GPU memory too
CPU_BLOCK, CPU_SHARE, CPU_L1_SHARE = 32, 0.4, 0.2  # vLLM for CPUs: blocks that its kernels prefer, shares of the memory
ON_A_CPU = (
    "This vLLM is built for CPUs: prompts that begin alike share their KV, and nothing is blended, which needs an "
    "NVIDIA GPU. The embedded engine blends on a CPU: lmcache-rag ingest and ask without --engine."
)
HOST, PORT = "127.0.0.1", 8000
WAIT_S, HEARTBEAT_S = 60, 5  # LMCache's own defaults let vLLM wait for minutes
L1_GB, L1_SHARE = 20.0, 0.4
_GRAPHS = (
    "--enforce-eager",
    "--max-cudagraph-capture-size",
    "--cudagraph-capture-sizes",
    "-cc",
    "--compilation-config",
)
_COMMAND, _API_SERVER = "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"
_EXAMPLE = "For example --connector lmcache_rag.overlap=false."
_TRANSFER = "--kv-transfer-config"
_PREFIX_CACHE = "--enable-prefix-caching"  # vLLM 0.25 has it off for recurrent layers; 0.32 on
_CACHED_TOKENS = "--enable-prompt-tokens-details"  # answers say how many tokens came from it
_SIZES = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))
_LMCACHE_NAMES = {
    "DO_NOT_TRACK",
    "HOME",
    "HOSTNAME",
    "LANG",
    "LANGUAGE",
    "LOGNAME",
    "PATH",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TEMP",
    "TERM",
    "TMP",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
}
_LMCACHE_PREFIXES = (
    "CUDA_",
    "LC_",
    "LD_",
    "LMCACHE_",
    "MKL_",
    "NCCL",
    "NUMBA_",
    "NVIDIA_",
    "OMP_",
    "OPENBLAS_",
    "PROMETHEUS_",
    "PYTHON",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
    "UCX_",
)
_NEVER = ("LMCACHE_RAG_",)  # ours: the secret, keys
_PREFIXES_BY_TIER = {
    "s3": ("AWS_",),
    "sagemaker_hyperpod": ("AWS_", "SAGEMAKER_"),
    "bigtable": ("GOOGLE_",),
    "hfbucket": ("HF_",),
}
_PROXIES = {f"{kind}_proxy" for kind in ("http", "https", "no", "all")}


@dataclass(frozen=True)
class ServeOptions:
    """The options of `lmcache-rag serve`.

    Attributes:
        model: Folder or Hugging Face name.
        vllm: Options passed on to vLLM; they override ours.
        host: Host on which vLLM listens; None: by its own file of options, or 127.0.0.1.
        port: Port on which vLLM listens; None: by its own file of options, or 8000.
        policy: Recompute policy where a request names none.
        ratio: How many cached tokens to recompute where a request does not say: "auto", a share, or {"tokens": N}.
        min_gain: A request is blended if its first token comes earlier by this share; None: always.
        l1_gb: Gigabytes of CPU memory for KV; None: 20, or 40% of the machine's memory where that is less.
        l2: Second tiers: a folder, redis://host:port, or LMCache's JSON.
        chunk_size: Tokens of an LMCache chunk.
        lmcache_port: Port on which LMCache listens for vLLM.
        lmcache_http_port: Port on which LMCache listens for health checks.
        step_tokens: Most tokens that blends compute in a step while other requests run; None: the connector's default.
        connector: More keys of kv_connector_extra_config, as KEY=VALUE; they override ours.
        keeps: Which KV LMCache stores and indexes.
        prefix_tokens: First tokens by which prompts of clients that name no prefix share KV; None: one chunk.
        secret_file: File with the secret that KV is stored under; None: by the environment, or with second tiers one in
            the user's state folder, or a new secret for each start.
        ingest_key_file: File of the key that ingesting and forgetting need; None: they need none.
        coordinator: "start" or a URL: LMCache's coordinator, which has the index of several servers; "": by LMCache's
            own variable, or none.
        coordinator_listen: HOST:PORT of one that is started; "": 127.0.0.1:9300.
        instance_id: This server's name in the coordinator; "": the machine's name and LMCache's port.
    """

    model: str
    vllm: tuple[str, ...] = ()
    host: str | None = None
    port: int | None = None
    policy: str = DEFAULT_POLICY
    ratio: Ratio = DEFAULT_RATIO
    min_gain: float | None = DEFAULT_MIN_GAIN
    l1_gb: float | None = None
    l2: tuple[str, ...] = ()
    chunk_size: int = LMCACHE_CHUNK
    lmcache_port: int = 5555
    lmcache_http_port: int = 8089
    step_tokens: int | None = None
    connector: tuple[str, ...] = ()
    keeps: ServerSettings = field(default_factory=ServerSettings)
    prefix_tokens: int | None = None
    secret_file: Path | None = None
    ingest_key_file: Path | None = None
    coordinator: str = ""
    coordinator_listen: str = ""
    instance_id: str = ""


@dataclass(frozen=True)
class Commands:
    """Two commands, or three with a coordinator, and the addresses of their servers.

    Attributes:
        lmcache: Arguments of ``lmcache``; none: the model can only be served exactly, from vLLM's own prefix cache.
        vllm: Arguments of ``vllm``, or of its API server where this vLLM has no such command.
        environment: Variables for vLLM on top of the present ones.
        url: vLLM's address as seen from this machine.
        lmcache_url: LMCache's address for health checks.
        api_key: Key that vLLM requires, or "".
        blends: Whether requests can be blended: vLLM is started with our connector, and computes on a GPU.
        note: A note on these commands for the user; may be empty.
        l1_gb: Gigabytes of CPU memory for KV.
        secret_file: File with the secret of both; None: vLLM finds it in its environment, or draws one.
        build: The vLLM that these commands are for.
        coordinator: LMCache's coordinator; None: the server matches by itself.
    """

    lmcache: tuple[str, ...]
    vllm: tuple[str, ...]
    url: str
    lmcache_url: str
    environment: Mapping[str, str] = field(default_factory=dict)
    api_key: str = ""
    blends: bool = True
    note: str = ""
    l1_gb: float = L1_GB
    secret_file: Path | None = None
    build: VLLMBuild = field(default_factory=VLLMBuild)
    coordinator: Coordinator | None = None

    @property
    def tiers(self) -> list[str]:
        """LMCache's JSON of each second tier, with placeholders for passwords."""
        return [self.lmcache[n + 1] for n, word in enumerate(self.lmcache) if word == OPTION]

    @property
    def _program(self) -> str:
        return FILLS_IN if self.tiers else "lmcache.cli.main"

    def lmcache_run(self) -> list[str]:
        """The command, independent of PATH."""
        return [sys.executable, "-m", self._program, *self.lmcache]

    def lmcache_words(self) -> list[str]:
        """The command to show; nothing where it is not used."""
        if not self.lmcache:
            return []
        return [*(["python", "-m", FILLS_IN] if self._program == FILLS_IN else ["lmcache"]), *self.lmcache]

    def vllm_run(self) -> list[str]:
        """The command, independent of PATH."""
        return [sys.executable, "-m", _COMMAND if self.build.has_command else _API_SERVER, *self.vllm]

    def vllm_words(self) -> list[str]:
        """The command to show."""
        return [*(["vllm"] if self.build.has_command else ["python", "-m", _API_SERVER]), *self.vllm]

    def coordinator_words(self) -> list[str]:
        """The command of a coordinator that is started here, to show; empty without one."""
        return ["lmcache", *self.coordinator.command] if self.coordinator and self.coordinator.command else []

    def coordinator_run(self) -> list[str]:
        """The same, independent of PATH."""
        words = self.coordinator_words()
        return [sys.executable, "-m", "lmcache.cli.main", *words[1:]] if words else []

    def shell(self) -> list[str]:
        """All as lines for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        first = [
            shlex.join(words) for words in (self.coordinator_words(), self.lmcache and self.lmcache_words()) if words
        ]
        return [*first, " ".join([*variables, shlex.join(self.vllm_words())])]


def commands(
    options: ServeOptions, environment: Mapping[str, str] | None = None, build: VLLMBuild | None = None
) -> Commands:
    """Build both commands.

    Args:
        options: The user's options.
        environment: Present environment variables; default: this process's.
        build: The vLLM that they are for; default: the installed one.

    Raises:
        ConfigError: Options that cannot work together.
    """
    environment = os.environ if environment is None else environment
    build = build or VLLMBuild.installed()
    vllm_args = VLLMArgs(options.vllm)
    _check_secrets(vllm_args)
    _check_chunk(options, vllm_args, build)
    if name := vllm_args.dotted(_TRANSFER):
        raise ConfigError(
            f"{name}: vLLM would replace our --kv-transfer-config by these parts, not merge them.",
            remedy="Give a key of kv_connector_extra_config as --connector KEY=VALUE, or all of --kv-transfer-config.",
        )
    host, port = _place(options, vllm_args)
    if not port.isdigit():
        raise ConfigError(f"--port {port!r} is not a number.", remedy=f"For example --port {PORT}.")
    if (recurs := recurrent(options.model)) and not vllm_args.has(_TRANSFER):
        return _exact(options, vllm_args, build, environment, recurs)
    l1_gb = _default_l1_gb(CPU_L1_SHARE if build.cpu else L1_SHARE) if options.l1_gb is None else options.l1_gb
    if l1_gb <= 0:
        remedy = "Gigabytes of CPU memory, for example --l1-gb 20."
        raise ConfigError(f"--l1-gb must be more than 0; got {l1_gb:g}.", remedy=remedy)
    lmcache = [
        "server",
        *("--engine-type", "blend"),
        *("--supported-transfer-mode", "auto" if build.cpu else "lmcache_driven"),
        *("--chunk-size", str(options.chunk_size)),
        *("--l1-size-gb", f"{l1_gb:g}"),
        *("--eviction-policy", "LRU"),
        *("--host", "localhost"),
        *("--port", str(options.lmcache_port)),
        *("--http-host", "127.0.0.1"),
        *("--http-port", str(options.lmcache_http_port)),
        *("--server-module", json.dumps({"module_path": MODULE} | _server_config(options))),
    ]
    if (gpus := vllm_args.gpus()) > 1:
        lmcache += ["--max-gpu-workers", str(gpus)]  # one for each GPU, or they wait for each other
    place = fleet.coordinator(
        options.coordinator or environment.get(fleet.VARIABLE, ""),
        listen=options.coordinator_listen,
        instance_id=options.instance_id,
        chunk_size=options.chunk_size,
        lmcache_port=options.lmcache_port,
    )
    secret_file = _secret_file(options, environment, shared=bool(options.l2 or place))
    for tier in map(second_tier, options.l2):
        lmcache += [OPTION, checked_tier(fleet.shared_tier(tier) if place else tier, secret_file)]
    if options.l2:  # by default what left the memory once is read from the tier at each use, and never returns
        lmcache += ["--l2-prefetch-policy", "retain"]
    if place:
        lmcache += place.server_options()
    elif options.instance_id:
        lmcache += ["--instance-id", options.instance_id]
    extra: dict[str, Any] = {
        "lmcache.mp.host": "tcp://localhost",
        "lmcache.mp.port": options.lmcache_port,
        "lmcache.mp.mq_timeout": WAIT_S,
        "lmcache.mp.heartbeat_interval": HEARTBEAT_S,
        "lmcache_rag.policy": options.policy,
        "lmcache_rag.ratio": parse_budget(options.ratio).wire,
        "lmcache_rag.chunk_size": options.chunk_size,
    }
    if options.min_gain != DEFAULT_MIN_GAIN:
        extra["lmcache_rag.min_gain"] = options.min_gain
    if options.step_tokens is not None:
        extra["lmcache_rag.step_tokens"] = options.step_tokens
    if options.keeps.store != ServerSettings.store:
        extra["lmcache_rag.store"] = options.keeps.store
    if options.keeps.budgets:
        extra["lmcache_rag.tenants"] = True
    if options.prefix_tokens is not None:
        extra["lmcache_rag.prefix_tokens"] = options.prefix_tokens
    extra |= _checked(options.connector)
    middleware = []
    if options.ingest_key_file is not None:
        extra["lmcache_rag.ingest_key_file"] = _ingest_key_file(options.ingest_key_file, vllm_args)
        middleware = ["--middleware", MIDDLEWARE]
    ours = {
        "--host": host,
        "--port": port,
        **_sizes(build),
        "--scheduling-policy": "priority",  # ingestion yields to questions, see early_lookup.yield_to_questions
        _TRANSFER: json.dumps({**CONNECTOR, "kv_connector_extra_config": extra}),
    }
    if vllm_args.ranks() > 1 and not build.cpu and not any(vllm_args.has(name) for name in _GRAPHS):
        ours["--max-cudagraph-capture-size"] = str(MOST_GRAPH_TOKENS)
    vllm = ["serve" if build.has_command else "--model", options.model]
    vllm += _without_theirs(ours, options, vllm_args)
    variables = _plugin_allowed(environment) | ({FILE_VARIABLE: str(secret_file)} if secret_file else {})
    vllm += middleware
    connected = not vllm_args.has(_TRANSFER) or CONNECTOR["kv_connector"] in vllm_args.value(_TRANSFER)
    return Commands(
        tuple(lmcache),
        (*vllm, *options.vllm),
        _address(host, port, vllm_args),
        f"http://127.0.0.1:{options.lmcache_http_port}",
        variables,
        vllm_args.value("--api-key") or api_key("VLLM_API_KEY", environment),
        connected and not build.cpu,
        _note(vllm_args, build, place, connected=connected, l2=options.l2),
        l1_gb,
        secret_file,
        build,
        place,
    )


def _exact(
    options: ServeOptions, vllm_args: VLLMArgs, build: VLLMBuild, environment: Mapping[str, str], reason: str
) -> Commands:
    """VLLM alone, with its prefix cache, for a model with recurrent layers.

    LMCache takes chunks of whole vLLM blocks, which are hundreds of tokens long there, and its connector takes no
    caches of several kinds from vLLM's build for CPUs.
    """
    host, port = _place(options, vllm_args)
    ours = {"--host": host, "--port": port, **_sizes(build)}
    vllm = ["serve" if build.has_command else "--model", options.model]
    vllm += _without_theirs(ours, options, vllm_args)
    for switch in (_PREFIX_CACHE, _CACHED_TOKENS):
        if not vllm_args.has(switch) and not vllm_args.has(f"--no-{switch[2:]}"):
            vllm.append(switch)
    return Commands(
        (),
        (*vllm, *options.vllm),
        _address(host, port, vllm_args),
        "",
        {},
        vllm_args.value("--api-key") or api_key("VLLM_API_KEY", environment),
        blends=False,
        note=f"{reason}. vLLM is started with its own prefix cache, and without LMCache.",
        build=build,
    )


def _without_theirs(ours: Mapping[str, str], options: ServeOptions, vllm_args: VLLMArgs) -> list[str]:
    """Our options of vLLM that the user did not set."""
    words: list[str] = []
    for name, value in ours.items():
        ours_wins = {"--host": options.host, "--port": options.port}.get(name) is not None  # over vLLM's file
        if not (vllm_args.on_line(name) if ours_wins else vllm_args.has(name)):
            words += [name, value]
    return words


def _sizes(build: VLLMBuild) -> dict[str, str]:
    """Sizes for vLLM, where its own defaults do not go with LMCache."""
    if build.cpu:  # vLLM's own block there is larger than our chunk; both servers share one memory
        return {"--block-size": str(CPU_BLOCK), "--gpu-memory-utilization": str(CPU_SHARE)}
    return {"--max-num-batched-tokens": str(MOST_BATCHED_TOKENS), "--gpu-memory-utilization": str(GPU_SHARE)}


def _ingest_key_file(path: Path, vllm_args: VLLMArgs) -> str:
    read_ingest_key(path)  # fails now, rather than in vLLM's log
    if vllm_args.has(_TRANSFER):
        raise ConfigError(
            "--ingest-key-file has no effect with a --kv-transfer-config of your own.",
            remedy="Set lmcache_rag.ingest_key_file in its kv_connector_extra_config, "
            f"and give vLLM --middleware {MIDDLEWARE}.",
        )
    return str(path.expanduser().absolute())


def _server_config(options: ServeOptions) -> dict[str, Any]:
    config = options.keeps.config()
    return {"config": config} if config else {}


def _place(options: ServeOptions, vllm_args: VLLMArgs) -> tuple[str, str]:
    """Host and port of vLLM: from its options on the command line, ours, its file, or the defaults."""
    found = []
    for name, ours, usual in (("--host", options.host, HOST), ("--port", options.port, PORT)):
        own = "" if ours is not None and not vllm_args.on_line(name) else vllm_args.value(name)
        found.append(own or str(usual if ours is None else ours))
    return found[0], found[1]


def _checked(settings: tuple[str, ...]) -> dict[str, Any]:
    """Keys and values of KEY=VALUE texts; the connector's keys are validated as at its start."""
    from lmcache_rag.connector.config import ConnectorOptions

    found: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--connector {text!r} is not KEY=VALUE.", remedy=_EXAMPLE)
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    known = {f"{PLUGIN}.{one.name}" for one in fields(ConnectorOptions)}
    for key in found:
        if key.startswith(f"{PLUGIN}.") and key not in known:
            raise ConfigError(f"--connector: there is no {key}.", remedy=f"There are {', '.join(sorted(known))}.")
    try:
        ConnectorOptions.read(found.get)
    except ConfigError as problem:
        raise ConfigError(f"--connector: {problem.message}", remedy=problem.remedy or _EXAMPLE) from None
    return found


def _note(
    vllm_args: VLLMArgs, build: VLLMBuild, place: Coordinator | None, *, connected: bool, l2: Sequence[str]
) -> str:
    if not connected:
        return "The --kv-transfer-config does not name our connector: nothing is blended."
    notes = [ON_A_CPU] if build.cpu else []
    if any(json.loads(tier)["type"] == "resp" for tier in map(second_tier, l2)):
        notes.append('LMCache\'s adapter "resp" never connects again to a Redis that was away: give redis://host:port.')
    if place and not l2:
        notes.append("--coordinator without --l2: what other servers stored is found, but their KV cannot be loaded.")
    if place and place.open:
        notes.append(
            f"The coordinator at port {place.port} asks for no key: only machines that you trust should reach it."
        )
    if vllm_args.has(_TRANSFER):
        notes.append(
            "With a --kv-transfer-config of your own, --policy, --ratio, --min-gain, --step-tokens and --connector are "
            "not used, and vLLM does not get --chunk-size and --lmcache-port: set them in kv_connector_extra_config."
        )
    return " ".join(notes)


def _check_secrets(vllm_args: VLLMArgs) -> None:
    for name, variable in (("--api-key", "VLLM_API_KEY"), ("--hf-token", "HF_TOKEN")):
        if vllm_args.on_line(name) and not vllm_args.word(name).startswith("-"):
            raise ConfigError(
                f"{name}: a secret on the command line is shown by `ps` to all users of the machine.",
                remedy=f"Put it into the environment variable {variable}, or into the file of vLLM's --config.",
            )


def _secret_file(options: ServeOptions, environment: Mapping[str, str], *, shared: bool) -> Path | None:
    """The secret's file. With a second tier or a coordinator it must outlive vLLM, or KV would not be found again."""
    if options.secret_file is not None:
        return options.secret_file.expanduser().absolute()
    if named := environment.get(FILE_VARIABLE):
        return Path(named).expanduser().absolute()
    return state_file("secret") if shared and not environment.get(VARIABLE) else None


def _check_chunk(options: ServeOptions, vllm_args: VLLMArgs, build: VLLMBuild) -> None:
    text = vllm_args.value("--block-size")
    block = int(text) if text.isdigit() and int(text) else CPU_BLOCK if build.cpu else VLLM_BLOCK
    if options.chunk_size <= 0 or options.chunk_size % block:
        raise ConfigError(
            f"--chunk-size {options.chunk_size} is not a multiple of vLLM's block size, {block}.",
            remedy=f"For example --chunk-size {max(64 // block, 1) * block}.",
        )
    if options.prefix_tokens is not None and (options.prefix_tokens < 0 or options.prefix_tokens % options.chunk_size):
        fitting = max(options.prefix_tokens // options.chunk_size, 1) * options.chunk_size
        raise ConfigError(
            f"--prefix-tokens {options.prefix_tokens} is not a multiple of --chunk-size {options.chunk_size}.",
            remedy=f"For example --prefix-tokens {fitting}.",
        )


def _address(host: str, port: str, vllm_args: VLLMArgs) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    scheme = "https" if vllm_args.has("--ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _plugin_allowed(environment: Mapping[str, str]) -> dict[str, str]:
    """VLLM_PLUGINS, once set, must name our plugin, or the connector gets no access to the model."""
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return {}
    return {"VLLM_PLUGINS": f"{allowed},{PLUGIN}" if allowed else PLUGIN}


def _default_l1_gb(share: float) -> float:
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return L1_GB
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
        memory = min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1.0, min(L1_GB, float(int(memory / 2**30 * share))))


class VLLMArgs:
    """Options of vLLM by name. It takes --a-b, --a_b and --a-b=value; the command line overrides its file.

    Args:
        words: The command line after the model.

    Raises:
        ConfigError: The file of --config cannot be read.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._line: dict[str, str] = {}
        for index, word in enumerate(words):
            if word.startswith("-"):
                name, found, value = word.partition("=")
                following = words[index + 1] if index + 1 < len(words) else ""
                self._line[_dashes(name)] = value if found else following
        # vLLM itself reads the file only where both are separate arguments.
        at = words.index("--config") if "--config" in words else len(words)
        self._file = _read(words[at + 1]) if at + 1 < len(words) else {}

    def has(self, name: str) -> bool:
        """Whether this option, or with a dot a part of it, is set."""
        return self.on_line(name) or _has(self._file, name)

    def on_line(self, name: str) -> bool:
        """Whether it is set on the command line."""
        return _has(self._line, name)

    def word(self, name: str) -> str:
        """The argument after it on the command line; "" where there is none."""
        return self._line.get(name, "")

    def value(self, *names: str) -> str:
        """The value of the first of these options that has one; "" where none has."""
        return next((known[name] for known in (self._line, self._file) for name in names if known.get(name)), "")

    def dotted(self, name: str) -> str:
        """An option that sets a part of this one, "" where there is none."""
        return next((known for known in (*self._line, *self._file) if known.startswith(f"{name}.")), "")

    def gpus(self) -> int:
        """How many GPUs vLLM uses: ranks of a replica, times replicas."""
        return math.prod(self._size(*names) for names in _SIZES)

    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self._size(*_SIZES[0])

    def _size(self, *names: str) -> int:
        size = self.value(*names)
        return int(size) if size.isdigit() and int(size) else 1


def _has(known: Mapping[str, str], name: str) -> bool:
    return any(one == name or one.startswith(f"{name}.") for one in known)


def _dashes(name: str) -> str:
    """Replace underscores by dashes up to the first dot, as vLLM does."""
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest


def _read(file: str) -> dict[str, str]:
    """The options of a YAML file, as vLLM turns them into arguments."""
    import yaml

    remedy = "vLLM takes a YAML file with one option a line, such as `max-model-len: 8192`."
    if not file.endswith((".yaml", ".yml")):
        raise ConfigError(f"--config {file} is not a .yaml or .yml file.", remedy=remedy)
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise ConfigError(f"--config {file} cannot be read: {' '.join(str(problem).split())}.", remedy=remedy) from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {file} holds no options.", remedy=remedy)
    return {_dashes(f"--{name}"): _word(value) for name, value in found.items()}


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return str(value[0]) if value else ""
    return "" if isinstance(value, bool) else str(value)


def lmcache_environment(environment: Mapping[str, str], tiers: Sequence[str] = ()) -> dict[str, str]:
    """The environment of LMCache: the variables that it needs, and no passwords for other programs.

    Any client of LMCache's HTTP port can read its environment.

    Args:
        environment: All variables.
        tiers: LMCache's JSON of each second tier; some kinds need certain variables, and any may name some.
    """
    kinds = {str(json.loads(tier).get("type")) for tier in tiers}
    prefixes = (*_LMCACHE_PREFIXES, *(prefix for kind in kinds for prefix in _PREFIXES_BY_TIER.get(kind, ())))
    named = variables(tiers)
    proxies = _PROXIES if kinds & _PREFIXES_BY_TIER.keys() else set()

    def wanted() -> Iterable[str]:
        for name in environment:
            usual = name in _LMCACHE_NAMES or name.startswith(prefixes) or name.lower() in proxies
            if name in named or (usual and not name.startswith(_NEVER)):
                yield name

    return {name: environment[name] for name in wanted()}
