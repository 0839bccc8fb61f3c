"""demo: the comparison page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcache_rag.cli.console import forget_signal, quiet_libraries
from lmcache_rag.cli.run import EMBED, PLACE, CommandContext, command

Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="URL", help="A second server, without blending.", show_default=False),
]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="Where the page listens.")]
Port = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="Its port; 0: a free one.")]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="File with the page's password. [dim][env: LMCACHE_RAG_DEMO_PASSWORD][/dim]",
        show_default=False,
    ),
]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")]


@command(*PLACE, *EMBED, "policy", "ratio", "top_k", "max_tokens", "temperature")
def demo(
    context: CommandContext,
    *,
    baseline: Baseline = None,
    host: Host = "127.0.0.1",
    port: Port = 8090,
    password_file: PasswordFile = None,
    no_browser: NoBrowser = False,
) -> None:
    """A page that answers each question twice, with and without blended KV.

    An empty store gets sample documents first. Without --engine a small model
    answers here, in both panes. With --engine alone that server answers in both
    panes, in the second one without blending and with a cache salt of its own;
    with --baseline a second server does. Other machines can open the page with
    a password only. Ctrl-C ends it.

    [bold]Examples[/bold]
      lmcache-rag demo
      lmcache-rag demo --engine http://localhost:8000
      lmcache-rag demo --engine http://gpu:8000 --baseline http://gpu:8001
    """
    from lmcache_rag.demo.server import listen, open_browser, page_password, require_nicegui, serve

    require_nicegui()
    settings = context.settings()
    if baseline is not None:
        from lmcache_rag.engines.vllm_client import server_urls

        baseline = ",".join(server_urls(baseline))
    password = page_password(host, password_file)
    quiet_libraries(verbose=context.verbose)
    sock = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{sock.getsockname()[1]}"

    def ready() -> None:
        context.out.print(f"The page: {url}", soft_wrap=True)
        context.message("Ctrl-C ends it.")
        if not no_browser:
            open_browser(url)

    from lmcache_rag.demo.hub import Hub

    try:
        serve(Hub(settings, baseline=baseline), sock, host=host, password=password, on_ready=ready)
    except KeyboardInterrupt:  # how a page ends
        forget_signal()
    context.message("The page is closed.")
