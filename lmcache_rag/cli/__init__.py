"""The command line: thin commands over the library. Results go to stdout, everything else to stderr.

::

    app       the program: its commands, help, exit statuses
    run       from a function to a command: options, context, progress, errors
    console   signals, exit statuses, the standard streams, the log on stderr
    render    what results look like
    ask, ingest, maintain, serve, bench, bench_checks    the commands
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_rag.cli.run import Services


def main(services: Services | None = None) -> None:
    """Run the program `lmcache-rag`; ends the process with its exit status.

    Args:
        services: What the commands take from the library; None: the usual.
    """
    from lmcache_rag.cli import console

    console.install_signals()
    console.settle_streams()
    try:
        from lmcache_rag.cli.app import app  # slow to import: signals must be handled before

        app(prog_name="lmcache-rag", obj=services)
    except KeyboardInterrupt as stop:  # outside of any command
        console.end(stop)


__all__ = ["main"]
