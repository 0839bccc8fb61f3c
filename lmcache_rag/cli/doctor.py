"""doctor: what works, what does not, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from lmcache_rag.cli.failures import PARTLY
from lmcache_rag.cli.render import clean, plain, show
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb
from lmcache_rag.credentials import api_key, ingest_key

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("failed", "bold red")}


@verb()
def doctor(
    run: Run,
    url: Annotated[
        str, typer.Argument(metavar="[URL]", help="Address of a vLLM server; without it only this machine is checked.")
    ] = "",
    lmcache_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="HTTP address of the LMCache server. [dim]\\[default: http://127.0.0.1:8089][/dim]",
            show_default=False,
        ),
    ] = "",
    check_model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME", help="Model to check, by folder or Hugging Face name.", show_default=False
        ),
    ] = "",
) -> int:
    """Check GPU, versions, connector, servers, and a live round trip.

    The round trip precomputes three random chunks, asks for them in another
    order, and compares ratio 1 with a run without reuse. The server's key, if
    any, is taken from the variable VLLM_API_KEY or LMCACHE_RAG_API_KEY, and
    its ingest key from LMCACHE_RAG_INGEST_KEY or LMCACHE_RAG_INGEST_KEY_FILE.
    Exit status 1 when something failed.

    [bold]Examples[/bold]
      lmcache-rag doctor
      lmcache-rag doctor http://127.0.0.1:8000
      lmcache-rag doctor http://127.0.0.1:8000 --json
    """
    from lmcache_rag.serving.doctor import examine

    found = []
    with run.waiting("Checking"):
        keys = {"api_key": api_key("VLLM_API_KEY"), "ingest_key": ingest_key()}
        for check in examine(url, lmcache_url=lmcache_url, model=check_model, **keys):
            found.append(check)
    failed = [check for check in found if check.state == "failed"]
    if run.json:
        run.emit({"healthy": not failed, "checks": plain(found)})
        return PARTLY if failed else 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Check", style="bold", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("Result", overflow="fold")
    table.add_column("Remedy", overflow="fold")
    for check in found:
        word, style = _MARKS.get(check.state, (check.state, "dim"))
        table.add_row(Text(check.name), Text(word, style=style), Text(clean(check.result)), Text(clean(check.remedy)))
    show(run.out, table)
    if failed:
        run.tell(f"{len(failed)} of {len(found)} checks failed.", style="bold red")
    return PARTLY if failed else 0
