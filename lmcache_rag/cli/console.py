"""The process around a command: signals, exit statuses, the standard streams, and the library's log on stderr.

Ctrl-C and SIGTERM both end the work in the same way, by an exception in the main thread. They are handled before
anything heavy is imported, so this module imports nothing heavy itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lmcache_rag.errors import ConfigError, LMCacheRAGError, OptionalDependencyError

if TYPE_CHECKING:
    from rich.console import Console

PARTLY = 1  # done, but something failed: the output shows what
USAGE = 2  # also typer's own
FAILED = 3
UNEXPECTED = 70  # EX_SOFTWARE
INTERRUPTED, TERMINATED, BROKEN_PIPE = (128 + n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))

EXIT_STATUS = """[bold]Exit status[/bold]
  0    success
  1    done in part: the output shows what failed
  2    wrong usage or settings
  3    it could not be done: the message has the reason
  70   an error in this program
  130  Ctrl-C
  141  the output's reader has closed it
  143  terminated"""

Report = Callable[[str, str, str], None]
"""Called with (kind of error, message, remedy)."""

if TYPE_CHECKING:
    from rich.console import Console

OURS = "lmcache_rag"
NOTICES = "lmcache_rag.weights"  # which source serves a model
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}

_received: int | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM. Code that cleans up after Ctrl-C handles it too."""


def install_signals() -> None:
    """Handle both signals, unless the parent process had them ignored (as nohup does)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def received_signal() -> int | None:
    """The last signal that was received and not forgotten since.

    Native code that a signal interrupts may raise some other exception; this is its true cause.
    """
    return _received


def forget_signal() -> None:
    """Forget the signal: it was meant for a part of the work only, which has stopped."""
    global _received
    _received = None


def ignore_signals() -> None:
    """Ignore signals while the process writes its last message: another Ctrl-C must not interrupt that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)


def command_line() -> str:
    """The command that runs, ready to be pasted into a shell."""
    return shlex.join(["lmcache-rag", *sys.argv[1:]])


# How a command ends


def status_of(problem: BaseException, report: Report) -> int:
    """Report a problem to the user, and return the exit status."""
    if isinstance(problem, BrokenPipeError):
        _drop_stdout()
        return BROKEN_PIPE
    if isinstance(problem, KeyboardInterrupt) or received_signal() is not None:
        ignore_signals()
        terminated = isinstance(problem, Terminated) or received_signal() == signal.SIGTERM
        report("Interrupted", "Stopped. The store is intact.", f"To continue: {command_line()}")
        return TERMINATED if terminated else INTERRUPTED
    import typer  # not at the top: signals are installed before anything heavy is imported

    if isinstance(problem, typer.Abort):
        report("Aborted", "Nothing was changed.", "")
        return PARTLY
    if isinstance(problem, LMCacheRAGError):
        report(type(problem).__name__, problem.message, problem.remedy)
        return USAGE if isinstance(problem, ConfigError | OptionalDependencyError) else FAILED
    message = f"{type(problem).__name__}: {problem}".strip().removesuffix(":")
    report(type(problem).__name__, message, "This should not happen. Run it again with --verbose to see where.")
    return UNEXPECTED


def end(problem: BaseException) -> NoReturn:
    """End the process because of a problem that came up outside of any command."""
    raise SystemExit(status_of(problem, lambda kind, message, remedy: _write(f"{message} {remedy}".strip())))


def flush_stdout() -> None:
    """Flush stdout; raises BrokenPipeError if its reader is gone."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"\n{line}\n")


def _drop_stdout() -> None:
    """Redirect stdout to nowhere, since its reader is gone: Python must not fail at exit when it flushes it."""
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
    """Make stdout writable and stdin readable, however the process was started and whatever bytes come."""
    if sys.stdout is None:  # closed by the parent process
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    elif reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # an answer must not fail on a terminal that cannot show its letters
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        with contextlib.suppress(io.UnsupportedOperation):  # something of it was read already
            reconfigure(errors="surrogateescape")  # as in arguments: names of files keep their bytes


# Logs


class _ConsoleHandler(logging.Handler):
    """One line for each record; it appears above a bar that is being shown."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        super().__init__()
        self._console, self._verbose = console, verbose

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] == OURS
        if not (ours or self._verbose or record.levelno >= logging.ERROR):
            return
        from lmcache_rag._utils import clean

        try:
            text = clean(self.format(record))
            if self._verbose:
                text = f"{record.levelname} {record.name}: {text}"
            elif record.levelno >= logging.WARNING:
                text = f"{record.levelname.capitalize()}: {text}"
            self._console.print(text, style=_STYLES.get(record.levelno, "dim"), soft_wrap=True)
        except Exception:
            self.handleError(record)


@contextmanager
def on_console(console: Console, *, verbose: bool) -> Iterator[None]:
    """Show log records on a console within a `with` block; restore the loggers at its end."""
    handler = _ConsoleHandler(console, verbose=verbose)
    root, ours, ingestion, notices = (logging.getLogger(name) for name in ("", OURS, f"{OURS}.ingest", NOTICES))
    levels = ours.level, ingestion.level, notices.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        ingestion.setLevel(logging.ERROR)  # failures are listed in the summary
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip((ours, ingestion, notices), levels, strict=True):
            logger.setLevel(level)


def quiet_libraries(*, verbose: bool) -> None:
    """Load the heavy libraries, and switch off their own bars and hints for this process; downloads keep theirs."""
    # Several threads use tokenizers here; their warning about forks is of no use on a command line.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    downloads_silent = are_progress_bars_disabled()
    try:
        import torch  # noqa: F401 - takes seconds: better here, under a status line, than inside a measured time
        from transformers.utils import logging as transformers_log
    except ModuleNotFoundError:  # a client needs neither
        return
    transformers_log.disable_progress_bar()
    (disable_progress_bars if downloads_silent else enable_progress_bars)()
    if not verbose:
        transformers_log.set_verbosity_error()
