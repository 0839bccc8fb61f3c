"""The frame of every command: common options, its context, progress bars, errors as messages and exit statuses.

The common options are made from Settings, so that names, types, defaults and help agree with them. An option that is
left out stays None: Settings.load then reads the environment, the store's file and the default.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lmcache_rag._utils import clean
from lmcache_rag.cli import console
from lmcache_rag.cli.console import quiet_libraries
from lmcache_rag.settings import Settings

if TYPE_CHECKING:
    from lmcache_rag.ingest import Progress as Step
    from lmcache_rag.serving.commands import Commands, ServeOptions
    from lmcache_rag.serving.supervise import Timeouts
    from lmcache_rag.workspace import Workspace

PREFIX = str(Settings.model_config["env_prefix"])

PLACE = ("store", "engine", "model", "device", "dtype", "kv_budget_gb")
AGE = ("kv_ttl",)
INGEST = ("ingest_in_flight", "ingest_rate")
EMBED = ("embedder",)
SPLIT = ("chunk_tokens", "chunk_overlap")
READ = ("document_seconds", "document_mb")
ANSWER = ("policy", "ratio", "blend", "order", "cite", "top_k", "max_tokens", "temperature", "trace")
_EVERY_S = 10.0  # between two lines without a terminal

Function = Callable[..., int | None]


def open_workspace(settings: Settings, *, create: bool) -> Workspace:
    """Open the workspace of these settings."""
    from lmcache_rag.workspace import Workspace

    return Workspace(settings, create=create)


def serve_commands(options: ServeOptions) -> tuple[Commands, list[str], list[str]]:
    """The commands of `serve`: (those to show, LMCache's to run, vLLM's to run)."""
    from lmcache_rag.serving.commands import commands

    made = commands(options)
    return made, made.lmcache_run(), made.vllm_run()


def serve_timeouts(vllm_start: float) -> Timeouts:
    """The usual time limits, with this one for vLLM's start."""
    from lmcache_rag.serving.supervise import Timeouts

    return Timeouts(vllm_start=vllm_start)


@dataclass(frozen=True)
class Services:
    """The library functions that commands call. A program that embeds the command line may pass its own to main().

    Attributes:
        open_workspace: Opens the workspace of these settings.
        serve_commands: What `serve` starts: (the commands to show, LMCache's to run, vLLM's to run).
        serve_timeouts: Time limits of `serve`, from the longest start of vLLM in seconds.
    """

    open_workspace: Callable[..., Workspace] = open_workspace
    serve_commands: Callable[[ServeOptions], tuple[Commands, list[str], list[str]]] = serve_commands
    serve_timeouts: Callable[[float], Timeouts] = serve_timeouts


class _PlainConsole(Console):
    """A console that writes every text unchanged."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave the exit status to us; rich would end the process with its own."""
        raise BrokenPipeError


def _stdout() -> Console:
    # In a file no line is wrapped at 80 columns.
    return _PlainConsole(file=sys.stdout, width=None if sys.stdout.isatty() else 200)


def _stderr() -> Console:
    return _PlainConsole(file=sys.stderr, soft_wrap=not sys.stderr.isatty())


@dataclass
class CommandContext:
    """One run of one command.

    Attributes:
        options: Settings by option; None where left out.
        json: Machine output.
        verbose: Write more to stderr.
        out: stdout: results.
        err: stderr: everything else.
        services: The library functions that it calls.
    """

    options: dict[str, Any]
    json: bool = False
    verbose: bool = False
    out: Console = field(default_factory=_stdout)
    err: Console = field(default_factory=_stderr)
    services: Services = Services()

    def settings(self) -> Settings:
        """All settings of this run."""
        options = dict(self.options)
        return Settings.load(options.pop("store", None), **options)

    @contextmanager
    def workspace(
        self, *, create: bool = False, settings: Settings | None = None, models: bool = True
    ) -> Iterator[Workspace]:
        """The workspace of these settings, closed at the end.

        Args:
            create: Make the store if it does not exist.
            settings: Instead of this run's.
            models: Load the libraries that models need, which takes seconds; without, they are loaded on first use.
        """
        settings = settings or self.settings()  # so that wrong settings are reported before anything heavy is loaded
        with self.services.open_workspace(settings, create=create) as workspace:
            if not create or workspace.has_store:
                self._quiet_notices(workspace)
            yield self.with_models(workspace) if models else workspace

    def with_models(self, workspace: Workspace) -> Workspace:
        """The workspace, once the libraries are loaded that models need."""
        with self.waiting("Starting"):
            quiet_libraries(verbose=self.verbose)
        return workspace

    def _quiet_notices(self, workspace: Workspace) -> None:
        """Do not say again which source serves the store's model and embedder; --verbose does."""
        from lmcache_rag.store_model import is_store_model, recorded_model

        known = recorded_model(workspace.store.registry)
        if known is not None and is_store_model(workspace.settings.model, known) and not self.verbose:
            logging.getLogger(console.NOTICES).setLevel(logging.WARNING)

    def emit(self, document: Any, *, indent: int | None = 2) -> None:
        """Write a JSON document to stdout."""
        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        text = json.dumps(document, ensure_ascii=not unicode, indent=indent, default=str)
        # A file name that is not valid Unicode is shown by JSON's own escape.
        self.write(text.encode("utf-8", "backslashreplace").decode() + "\n")

    def write(self, text: str) -> None:
        """Write text to stdout unchanged, and flush it."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def message(self, text: str, style: str = "") -> None:
        """Write a line to stderr."""
        self.err.print(text, style=style, soft_wrap=True)

    def find(self, workspace: Workspace, *, embedder: bool) -> None:
        """Find model and embedder, without a status line: a download shows its own bars."""
        _ = workspace.engine
        if workspace.has_store:
            workspace.record_model()
        if embedder:
            _ = workspace.embedder.fingerprint

    def load(self, workspace: Workspace, *, embedder: bool) -> None:
        """Find and load model and embedder now, so that loading does not count to the time to the first token."""
        self.find(workspace, embedder=embedder)
        with self.waiting("Loading the model"):
            if callable(prepare := getattr(workspace.engine, "load", None)):
                prepare()
            if embedder:
                _ = workspace.embedder.dimension

    @contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[], None]]:
        """Show a status line on a terminal's stderr. Yields a function that removes it early."""
        if not self.err.is_terminal:
            yield lambda: None
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.err.status(what))
            yield stack.close


