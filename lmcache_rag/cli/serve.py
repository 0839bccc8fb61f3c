"""serve: vLLM with LMCache's blend server beside it."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lmcache_rag.api_key import LMCACHE_FILES, LMCACHE_NAMES, lmcache_key_file
from lmcache_rag.cli import signals
from lmcache_rag.cli.failures import INTERRUPTED, TERMINATED
from lmcache_rag.cli.render import clean
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb
from lmcache_rag.errors import ConfigError, EngineError, LMCacheRAGError
from lmcache_rag.ingest_key import read_ingest_key
from lmcache_rag.secret_file import ensure_secret

if TYPE_CHECKING:
    from lmcache_rag.serving.commands import Commands, ServeOptions
    from lmcache_rag.serving.supervise import Timeouts


class IndexMode(StrEnum):
    """What may be blended."""

    DECLARED = "declared"
    ALL = "all"


class StoreMode(StrEnum):
    """Whose KV LMCache keeps."""

    INGEST = "ingest"
    ALL = "all"


def default_commands(options: ServeOptions) -> tuple[Commands, list[str], list[str]]:
    """Where serve gets its commands from: (what they are, LMCache's to run, vLLM's to run)."""
    from lmcache_rag.serving.commands import commands

    made = commands(options)
    return made, made.lmcache_run(), made.vllm_run()


maker: Callable[[ServeOptions], tuple[Commands, list[str], list[str]]] = default_commands
"""A program that runs other servers may put its own in here."""

times: Callable[[float], Timeouts] | None = None
"""How long things may take, from the longest start of vLLM; None: the usual."""


class ServeCommand(TyperCommand):
    """A command that takes its own long options behind MODEL too; everything else there is vLLM's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put our own options in front."""
        flags = {name: bool(getattr(p, "is_flag", False)) for p in self.params for name in (*p.opts, *p.secondary_opts)}
        flags["--help"] = True
        return list(super().parse_args(ctx, gathered(args, flags)))


def gathered(args: Sequence[str], flags: dict[str, bool]) -> list[str]:
    """Arguments with our own long options in front.

    Args:
        args: As given. What follows "--" is left alone.
        flags: Our options, and whether each is a flag.
    """
    words = list(args)
    end = words.index("--") if "--" in words else len(words)
    ours: list[str] = []
    rest: list[str] = []
    position = 0
    while position < end:
        word = words[position]
        name, has_value, _ = word.partition("=")
        known = word.startswith("--") and name in flags
        take = 2 if known and not flags[name] and not has_value else 1
        (ours if known else rest).extend(words[position : min(position + take, end)])
        position += take
    return [*ours, *rest, *words[end + 1 :]]


