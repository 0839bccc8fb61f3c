"""serve and doctor: run vLLM with LMCache's blend server, and check them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from lmcache_rag._utils import clean
from lmcache_rag.cli.console import INTERRUPTED, PARTLY, TERMINATED, Terminated, ignore_signals
from lmcache_rag.cli.render import plain, show
from lmcache_rag.cli.run import CommandContext, command, serve_commands
from lmcache_rag.credentials import (
    LMCACHE_KEY_FILES,
    LMCACHE_KEY_NAMES,
    api_key,
    ensure_secret,
    ingest_key,
    lmcache_key_file,
    read_ingest_key,
)
from lmcache_rag.errors import ConfigError, EngineError, LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.serving.commands import Commands, ServeOptions
    from lmcache_rag.serving.machine import Check

MORE = 3  # queries that show the server at start what its look-ups, loads and blends take
_NAME_WIDTH, _STATE_WIDTH = 19, 7  # of doctor's columns: "LMCache's CUDA code", "skipped"
_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("failed", "bold red")}


class IndexMode(StrEnum):
    """Which KV may be blended."""

    DECLARED = "declared"
    ALL = "all"


class StoreMode(StrEnum):
    """Whose KV LMCache stores."""

    INGEST = "ingest"
    SECOND = "second"
    ALL = "all"


class ServeCommand(TyperCommand):
    """A command that takes its own long options after MODEL too; everything else there is vLLM's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put our own options in front."""
        flags = {name: bool(getattr(p, "is_flag", False)) for p in self.params for name in (*p.opts, *p.secondary_opts)}
        flags["--help"] = True
        return list(super().parse_args(ctx, hoist_own_options(args, flags)))


def hoist_own_options(args: Sequence[str], flags: dict[str, bool]) -> list[str]:
    """Arguments with our own long options in front.

    Args:
        args: The command line. What follows "--" is left alone.
        flags: Our options, and whether each is a flag.
    """
    arguments = list(args)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours: list[str] = []
    rest: list[str] = []
    position = 0
    while position < end:
        word = arguments[position]
        name, has_value, _ = word.partition("=")
        known = word.startswith("--") and name in flags
        take = 2 if known and not flags[name] and not has_value else 1
        (ours if known else rest).extend(arguments[position : min(position + take, end)])
        position += take
    return [*ours, *rest, *arguments[end + 1 :]]


