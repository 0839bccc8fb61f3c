"""The library's log on stderr, for as long as a verb runs; other libraries only when they must be heard."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmcache_rag.cli.render import clean

if TYPE_CHECKING:
    from rich.console import Console

OURS = "lmcache_rag"
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class _ConsoleHandler(logging.Handler):
    """One line for each record; it appears above a bar that is being shown."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        super().__init__()
        self._console, self._verbose = console, verbose

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] == OURS
        if not (ours or self._verbose or record.levelno >= logging.ERROR):
            return
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
    """Show log records on a console, and put everything back at the end."""
    handler = _ConsoleHandler(console, verbose=verbose)
    root, ours, ingestion = (logging.getLogger(name) for name in ("", OURS, f"{OURS}.ingest"))
    levels = ours.level, ingestion.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        ingestion.setLevel(logging.ERROR)  # what failed stands in the summary, all together
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip((ours, ingestion), levels, strict=True):
            logger.setLevel(level)


def quiet_libraries(*, verbose: bool) -> None:
    """Load the heavy libraries, and switch off their own bars and hints for this process; downloads keep theirs."""
    # Tokenizers are used by several threads here; their warning about forks is not for the user of a command line.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_log

    downloads_silent = are_progress_bars_disabled()
    transformers_log.disable_progress_bar()
    (disable_progress_bars if downloads_silent else enable_progress_bars)()
    if not verbose:
        transformers_log.set_verbosity_error()
    import torch  # noqa: F401 - takes seconds: better here, where somebody watches, than inside a measured time
