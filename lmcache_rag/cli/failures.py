"""How a verb ends when it does not end well: exit status, and what is said."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from lmcache_rag.cli import signals
from lmcache_rag.errors import ConfigError, LMCacheRAGError

PARTLY = 1  # done, but something was not right: the output says what
USAGE = 2  # also typer's own
FAILED = 3
UNEXPECTED = 70  # EX_SOFTWARE
INTERRUPTED, TERMINATED, BROKEN_PIPE = (128 + n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))

EXIT_STATUS = """[bold]Exit status[/bold]
  0    all well
  1    done in part: the output says what failed
  2    wrong use or settings
  3    it could not be done: the message says why
  70   a fault of this program
  130  Ctrl-C
  141  nobody reads the output any more
  143  terminated"""

Tell = Callable[[str, str, str], None]
"""Called with (kind of error, message, remedy)."""


def status_of(problem: BaseException, tell: Tell) -> int:
    """Tell the user about a problem, and return the exit status."""
    if isinstance(problem, BrokenPipeError):
        _drop_stdout()
        return BROKEN_PIPE
    if isinstance(problem, KeyboardInterrupt) or signals.received() is not None:
        signals.ignore()
        terminated = isinstance(problem, signals.Terminated) or signals.received() == signal.SIGTERM
        tell("Interrupted", "Stopped. The store is sound.", f"To go on: {signals.command_line()}")
        return TERMINATED if terminated else INTERRUPTED
    if isinstance(problem, typer.Abort):
        tell("Aborted", "Nothing was changed.", "")
        return PARTLY
    if isinstance(problem, LMCacheRAGError):
        tell(type(problem).__name__, problem.message, problem.remedy)
        return USAGE if isinstance(problem, ConfigError) else FAILED
    message = f"{type(problem).__name__}: {problem}".strip().removesuffix(":")
    tell(type(problem).__name__, message, "This should not happen. Run it again with --verbose to see where.")
    return UNEXPECTED


def end(problem: BaseException) -> NoReturn:
    """End the process because of a problem that came up outside of any verb."""
    raise SystemExit(status_of(problem, lambda kind, message, remedy: _write(f"{message} {remedy}".strip())))


def flush_stdout() -> None:
    """Write out what stdout still holds; raises BrokenPipeError where nobody reads it any more."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"\n{line}\n")


def _drop_stdout() -> None:
    """Nobody reads stdout any more; Python itself must not stumble over that when it exits."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # not a real file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def as_error(kind: str, message: str, remedy: str) -> dict[str, Any]:
    """A problem for JSON."""
    return {"error": {"type": kind, "message": message, "remedy": remedy}}


def settle_streams() -> None:
    """Make stdout fit to be written to, whatever we were started with."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    elif reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # an answer must not fail at a terminal without its letters