@verb("policy", "ratio")
def serve(
    run: Run,
    served_model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face name of the model.", show_default=False)
    ],
    vllm: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VLLM OPTIONS]...", help="Given to vLLM as they stand; they win over ours.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Where vLLM listens. [dim]\\[default: 127.0.0.1][/dim]", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Where vLLM listens. [dim]\\[default: 8000][/dim]", min=1, max=65535, show_default=False),
    ] = None,
    l1_gb: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="CPU memory for KV. [dim]\\[default: 20, at most 40% of the memory][/dim]",
            show_default=False,
        ),
    ] = None,
    l2: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="Second tier for KV, more than once if wanted: a folder, redis://host:port, or LMCache's JSON. "
            "Passwords as ${NAME} or ${file:PATH}.",
            show_default=False,
        ),
    ] = None,
    chunk_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens of an LMCache chunk; a multiple of vLLM's block.")
    ] = 64,
    lmcache_port: Annotated[int, typer.Option(help="LMCache's port for vLLM.", min=1, max=65535)] = 5555,
    lmcache_http_port: Annotated[int, typer.Option(help="LMCache's port for its health.", min=1, max=65535)] = 8089,
    step_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that blends may compute in one step while other requests run: how long those wait. "
            "[dim]\\[default: 2048][/dim]",
            min=1,
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        IndexMode,
        typer.Option(
            help="What may be blended: chunks that a client ingested, or whatever any prompt held. all is for one "
            "application whose users may see each other's texts.",
        ),
    ] = IndexMode.DECLARED,
    store_mode: Annotated[
        StoreMode,
        typer.Option(
            "--store", help="Whose KV LMCache keeps: only that of ingested chunks, or all, of which theirs goes last."
        ),
    ] = StoreMode.ALL,
    index_size: Annotated[
        int, typer.Option(metavar="N", help="Most chunks of LMCache's size that may be blended.", min=1)
    ] = 1 << 20,
    prefix_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="First tokens by which prompts of clients that name no prefix share KV. "
            "[dim]\\[default: one chunk][/dim]",
            min=1,
            show_default=False,
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Secret that KV is kept under, made where there is none; servers that share --l2 need the same. "
            "[dim]\\[default: with --l2 one in the state folder][/dim]",
            show_default=False,
        ),
    ] = None,
    ingest_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File of the key that ingesting and forgetting need; with mode 0600. "
            "[dim]\\[LMCACHE_RAG_INGEST_KEY_FILE, default: no key][/dim]",
            show_default=False,
        ),
    ] = None,
    connector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A setting of the connector, more than once if wanted, such as lmcache_rag.overlap=false.",
            show_default=False,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where both logs go. [dim]\\[default: a new one][/dim]", show_default=False),
    ] = None,
    start_timeout: Annotated[float, typer.Option(metavar="S", help="Longest wait for vLLM's start.", min=1)] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the two commands.")] = False,
) -> int:
    """Serve a model: vLLM, and LMCache's blend server beside it.

    Waits for both, warms the look-up, and prints one line with the address.
    If LMCache dies it is started again while vLLM goes on; when vLLM ends,
    all ends, with its exit status. Both listen on this machine only, unless
    --host says otherwise.

    [bold]Examples[/bold]
      lmcache-rag serve Qwen/Qwen3-8B
      lmcache-rag serve Qwen/Qwen3-8B --l2 /data/kv --tensor-parallel-size 2
      lmcache-rag serve Qwen/Qwen3-8B --dry-run
    """
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings
    from lmcache_rag.serving.commands import ServeOptions

    settings = run.settings()
    options = ServeOptions(
        model=served_model,
        vllm=tuple(vllm or ()),
        host=host,
        port=port,
        policy=settings.policy,
        ratio=settings.ratio,
        l1_gb=l1_gb,
        l2=tuple(l2 or ()),
        chunk_size=chunk_size,
        lmcache_port=lmcache_port,
        lmcache_http_port=lmcache_http_port,
        step_tokens=step_tokens,
        connector=tuple(connector or ()),
        keeps=ServerSettings(index.value, store_mode.value, index_size),
        prefix_tokens=prefix_tokens,
        secret_file=secret_file,
        ingest_key_file=ingest_key_file or settings.ingest_key_file,
    )
    made, lmcache_run, vllm_run = maker(options)
    if made.note:
        run.tell(made.note, style="yellow")
    if dry_run:
        _print(run, made)
        return 0
    if maker is default_commands:  # servers of another maker's need nothing of this environment
        _check_environment(run)
    _ensure_secret(run, options, made)
    return _serve(run, options, made, lmcache_run, vllm_run, log_dir, start_timeout)


def _ensure_secret(run: Run, options: ServeOptions, made: Commands) -> None:
    """Make the secret where there is none.

    Raises:
        ConfigError: It cannot be made, or is not safe.
    """
    if made.secret_file is None:
        return
    try:
        ensure_secret(made.secret_file)
    except ConfigError as problem:
        remedy = "" if options.secret_file else " Or name another with --secret-file, or fill LMCACHE_RAG_SECRET."
        raise ConfigError(problem.message, remedy=problem.remedy + remedy) from None
    if options.l2:
        run.tell(f"KV is kept under the secret in {made.secret_file}: servers that share --l2 need the same file.")


def _lmcache_key(run: Run) -> dict[str, str]:
    """The variable by which LMCache's HTTP API gets a key, where its version knows one and the user has set none."""
    from lmcache_rag.serving.machine import version

    numbers = [int(part) for part in re.findall(r"\d+", version("lmcache"))[:3]]
    if numbers < [0, 5, 7] or any(os.environ.get(name) for name in (*LMCACHE_NAMES, *LMCACHE_FILES)):
        return {}
    try:
        ensure_secret(lmcache_key_file())
    except ConfigError as problem:
        run.tell(f"LMCache's HTTP port asks for no key. {problem}", style="yellow")
        return {}
    return {LMCACHE_FILES[1]: str(lmcache_key_file())}