@command("policy", "ratio", "min_gain", "kv_ttl")
def serve(
    context: CommandContext,
    served_model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face name of the model.", show_default=False)
    ],
    vllm: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VLLM OPTIONS]...", help="Passed on to vLLM; they override ours.", show_default=False),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Host on which vLLM listens. [dim]\\[default: 127.0.0.1][/dim]", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port on which vLLM listens. [dim]\\[default: 8000][/dim]", min=1, max=65535, show_default=False
        ),
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
            help="What may be blended: chunks that a client ingested, or chunks of any prompt. all is for one "
            "application whose users may see each other's texts.",
        ),
    ] = IndexMode.DECLARED,
    store_mode: Annotated[
        StoreMode,
        typer.Option(
            "--store",
            help="Whose KV LMCache stores: of ingested chunks; also of what prompts begin with for the second time; or "
            "of all prompts. Ingested chunks are evicted last.",
        ),
    ] = StoreMode.ALL,
    tenant_budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENANT=GB",
            help="Most of --l1-gb for one tenant's KV, more than once if wanted; '*=GB' is for each other tenant. A "
            "tenant beyond its budget evicts its own KV. [dim]\\[LMCACHE_RAG_TENANT_BUDGET, with commas; default: none]"
            "[/dim]",
            show_default=False,
        ),
    ] = None,
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
            help="Secret that KV is stored under, created if missing; servers that share --l2 need the same. "
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
    coordinator: Annotated[
        str,
        typer.Option(
            metavar="URL|start",
            help="LMCache's coordinator, by which servers blend what others ingested: its address, or start, to "
            "run one too. [dim]\\[LMCACHE_COORDINATOR_URL, default: none][/dim]",
            show_default=False,
        ),
    ] = "",
    coordinator_listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where a coordinator that is started listens. [dim]\\[default: 127.0.0.1:9300][/dim]",
            show_default=False,
        ),
    ] = "",
    instance_id: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="This server's name in the coordinator, no other's. [dim]\\[default: host name and --lmcache-port]"
            "[/dim]",
            show_default=False,
        ),
    ] = "",
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
        typer.Option(metavar="DIR", help="Folder of both logs. [dim]\\[default: a new one][/dim]", show_default=False),
    ] = None,
    start_timeout: Annotated[float, typer.Option(metavar="S", help="Longest wait for vLLM's start.", min=1)] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the two commands.")] = False,
) -> int:
    """Serve a model with vLLM and LMCache's blend server.

    Waits for both, warms the look-up, and prints one line with the address.
    If LMCache dies it is started again while vLLM keeps running; when vLLM ends,
    serve ends too, with its exit status. All listen on this machine only, unless
    --host or --coordinator-listen names another address.

    [bold]Examples[/bold]
      lmcache-rag serve Qwen/Qwen3-8B
      lmcache-rag serve Qwen/Qwen3-8B --l2 /data/kv --tensor-parallel-size 2
      lmcache-rag serve Qwen/Qwen3-8B --l2 redis://kv:6379 --coordinator http://kv:9300
      lmcache-rag serve Qwen/Qwen3-8B --l1-gb 200 --tenant-budget acme=80 --tenant-budget '*=10'
      lmcache-rag serve Qwen/Qwen3-8B --dry-run
    """
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings, parse_budgets
    from lmcache_rag.serving.commands import ServeOptions

    settings, extra = context.settings(), tuple(vllm or ())
    if context.services.serve_commands is serve_commands and not dry_run:
        _check_packages()  # before a model is looked for, which may be a download
        from lmcache_rag.weights.find import find_served

        if (source := find_served(served_model)) is not None:
            named = any(option.partition("=")[0] == "--served-model-name" for option in extra)
            extra = extra if named else (*extra, "--served-model-name", served_model)
            served_model = str(source.path)
    budgets = parse_budgets(tenant_budget or os.environ.get("LMCACHE_RAG_TENANT_BUDGET", "").split(","))
    options = ServeOptions(
        model=served_model,
        vllm=extra,
        host=host,
        port=port,
        policy=settings.policy,
        ratio=settings.ratio,
        min_gain=settings.min_gain,
        l1_gb=l1_gb,
        l2=tuple(l2 or ()),
        chunk_size=chunk_size,
        lmcache_port=lmcache_port,
        lmcache_http_port=lmcache_http_port,
        step_tokens=step_tokens,
        connector=tuple(connector or ()),
        keeps=ServerSettings(index.value, store_mode.value, index_size, settings.kv_ttl or 0.0, budgets),
        prefix_tokens=prefix_tokens,
        secret_file=secret_file,
        ingest_key_file=ingest_key_file or settings.ingest_key_file,
        coordinator=coordinator,
        coordinator_listen=coordinator_listen,
        instance_id=instance_id,
    )
    made, lmcache_run, vllm_run = context.services.serve_commands(options)
    if made.note:
        context.message(made.note, style="yellow")
    if dry_run:
        _print(context, made)
        return 0
    if context.services.serve_commands is serve_commands:  # replaced commands may need nothing of this environment
        _check_environment(context, made)
    _ensure_secret(context, options, made)
    return _serve(context, options, made, lmcache_run, vllm_run, log_dir, start_timeout)


def _ensure_secret(context: CommandContext, options: ServeOptions, made: Commands) -> None:
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
    if options.l2 or made.coordinator:
        shared = "--l2 or a coordinator" if made.coordinator else "--l2"
        context.message(
            f"KV is stored under the secret in {made.secret_file}: servers that share {shared} need the same file."
        )


def _lmcache_key(context: CommandContext) -> dict[str, str]:
    """The variable that sets the key of LMCache's HTTP API, if its version has one and the user has set none."""
    from lmcache_rag.serving.machine import version

    numbers = [int(part) for part in re.findall(r"\d+", version("lmcache"))[:3]]
    if numbers < [0, 5, 7] or any(os.environ.get(name) for name in (*LMCACHE_KEY_NAMES, *LMCACHE_KEY_FILES)):
        return {}
    try:
        ensure_secret(lmcache_key_file())
    except ConfigError as problem:
        context.message(f"LMCache's HTTP port requires no key. {problem}", style="yellow")
        return {}
    return {LMCACHE_KEY_FILES[1]: str(lmcache_key_file())}


def _check_packages() -> None:
    """Fail now if vLLM or LMCache is missing.

    Raises:
        ConfigError: One is not installed.
    """
    from lmcache_rag.serving import machine

    if missing := machine.missing_packages():
        found = next(machine.gpu()).state != "failed"
        remedy = machine.INSTALL if found else f"{machine.INSTALL}, with an NVIDIA GPU. {machine.WITHOUT_GPU}"
        raise ConfigError(f"Not installed: {', '.join(missing)}.", remedy=remedy)