# From a function to a command


def command(*fields: str) -> Callable[[Function], Callable[..., None]]:
    """Turn a function into a command with the options of these settings, --json and --verbose.

    The function is called with a CommandContext first, then with its own arguments and options. It returns an exit
    status or None; what it raises becomes a message and an exit status.

    Args:
        fields: Names of settings, such as PLACE.
    """

    def decorate(function: Function) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common = [*map(_option, fields), _json_option(), _verbose_option()]

        def run(typer_context: typer.Context, **values: Any) -> None:
            context = CommandContext(
                {name: values.pop(name) for name in fields},
                json=values.pop("json"),
                verbose=values.pop("verbose"),
                services=typer_context.obj or Services(),
            )
            raise typer.Exit(_guarded(context, lambda: function(context, **values)))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_parameter("typer_context", typer.Context, inspect.Parameter.empty)]
            + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
            + common
        )
        return run

    return decorate


def _guarded(context: CommandContext, work: Callable[[], int | None]) -> int:
    def report(kind: str, message: str, remedy: str) -> None:
        if context.json:
            context.emit(console.as_error(kind, message, remedy))
        context.message(message, style="yellow" if kind == "Interrupted" else "bold red")
        if remedy:
            context.message(remedy)

    try:
        with console.on_console(context.err, verbose=context.verbose):
            status = work() or 0
        console.flush_stdout()
    except BaseException as problem:
        if isinstance(problem, SystemExit | typer.Exit):
            raise
        if context.verbose and isinstance(problem, Exception) and not isinstance(problem, BrokenPipeError):
            context.message(clean("".join(traceback.format_exception(problem))), style="dim")
        return console.status_of(problem, report)
    return status


# Common options


@dataclass(frozen=True)
class _Look:
    """How an option differs from its field's own name and default."""

    flag: str = ""
    metavar: str | None = None
    default: str = ""
    several: bool = False
    text: bool = False  # the setting itself reads its value


_LOOKS = {
    "store": _Look(metavar="DIR"),
    "engine": _Look(metavar="URL", several=True),
    "model": _Look(metavar="NAME", default="a small one"),
    "embedder": _Look(metavar="NAME", default="a small one"),
    "device": _Look(metavar="NAME"),
    "dtype": _Look(metavar="NAME", default="float32, on a GPU bfloat16"),
    "kv_budget_gb": _Look("--kv-budget", metavar="GB"),
    "policy": _Look(metavar="NAME"),
    "ratio": _Look(metavar="RATIO"),
    "kv": _Look(metavar="now|lazy|none"),
    "pin": _Look("--pin/--no-pin", default="no-pin"),
    "kv_ttl": _Look(metavar="AGE", default="off", text=True),
    "ingest_in_flight": _Look("--in-flight", metavar="N"),
    "ingest_rate": _Look("--rate", metavar="TOKENS|off", default="off", text=True),
    "min_gain": _Look(metavar="0..1|off", text=True),
    "blend": _Look("--blend/--no-blend", default="blend"),
    "order": _Look(metavar="auto|retrieved|stable"),
    "cite": _Look("--cite/--no-cite"),
    "top_k": _Look(metavar="N"),
    "max_tokens": _Look(metavar="N"),
    "trace": _Look(metavar="FILE", default="off"),
    "temperature": _Look(metavar="T"),
    "chunk_tokens": _Look(metavar="N"),
    "chunk_overlap": _Look(metavar="N"),
    "document_seconds": _Look(metavar="S"),
    "document_mb": _Look(metavar="MB"),
}


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field}".upper()


