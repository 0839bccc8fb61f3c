"""The program: its commands and their help."""

from __future__ import annotations

from typing import Annotated

import typer

from lmcache_rag import __version__
from lmcache_rag.cli import maintain
from lmcache_rag.cli.ask import ask, chat, demo, search
from lmcache_rag.cli.bench import speed
from lmcache_rag.cli.bench_checks import exact, soak
from lmcache_rag.cli.bench_quality import quality
from lmcache_rag.cli.console import EXIT_STATUS
from lmcache_rag.cli.ingest import ingest
from lmcache_rag.cli.plan import plan
from lmcache_rag.cli.serve import ServeCommand, doctor, serve

app = typer.Typer(
    name="lmcache-rag",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=EXIT_STATUS,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmcache-rag {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RAG with a lower TTFT: each chunk's KV is computed once, for any order.

    [bold]First steps[/bold]
      lmcache-rag ingest docs/
      lmcache-rag ask 'What is a KV cache?'

    The store is the folder lmcache-rag-store, unless --store or the variable
    LMCACHE_RAG_STORE names another.
    """


for _function in (ingest, ask, search, chat, demo):
    app.command(rich_help_panel="Use", no_args_is_help=_function in (ingest, ask, search))(_function)
app.command("list", rich_help_panel="Look after")(maintain.list_documents)
for _function in (
    maintain.status,
    maintain.warm,
    maintain.verify,
    maintain.remove,
    maintain.forget,
    maintain.prune,
    maintain.settings,
):
    names_documents = _function in (maintain.remove, maintain.forget)
    app.command(rich_help_panel="Look after", no_args_is_help=names_documents)(_function)
app.command(
    rich_help_panel="Serve",
    no_args_is_help=True,
    cls=ServeCommand,
    context_settings={"allow_interspersed_args": False},  # what follows MODEL is vLLM's
)(serve)
app.command(rich_help_panel="Serve")(doctor)
app.command(rich_help_panel="Serve")(plan)
bench = typer.Typer(no_args_is_help=True, help="Measure a server.")
bench.command()(speed)
bench.command()(quality)
bench.command(no_args_is_help=True)(exact)
bench.command(no_args_is_help=True)(soak)
app.add_typer(bench, name="bench", rich_help_panel="Serve")
