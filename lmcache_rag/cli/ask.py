"""ask, search, chat and demo: a question, a file of questions, passages, a conversation, a page of two answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag._utils import clean, well_formed
from lmcache_rag.cli.console import PARTLY, Terminated, as_error, forget_signal, quiet_libraries
from lmcache_rag.cli.render import (
    WordWrap,
    answer_as_dict,
    comparison_as_dict,
    plain,
    show,
    show_answer_end,
    show_answer_line,
    show_comparison,
    show_hits,
    show_notes,
    show_sources,
    stats_table,
)
from lmcache_rag.cli.run import ANSWER, EMBED, PLACE, CommandContext, command
from lmcache_rag.engines.base import TextDelta
from lmcache_rag.errors import ConfigError, ContextLengthError, LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.prompt import Turn
    from lmcache_rag.rag import RAG, Answer, RAGEvent
    from lmcache_rag.workspace import Workspace

Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="The question; - reads it from stdin.", show_default=False)
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Run a full prefill too: both TTFTs, and where the answers differ.")
]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        help="Answer each line of a file (- for stdin) as a line of JSON.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="URL", help="A second server, without blending.", show_default=False),
]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="Host on which the page listens.")]
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
HELP = """\
/help      this list
/sources   the passages that the last answer comes from
/stats     what the last answer reused
/reset     forget the conversation and start a new one
/quit      leave (so does Ctrl-D)
Ctrl-C stops the answer that is being written and keeps the conversation."""


@command(*PLACE, *EMBED, *ANSWER)
def ask(
    context: CommandContext, question: Question = None, compare: Compare = False, questions: Questions = None
) -> int | None:
    """Answer a question, then show the sources and what was reused.

    The answer is streamed. Sources and statistics go to stdout too,
    so that a file or a pipe gets them; --json gives all as one document. With
    --questions, one that fails gives its error and does not stop the others;
    the exit status is then 1.

    [bold]Examples[/bold]
      lmcache-rag ask 'What is a KV cache?'
      lmcache-rag ask 'What is a KV cache?' --compare
      lmcache-rag ask --questions questions.txt > answers.jsonl
    """
    if (question is None) == (questions is None):
        raise ConfigError("Give one question, or --questions with a file.", remedy="See lmcache-rag ask --help.")
    if questions is not None and compare:
        raise ConfigError("--questions and --compare do not go together.", remedy="Leave one out.")
    with context.workspace() as workspace:
        if questions is not None:
            return _each(context, workspace, _lines(questions))
        text = sys.stdin.read().strip() if question == "-" else str(question)
        context.load(workspace, embedder=True)
        rag = workspace.rag
        if compare:
            _compare(context, rag, text)
        elif context.json:
            with context.waiting("Answering"):
                answer = rag.ask(text)
            context.emit(answer_as_dict(answer))
        else:
            _stream(context, rag, text)
    return None


@command("store", "device", *EMBED, "top_k")
def search(context: CommandContext, question: Question = None) -> None:
    """Find the passages that are nearest to a question, without an answer.

    Loads the embedder only, no language model.

    [bold]Examples[/bold]
      lmcache-rag search 'Who proposed RoPE?'
      lmcache-rag search 'Who proposed RoPE?' --top-k 10 --json
    """
    from lmcache_rag.rag import retrieve

    if question is None:
        raise ConfigError("Give a question.", remedy="See lmcache-rag search --help.")
    text = well_formed(sys.stdin.read().strip() if question == "-" else question)
    with context.workspace() as workspace:
        with context.waiting("Searching"):
            hits = retrieve(workspace.store, workspace.embedder, text, workspace.settings.top_k)
        if context.json:
            context.emit({"question": text, "passages": plain(hits)})
        elif hits:
            show_hits(context.out, hits, passages=True)
        else:
            context.out.print("The store is empty. Fill it with: lmcache-rag ingest")


def _stream(context: CommandContext, rag: RAG, question: str) -> None:
    def show(answer: Answer) -> None:
        context.write("\n")
        show_answer_end(context.out, answer)
        sys.stdout.flush()

    stream_answer(context, rag.stream(question), show)


def _compare(context: CommandContext, rag: RAG, question: str) -> None:
    with context.waiting("Answering twice"):
        comparison = rag.compare(question)
    if context.json:
        context.emit(comparison_as_dict(comparison))
        return
    context.write(clean(comparison.blended.text) + "\n\n")
    show_sources(context.out, comparison.blended)
    show_notes(context.out, comparison.blended)
    show_comparison(context.out, comparison)


def _each(context: CommandContext, workspace: Workspace, questions: Iterator[str]) -> int:
    context.load(workspace, embedder=True)
    rag = workspace.rag
    status = 0
    for question in questions:
        [answer] = rag.ask_batch([question])
        if isinstance(answer, LMCacheRAGError):
            status = PARTLY
            problem = as_error(type(answer).__name__, answer.message, answer.remedy)
            context.emit({"question": question, **problem}, indent=None)
        else:
            context.emit(answer_as_dict(answer), indent=None)
    return status


def _lines(name: str) -> Iterator[str]:
    if name == "-":
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    try:
        with Path(name).open(encoding="utf-8-sig", errors="replace") as file:
            yield from (line.strip() for line in file if line.strip())
    except OSError as problem:
        raise ConfigError(
            f"The questions cannot be read from {name}: {problem}", remedy="Name a text file."
        ) from problem


@command(*PLACE, *EMBED, *ANSWER)
def chat(context: CommandContext) -> int:
    r"""Ask questions in a conversation; each answer uses the earlier turns.

    In the chat, /help lists its commands. Questions may come from a pipe, one
    a line; the exit status is then 1 if one failed. With --json each answer is
    a line of JSON.

    [bold]Examples[/bold]
      lmcache-rag chat
      lmcache-rag chat --store wiki --top-k 6
      printf 'What is RoPE?\nWho proposed it?\n' | lmcache-rag chat
    """
    with context.workspace() as workspace:
        context.load(workspace, embedder=True)
        talk = Chat(context, workspace.rag)
        talk.loop()
    return PARTLY if talk.failed and not talk.interactive else 0


class Chat:
    """One conversation.

    Args:
        context: The command.
        rag: Answers.
    """

    def __init__(self, context: CommandContext, rag: RAG) -> None:
        self.context, self.rag = context, rag
        self.history: list[Turn] = []
        self.last: Answer | None = None
        self.failed = False
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._commands = {
            "/help": lambda: self._note(HELP),
            "/sources": self._sources,
            "/stats": self._stats,
            "/reset": self._reset,
        }

    def loop(self) -> None:
        """Take questions until /quit or the end of stdin."""
        if self.interactive:
            self._note("Ask away. /help lists the commands, Ctrl-D leaves.")
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            if line in self._commands:
                self._commands[line]()
            elif line.startswith("/"):
                self._note(f"There is no command {clean(line.split()[0])}. /help lists them.")
            elif line:
                self._answer(line)

    def _answer(self, question: str) -> None:
        from lmcache_rag.prompt import Turn

        pieces: list[str] = []
        try:
            stream_answer(
                self.context,
                self.rag.stream(question, history=self.history),
                self._answered,
                pieces=pieces,
                quiet=self.context.json,
            )
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not self.interactive:
                raise
            forget_signal()
            self.context.write("\n")
            self._note("Stopped. The conversation continues.")
        except LMCacheRAGError as problem:
            self._failed(question, problem)
            return
        # A partial answer is part of the conversation too; without any text the question is dropped as well.
        if text := "".join(pieces):
            self.history += [Turn("user", question), Turn("assistant", text)]

    def _answered(self, answer: Answer) -> None:
        self.last = answer
        if self.context.json:
            self.context.emit(answer_as_dict(answer), indent=None)
        else:
            self.context.write("\n\n")
            show_answer_line(self.context.out, answer)
            self.context.write("\n")

    def _failed(self, question: str, problem: LMCacheRAGError) -> None:
        self.failed = True
        if self.context.json:
            error = as_error(type(problem).__name__, problem.message, problem.remedy)
            self.context.emit({"question": question, **error}, indent=None)
        self.context.message(clean(problem.message), style="bold red")
        if isinstance(problem, ContextLengthError) and self.history:
            self._note("The conversation has become too long: /reset forgets it, the store stays as it is.")
        elif problem.remedy:
            self._note(clean(problem.remedy))

    def _lines(self) -> Iterator[str]:
        """Questions and commands, stripped; ends at the end of stdin."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its editing and history
        warned = False
        while True:
            try:
                line = self._read()
                warned = False
            except EOFError:
                if self.interactive:
                    self._note("")
                return
            except KeyboardInterrupt as stop:
                if isinstance(stop, Terminated) or not self.interactive or warned:
                    raise
                warned = True
                forget_signal()
                self._note("\nCtrl-C again or Ctrl-D leaves.")
                continue
            yield line.strip()

    def _read(self) -> str:
        if self.interactive and sys.stdout.isatty():
            return input("> ")
        if self.interactive:
            self.context.err.print("> ", end="")
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line

    def _note(self, text: str) -> None:
        """Write a line that is not part of an answer to stderr."""
        self.context.message(text, style="dim")

    def _sources(self) -> None:
        if self.last is None:
            self._note("Nothing has been answered yet.")
        else:
            show_sources(self.context.err if self.context.json else self.context.out, self.last, passages=True)

    def _stats(self) -> None:
        if self.last is None:
            self._note("Nothing has been answered yet.")
        else:
            console = self.context.err if self.context.json else self.context.out
            show(console, stats_table(self.last.stats))
            show_notes(console, self.last)

    def _reset(self) -> None:
        self.history.clear()
        self.last = None
        self._note("The conversation is forgotten.")


def stream_answer(
    context: CommandContext,
    events: Iterator[RAGEvent],
    on_answer: Callable[[Answer], None],
    *,
    pieces: list[str] | None = None,
    quiet: bool = False,
) -> None:
    """Write RAG.stream's events as they come; leaving early, by Ctrl-C too, stops the computation.

    Args:
        context: The command.
        events: The events of RAG.stream.
        on_answer: Called once the answer is complete. Missing KV is computed and stored after that.
        pieces: Takes the text as it comes.
        quiet: Do not write the text.
    """
    wrap = WordWrap(context.out.width) if context.out.is_terminal else None
    try:
        with context.waiting("Answering") as stop_waiting:
            for event in events:
                stop_waiting()
                if not isinstance(event, TextDelta):
                    if wrap and not quiet:
                        context.write(wrap.end())
                    on_answer(event)
                    continue
                if pieces is not None:
                    pieces.append(event.text)
                if not quiet:
                    context.write(wrap.feed(clean(event.text)) if wrap else clean(event.text))
    except KeyboardInterrupt:
        if wrap and not quiet:
            context.write(wrap.end())
        raise
    finally:
        if close := getattr(events, "close", None):
            close()


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