def _check_environment(context: CommandContext, made: Commands) -> None:
    """Fail now if a tier's client is missing; warn if the servers could not blend.

    Raises:
        ConfigError: It is not installed.
    """
    from lmcache_rag.serving import machine

    if (
        any(json.loads(tier)["type"] == "valkey" for tier in made.tiers)
        and importlib.util.find_spec("glide_sync") is None
    ):
        raise ConfigError(
            "Not installed: valkey-glide-sync, the client for Valkey and Redis.", remedy="pip install valkey-glide-sync"
        )
    if made.build.cpu or not made.lmcache:
        return
    gpu = next(machine.gpu())
    if gpu.state == "failed":
        context.message(f"{gpu.name}: {gpu.result}. Nothing is blended, and vLLM may not start.", style="yellow")
        context.message(machine.WITHOUT_GPU)
    with context.waiting("Checking LMCache's CUDA code"):
        code = machine.cuda_code()
    if code.state == "failed":
        context.message(f"LMCache's CUDA code {code.result}", style="yellow")
        context.message(code.remedy)


def _print(context: CommandContext, made: Commands) -> None:
    if context.json:
        first = {"coordinator": made.coordinator_words()} if made.coordinator_words() else {}
        context.emit(
            {
                **first,
                "lmcache": made.lmcache_words(),
                "vllm": made.vllm_words(),
                "environment": dict(made.environment),
                "url": made.url,
            }
        )
    else:
        context.write("\n".join(made.shell()) + "\n")