def makes_new_kv(field: str) -> bool:
    """Whether a change of this setting needs new KV."""
    return (Settings.model_fields[field].description or "").endswith("(KV)")


def described(field: str) -> str:
    """A setting's description, in a sentence."""
    return (Settings.model_fields[field].description or "").removesuffix("(KV)").strip()


def _option(field: str) -> inspect.Parameter:
    """A setting as a parameter that typer turns into an option."""
    look = _LOOKS[field]
    facts = Settings.model_fields[field]
    note = f"[env: {variable(field)}]"
    if default := look.default or ("" if facts.default is None else str(facts.default)):
        note = f"{note[:-1]}; default: {default}]"
    option = typer.Option(
        look.flag or f"--{field.replace('_', '-')}",
        metavar=look.metavar,
        help=f"{escape(described(field))} [dim]{escape(note)}[/dim]",
        show_default=False,
    )
    kind = list[str] if look.several else str if look.text else _plain(facts.annotation)
    return _parameter(field, Annotated[kind | None, option], None)


def _json_option() -> inspect.Parameter:
    """--json."""
    option = typer.Option("--json", help="Machine output: one JSON document on stdout.", show_default=False)
    return _parameter("json", Annotated[bool, option], False)


def _verbose_option() -> inspect.Parameter:
    """--verbose."""
    option = typer.Option("--verbose", "-v", help="Write more to stderr; errors come with a traceback.")
    return _parameter("verbose", Annotated[bool, option], False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _plain(annotation: Any) -> Any:
    """The type without None; a path is text here, since typer would otherwise show its own name for it."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return str if annotation is Path else annotation


# Progress on stderr: bars on a terminal, a line now and then elsewhere


class _TimeLeft(TimeRemainingColumn):
    """The time left, for one bar only: for the others it would be too optimistic."""

    def __init__(self, name: str) -> None:
        super().__init__(compact=True)
        self._name = name

    def render(self, task: Task) -> Text:
        return super().render(task) if task.description == self._name else Text()


class Bars:
    """Bars by name, with a rate and the time left. Use it as a context manager.

    Args:
        context: The command.
        main: The bar whose time left counts, and whose tokens make the rate.
    """

    def __init__(self, context: CommandContext, main: str) -> None:
        self._context, self._main = context, main
        self._tasks: dict[str, TaskID] = {}
        self._tokens = 0
        self._begin: float | None = None
        self._first = 0  # what the main bar began with: of a run that continues, work of an earlier one
        self._written = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>14}"),
            _TimeLeft(main),
            console=context.err,
            transient=True,
            disable=not context.err.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, *, tokens: int = 0) -> None:
        """Set a bar; it appears with its first update."""
        now = time.monotonic()
        rate = ""
        if name == self._main:
            if self._begin is None:
                self._begin, self._first = now, done
            if tokens and now > self._begin:  # the time of the first chunk is unknown
                self._tokens += tokens
                rate = f"{self._tokens / (now - self._begin):,.0f} tokens/s"
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, rate="")
        self._progress.update(self._tasks[name], completed=done, total=total)
        if rate:
            self._progress.update(self._tasks[name], rate=rate)
        if not self._context.err.is_terminal and now - self._written >= _EVERY_S:
            self._written = now
            left = self._left(now, done, total) if name == self._main else ""
            self._context.message("; ".join(filter(None, (*self._lines(), left, rate))))

    def _left(self, now: float, done: int, total: int) -> str:
        """The time left, if the rest goes as what this run has done."""
        if self._begin is None or done <= self._first:
            return ""
        seconds = (now - self._begin) / (done - self._first) * (total - done)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _lines(self) -> list[str]:
        return [f"{task.description} {task.completed:,.0f} of {task.total:,.0f}" for task in self._progress.tasks]


class IngestBars(Bars):
    """The two bars of an ingestion: documents, and the KV of their chunks."""

    def __init__(self, context: CommandContext, *, with_kv: bool) -> None:
        super().__init__(context, "KV" if with_kv else "documents")
        self._documents = (0, 0)
        self._chunks = (0, 0)

    def step(self, step: Step) -> None:
        """Take one step of the ingestor."""
        if step.step == "document":
            self._documents = (step.done, step.known)
            self.update("documents", *self._documents)
        else:
            self._chunks = (step.done, step.known)
            self.update("KV", step.done, self._expected(), tokens=step.tokens)

    def _expected(self) -> int:
        """Chunks in all, if the documents still to come hold as many as those read."""
        read, documents = self._documents
        known = self._chunks[1]
        return known if not read else max(known, round(known * max(documents, read) / read))