def _check_environment(run: Run) -> None:
    """Complain now about what is not installed, and about what would serve without blending and say so in a log only.

    Raises:
        ConfigError: vLLM or LMCache is not installed.
    """
    from lmcache_rag.serving import machine

    if missing := machine.missing_packages():
        raise ConfigError(f"Not installed: {', '.join(missing)}.", remedy=machine.INSTALL)
    with run.waiting("Checking LMCache's CUDA code"):
        code = machine.cuda_code()
    if code.state == "failed":
        run.tell(f"LMCache's CUDA code {code.result}", style="yellow")
        run.tell(code.remedy)


def _print(run: Run, made: Commands) -> None:
    if run.json:
        run.emit(
            {
                "lmcache": made.lmcache_words(),
                "vllm": ["vllm", *made.vllm],
                "environment": dict(made.environment),
                "url": made.url,
            }
        )
    else:
        run.write("\n".join(made.shell()) + "\n")


def _serve(
    run: Run,
    options: ServeOptions,
    made: Commands,
    lmcache_run: list[str],
    vllm_run: list[str],
    log_dir: Path | None,
    start_timeout: float,
) -> int:
    from lmcache_rag.serving import api
    from lmcache_rag.serving.commands import lmcache_environment
    from lmcache_rag.serving.process import Server
    from lmcache_rag.serving.supervise import Supervisor, Timeouts

    for port, flag in ((options.lmcache_port, "--lmcache-port"), (options.lmcache_http_port, "--lmcache-http-port")):
        _free(port, flag)
    _free(int(made.url.rpartition(":")[2]), "--port")
    folder = log_dir or Path(tempfile.mkdtemp(prefix="lmcache-rag-serve-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise EngineError(f"{folder} cannot be made: {problem}.", remedy="Name another with --log-dir.") from problem
    limits = (times or (lambda longest: Timeouts(vllm_start=longest)))(start_timeout)
    logs = folder / "lmcache.log", folder / "vllm.log"
    key = _lmcache_key(run)
    inherited = lmcache_environment(os.environ, made.tiers)
    supervisor = Supervisor(
        Server(
            "LMCache",
            lmcache_run,
            lambda: api.answers(made.lmcache_url, "/healthcheck"),
            logs[0],
            limits.grace,
            key,
            inherited,
        ),
        Server(
            "vLLM",
            vllm_run,
            lambda: api.answers(made.url, "/health"),
            logs[1],
            limits.grace,
            {**made.environment, **key},
        ),
        lambda line: run.tell(clean(line)),
        limits,
        lambda stop: signal.SIGTERM if isinstance(stop, signals.Terminated) else signal.SIGINT,
    )
    try:
        return supervisor.run(lambda: _ready(run, options, made, folder))
    except KeyboardInterrupt as stop:
        signals.ignore()
        run.tell("Both servers have ended.")
        return TERMINATED if isinstance(stop, signals.Terminated) else INTERRUPTED


def _free(port: int, flag: str) -> None:
    """Complain now, rather than after minutes of loading, about a port that is in use."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise EngineError(f"Port {port} is in use.", remedy=f"Name another with {flag}.")


def _ready(run: Run, options: ServeOptions, made: Commands, folder: Path) -> None:
    """Warm up, and say where the server is and what is on."""
    from lmcache_rag.serving import api
    from lmcache_rag.serving.doctor import round_trip

    run.tell("Warming the look-up.")
    name, blending = options.model, "off"
    try:
        key = read_ingest_key(options.ingest_key_file) if options.ingest_key_file else ""
        with api.VLLM(made.url, made.api_key, ingest_key=key, timeout=120, verify=False) as server:
            served = server.served()
            name = served.name
            outcome = round_trip(server, served, options.chunk_size, compare=False)
        if outcome.hit and outcome.reused:
            blending = "{policy} at {ratio:g}".format(**outcome.reused)
        elif made.blends:
            blending = "off, see lmcache-rag doctor"
    except LMCacheRAGError as problem:
        run.tell(f"The look-up is not warm: {problem}", style="yellow")
        blending = "unknown"
    if run.json:
        facts = {"url": f"{made.url}/v1", "model": name, "blending": blending, "l1_gb": made.l1_gb}
        run.emit({**facts, "l2": list(options.l2), "logs": str(folder)}, indent=None)
        return
    second = f" and {len(options.l2)} second tier{'s' if len(options.l2) > 1 else ''}" if options.l2 else ""
    where = f"{made.url}/v1 serves {clean(name)}"
    run.write(f"{where}; blending: {blending}; {made.l1_gb:g} GB for KV{second}; logs in {folder}\n")