def _serve(
    context: CommandContext,
    options: ServeOptions,
    made: Commands,
    lmcache_run: list[str],
    vllm_run: list[str],
    log_dir: Path | None,
    start_timeout: float,
) -> int:
    from lmcache_rag.serving.commands import lmcache_environment
    from lmcache_rag.serving.lmcache_checks import answers
    from lmcache_rag.serving.process import Server
    from lmcache_rag.serving.supervise import Supervisor, check_ports

    started = made.coordinator if made.coordinator_words() else None
    of_lmcache = {"--lmcache-port": options.lmcache_port, "--lmcache-http-port": options.lmcache_http_port}
    of_coordinator = {"--coordinator-listen": started.port} if started else {}
    check_ports({"--port": int(made.url.rpartition(":")[2]), **(of_lmcache if made.lmcache else {}), **of_coordinator})
    if started:
        started.prepare()
    folder = log_dir or Path(tempfile.mkdtemp(prefix="lmcache-rag-serve-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise EngineError(f"{folder} cannot be made: {problem}.", remedy="Name another with --log-dir.") from problem
    limits = context.services.serve_timeouts(start_timeout)
    logs = folder / "lmcache.log", folder / "vllm.log"
    key = _lmcache_key(context) if made.lmcache else {}
    inherited = lmcache_environment(os.environ, made.tiers)
    supervisor = Supervisor(
        Server(
            "LMCache",
            lmcache_run,
            lambda: answers(made.lmcache_url, "/healthcheck"),
            logs[0],
            limits.grace,
            key,
            inherited,
        )
        if made.lmcache
        else None,
        Server(
            "vLLM",
            vllm_run,
            lambda: answers(made.url, "/health"),
            logs[1],
            limits.grace,
            {**made.environment, **key},
        ),
        lambda line: context.message(clean(line)),
        limits,
        lambda stop: signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT,
        Server(
            "The coordinator",
            made.coordinator_run(),
            lambda: answers(started.url, "/healthz"),
            folder / "coordinator.log",
            limits.grace,
            inherited=inherited,
        )
        if started
        else None,
    )
    try:
        return supervisor.run(lambda: _ready(context, options, made, folder))
    except KeyboardInterrupt as stop:
        ignore_signals()
        context.message("All servers have ended." if started else "Both servers have ended.")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _ready(context: CommandContext, options: ServeOptions, made: Commands, folder: Path) -> None:
    """Warm up, and print the address, whether it blends, and where the logs are."""
    from lmcache_rag import protocol
    from lmcache_rag.engines.vllm_client import VLLMClient
    from lmcache_rag.serving.doctor import round_trip

    if made.lmcache:
        context.message("Warming the look-up.")
    name, blending = options.model, "off"
    try:
        key = read_ingest_key(options.ingest_key_file) if options.ingest_key_file else ""
        with VLLMClient(made.url, attempts=1, api_key=made.api_key, ingest_key=key, verify=False) as server:
            served = server.first_model()
            name = served.name
            if not made.lmcache:
                _report_exact(context, made, name, folder)
                return
            outcome = round_trip(server, served, options.chunk_size, compare=False, more=MORE)
        if outcome.hit and outcome.reused:
            blending = protocol.chosen(outcome.reused)
        elif made.blends:
            blending = "off, see lmcache-rag doctor"
        elif made.build.cpu:
            blending = "off, as vLLM runs on a CPU"
    except LMCacheRAGError as problem:
        context.message(f"The look-up is not warm: {problem}", style="yellow")
        blending = "unknown"
    if context.json:
        facts = {"url": f"{made.url}/v1", "model": name, "blending": blending, "l1_gb": made.l1_gb}
        context.emit({**facts, "l2": list(options.l2), "logs": str(folder)}, indent=None)
        return
    second = f" and {len(options.l2)} second tier{'s' if len(options.l2) > 1 else ''}" if options.l2 else ""
    where = f"{made.url}/v1 serves {clean(name)}"
    context.write(f"{where}; blending: {blending}; {made.l1_gb:g} GB for KV{second}; logs in {folder}\n")


def _report_exact(context: CommandContext, made: Commands, name: str, folder: Path) -> None:
    """Print the address of a server that vLLM runs alone."""
    if context.json:
        context.emit({"url": f"{made.url}/v1", "model": name, "blending": "off", "logs": str(folder)}, indent=None)
        return
    where = f"{made.url}/v1 serves {clean(name)}"
    context.write(f"{where}; blending: off, as it has recurrent layers; prefix caching: on; logs in {folder}\n")


@command("store", "embedder", "kv_budget_gb")
def doctor(
    context: CommandContext,
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL]...",
            help="Addresses of vLLM servers; without one only this machine is checked.",
            show_default=False,
        ),
    ] = None,
    lmcache_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="HTTP address of the LMCache server, once for each URL. [dim]\\[default: http://127.0.0.1:8089][/dim]",
            show_default=False,
        ),
    ] = None,
    coordinator: Annotated[
        str,
        typer.Option(metavar="URL", help="LMCache's coordinator: the LMCache servers that it knows are compared, too."),
    ] = "",
    check_model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME", help="Model to check, by folder or Hugging Face name.", show_default=False
        ),
    ] = "",
) -> int:
    """Check what this machine needs to answer, or servers and a round trip.

    Without a URL: the embedded engine, store, disk, model and embedder; GPU,
    vLLM and LMCache where they are installed. With one, the servers too; the
    round trip precomputes three random chunks, queries them in another
    order, and compares ratio 1 with a run without reuse. With several, what
    they do not have in common, and whether each finds what the first one has
    ingested. The servers' key, if any, is taken from the variable VLLM_API_KEY or LMCACHE_RAG_API_KEY, and
    its ingest key from LMCACHE_RAG_INGEST_KEY or LMCACHE_RAG_INGEST_KEY_FILE.
    Exit status 1 when something failed.

    [bold]Examples[/bold]
      lmcache-rag doctor
      lmcache-rag doctor http://127.0.0.1:8000
      lmcache-rag doctor http://10.0.0.5:8000 http://10.0.0.6:8000
      lmcache-rag doctor http://127.0.0.1:8000 --json
    """
    keys = {"api_key": api_key("VLLM_API_KEY"), "ingest_key": ingest_key()}
    checks = _checks(context, urls or [], lmcache_url or [], coordinator, check_model, keys)
    found: list[Check] = []
    server = ""
    while True:
        with context.waiting("Checking"):
            check = next(checks, None)
        if check is None:
            break
        found.append(check)
        if not context.json:
            if check.server != server:
                context.write(f"\n{clean(check.server or 'All of them')}\n")
                server = check.server
            show(context.out, _line(check))
    failed = [check for check in found if check.state == "failed"]
    if context.json:
        context.emit({"healthy": not failed, "checks": plain(found)})
    elif failed:
        context.message(f"{len(failed)} of {len(found)} checks failed.", style="bold red")
    return PARTLY if failed else 0


def _checks(
    context: CommandContext,
    urls: list[str],
    lmcache_urls: list[str],
    coordinator: str,
    check_model: str,
    keys: dict[str, str],
) -> Iterator[Check]:
    from lmcache_rag.serving.fleet import examine_all
    from lmcache_rag.serving.machine import embedded

    settings = context.settings()
    if not urls and settings.engine == "embedded":
        if check_model:
            settings = settings.model_copy(update={"model": check_model})
        yield from embedded(settings)
    yield from examine_all(urls, lmcache_urls=lmcache_urls, coordinator=coordinator, model=check_model, **keys)


def _line(check: Check) -> Table:
    """A check as a row by itself: it is shown when it is done, in columns of fixed widths."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for width in (_NAME_WIDTH, _STATE_WIDTH):
        table.add_column(width=width)
    table.add_column(ratio=3, overflow="fold")
    table.add_column(ratio=2, overflow="fold")
    word, style = _MARKS.get(check.state, (check.state, "dim"))
    name = Text(check.name, style="bold")
    table.add_row(name, Text(word, style=style), Text(clean(check.result)), Text(clean(check.remedy)))
    return table
