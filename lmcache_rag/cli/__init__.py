"""The command line: thin verbs over the library. Answers and results go to stdout, everything else to stderr.

::

    app       the program: help, exit statuses, the list of verbs
    verb      turns a function into a verb: common options, errors, exit status
    options   the common options, made from Settings
    run       what a verb gets: its settings, the two consoles, JSON, the workspace
    signals   Ctrl-C and SIGTERM
    failures  from an exception to a message and an exit status
    logs      the library's log on stderr
    streaming an answer while it comes
    render, answers, bars, status_view    what it looks like
    ingest, ask, chat, demo, maintain, configure    the verbs
"""

from __future__ import annotations


def main() -> None:
    """Run the program `lmcache-rag`; ends the process with its exit status."""
    from lmcache_rag.cli import failures, signals

    signals.install()
    failures.settle_streams()
    try:
        from lmcache_rag.cli.app import app  # takes a moment: Ctrl-C must already be in hand

        app(prog_name="lmcache-rag")
    except KeyboardInterrupt as stop:  # outside of any verb
        failures.end(stop)


__all__ = ["main"]
