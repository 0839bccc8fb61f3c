"""What a verb gets to work with."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lmcache_rag.cli.console import quiet_libraries

if TYPE_CHECKING:
    from lmcache_rag.settings import Settings
    from lmcache_rag.workspace import Workspace


def open_workspace(settings: Settings, *, create: bool) -> Workspace:
    """Where every verb gets its workspace from; a program that has a loaded engine already may put it in here."""
    from lmcache_rag.workspace import Workspace

    return Workspace(settings, create=create)


opener: Callable[..., Workspace] = open_workspace


class _PlainConsole(Console):
    """A console that takes every text as it stands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave the exit status to us; rich would end the process with its own."""
        raise BrokenPipeError


def _stdout() -> Console:
    # Nothing is folded at 80 columns on its way into a file.
    return _PlainConsole(file=sys.stdout, width=None if sys.stdout.isatty() else 200)


def _stderr() -> Console:
    return _PlainConsole(file=sys.stderr, soft_wrap=not sys.stderr.isatty())


@dataclass
class Run:
    """One run of one verb.

    Attributes:
        given: Settings by argument; None where not given.
        json: Machine output.
        verbose: Say more.
        out: stdout: results.
        err: stderr: everything else.
    """

    given: dict[str, Any]
    json: bool = False
    verbose: bool = False
    out: Console = field(default_factory=_stdout)
    err: Console = field(default_factory=_stderr)

    def settings(self) -> Settings:
        """All settings of this run."""
        from lmcache_rag.settings import Settings

        given = dict(self.given)
        return Settings.load(given.pop("store", None), **given)

    @contextmanager
    def workspace(self, *, create: bool = False, settings: Settings | None = None) -> Iterator[Workspace]:
        """The workspace of these settings, closed at the end."""
        settings = settings or self.settings()  # what is wrong with them shows before anything heavy is loaded
        with self.waiting("Starting"):
            quiet_libraries(verbose=self.verbose)
        with opener(settings, create=create) as workspace:
            yield workspace

    def emit(self, document: Any, *, indent: int | None = 2) -> None:
        """Write a JSON document to stdout."""
        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        text = json.dumps(document, ensure_ascii=not unicode, indent=indent, default=str)
        # A file name that is not valid Unicode is shown by JSON's own escape.
        self.write(text.encode("utf-8", "backslashreplace").decode() + "\n")

    def write(self, text: str) -> None:
        """Write text to stdout as it stands, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def tell(self, text: str, style: str = "") -> None:
        """Write a line to stderr."""
        self.err.print(text, style=style, soft_wrap=True)

    def find(self, workspace: Workspace, *, embedder: bool) -> None:
        """Find model and embedder, with no sign of life of our own: a download shows its bars."""
        _ = workspace.engine
        if embedder:
            _ = workspace.embedder.fingerprint

    def load(self, workspace: Workspace, *, embedder: bool) -> None:
        """Find and load model and embedder now: their loading is no part of the time to a first token."""
        self.find(workspace, embedder=embedder)
        with self.waiting("Loading the model"):
            if callable(prepare := getattr(workspace.engine, "load", None)):
                prepare()
            if embedder:
                _ = workspace.embedder.dimension

    @contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[], None]]:
        """Show on a terminal's stderr that something takes a moment. Yields what ends that early."""
        if not self.err.is_terminal:
            yield lambda: None
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.err.status(what))
            yield stack.close
