"""Turns a function into a verb of the command line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import typer

from lmcache_rag.cli import console, failures, options
from lmcache_rag.cli.render import clean
from lmcache_rag.cli.run import Run

Function = Callable[..., int | None]


def verb(*fields: str) -> Callable[[Function], Callable[..., None]]:
    """Give a function the options of these settings, --json and --verbose.

    The function is called with a Run first, then with its own arguments and options. It returns an exit status or
    None; what it raises becomes a message and an exit status.

    Args:
        fields: Names of settings, see lmcache_rag.cli.options.
    """

    def decorate(function: Function) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common = [*map(options.parameter, fields), options.json_parameter(), options.verbose_parameter()]

        def command(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            run = Run(given, json=values.pop("json"), verbose=values.pop("verbose"))
            raise typer.Exit(_guarded(run, lambda: function(run, **values)))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        )
        return command

    return decorate


def _guarded(run: Run, work: Callable[[], int | None]) -> int:
    def tell(kind: str, message: str, remedy: str) -> None:
        if run.json:
            run.emit(failures.as_error(kind, message, remedy))
        run.tell(message, style="yellow" if kind == "Interrupted" else "bold red")
        if remedy:
            run.tell(remedy)

    try:
        with console.on_console(run.err, verbose=run.verbose):
            status = work() or 0
        failures.flush_stdout()
    except BaseException as problem:
        if isinstance(problem, SystemExit | typer.Exit):
            raise
        if run.verbose and isinstance(problem, Exception) and not isinstance(problem, BrokenPipeError):
            run.tell(clean("".join(traceback.format_exception(problem))), style="dim")
        return failures.status_of(problem, tell)
    return status
