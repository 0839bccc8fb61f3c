"""chat: a conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmcache_rag.cli import answers, options, signals
from lmcache_rag.cli.failures import PARTLY, as_error
from lmcache_rag.cli.render import clean, show
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.streaming import follow
from lmcache_rag.cli.verb import verb
from lmcache_rag.errors import ContextLengthError, LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.prompt import Turn
    from lmcache_rag.rag import RAG, Answer

HELP = """\
/help      this list
/sources   the passages that the last answer comes from
/stats     what the last answer reused
/reset     forget the conversation and begin anew
/quit      leave (so does Ctrl-D)
Ctrl-C stops the answer that is being written and keeps the conversation."""


@verb(*options.PLACE, *options.EMBED, *options.ANSWER)
def chat(run: Run) -> int:
    r"""Ask one question after another; each sees the ones before.

    In the chat, /help lists its commands. Questions may come from a pipe, one
    a line; the exit status is then 1 if one failed. With --json each answer is
    a line of JSON.

    [bold]Examples[/bold]
      lmcache-rag chat
      lmcache-rag chat --store wiki --top-k 6
      printf 'What is RoPE?\nWho proposed it?\n' | lmcache-rag chat
    """
    with run.workspace() as workspace:
        run.load(workspace, embedder=True)
        talk = Chat(run, workspace.rag)
        talk.loop()
    return PARTLY if talk.failed and not talk.interactive else 0


class Chat:
    """One conversation.

    Args:
        run: The run.
        rag: Answers.
    """

    def __init__(self, run: Run, rag: RAG) -> None:
        self.run, self.rag = run, rag
        self.history: list[Turn] = []
        self.last: Answer | None = None
        self.failed = False
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._commands = {
            "/help": lambda: self._say(HELP),
            "/sources": self._sources,
            "/stats": self._stats,
            "/reset": self._reset,
        }

    def loop(self) -> None:
        """Take questions until /quit or the end of stdin."""
        if self.interactive:
            self._say("Ask away. /help lists the commands, Ctrl-D leaves.")
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            if line in self._commands:
                self._commands[line]()
            elif line.startswith("/"):
                self._say(f"There is no command {clean(line.split()[0])}. /help lists them.")
            elif line:
                self._answer(line)

    def _answer(self, question: str) -> None:
        from lmcache_rag.prompt import Turn

        pieces: list[str] = []
        try:
            follow(
                self.run,
                self.rag.stream(question, history=self.history),
                self._answered,
                pieces=pieces,
                quiet=self.run.json,
            )
        except KeyboardInterrupt as stop:
            if isinstance(stop, signals.Terminated) or not self.interactive:
                raise
            signals.forgive()
            self.run.write("\n")
            self._say("Stopped. The conversation goes on.")
        except LMCacheRAGError as problem:
            self._failed(question, problem)
            return
        # Half an answer is part of the conversation too; none at all is as if nothing had been asked.
        if text := "".join(pieces):
            self.history += [Turn("user", question), Turn("assistant", text)]

    def _answered(self, answer: Answer) -> None:
        self.last = answer
        if self.run.json:
            self.run.emit(answers.as_dict(answer), indent=None)
        else:
            self.run.write("\n\n")

    def _failed(self, question: str, problem: LMCacheRAGError) -> None:
        self.failed = True
        if self.run.json:
            error = as_error(type(problem).__name__, problem.message, problem.remedy)
            self.run.emit({"question": question, **error}, indent=None)
        self.run.tell(clean(problem.message), style="bold red")
        if isinstance(problem, ContextLengthError) and self.history:
            self._say("The conversation has become too long: /reset forgets it, the store stays as it is.")
        elif problem.remedy:
            self._say(clean(problem.remedy))

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
                    self._say("")
                return
            except KeyboardInterrupt as stop:
                if isinstance(stop, signals.Terminated) or not self.interactive or warned:
                    raise
                warned = True
                signals.forgive()
                self._say("\nCtrl-C again or Ctrl-D leaves.")
                continue
            yield line.strip()

    def _read(self) -> str:
        if self.interactive and sys.stdout.isatty():
            return input("> ")
        if self.interactive:
            self.run.err.print("> ", end="")
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line

    def _say(self, text: str) -> None:
        """What is no answer goes to stderr."""
        self.run.tell(text, style="dim")

    def _sources(self) -> None:
        if self.last is None:
            self._say("Nothing has been answered yet.")
        else:
            answers.show_sources(self.run.err if self.run.json else self.run.out, self.last, passages=True)

    def _stats(self) -> None:
        if self.last is None:
            self._say("Nothing has been answered yet.")
        else:
            console = self.run.err if self.run.json else self.run.out
            show(console, answers.stats_table(self.last.stats))
            answers.show_notes(console, self.last)

    def _reset(self) -> None:
        self.history.clear()
        self.last = None
        self._say("The conversation is forgotten.")
