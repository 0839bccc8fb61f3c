"""ask: one question, or a file of questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli import answers, options
from lmcache_rag.cli.failures import PARTLY, as_error
from lmcache_rag.cli.render import clean
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.streaming import follow
from lmcache_rag.cli.verb import verb
from lmcache_rag.errors import ConfigError, LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.rag import RAG, Answer
    from lmcache_rag.workspace import Workspace

Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="The question; - reads it from stdin.", show_default=False)
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Run a full prefill beside it: both TTFTs, and where the answers differ.")
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


@verb(*options.PLACE, *options.EMBED, *options.ANSWER)
def ask(run: Run, question: Question = None, compare: Compare = False, questions: Questions = None) -> int | None:
    """Answer a question, then show the sources and what was reused.

    The answer is written as it comes. Sources and statistics go to stdout too,
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
    with run.workspace() as workspace:
        if questions is not None:
            return _each(run, workspace, _lines(questions))
        text = sys.stdin.read().strip() if question == "-" else str(question)
        run.load(workspace, embedder=True)
        rag = workspace.rag
        if compare:
            _compare(run, rag, text)
        elif run.json:
            with run.waiting("Answering"):
                answer = rag.ask(text)
            run.emit(answers.as_dict(answer))
        else:
            _stream(run, rag, text)
    return None


def _stream(run: Run, rag: RAG, question: str) -> None:
    def show(answer: Answer) -> None:
        run.write("\n")
        answers.show_end(run.out, answer)
        sys.stdout.flush()

    follow(run, rag.stream(question), show)


def _compare(run: Run, rag: RAG, question: str) -> None:
    with run.waiting("Answering twice"):
        comparison = rag.compare(question)
    if run.json:
        run.emit(answers.comparison_as_dict(comparison))
        return
    run.write(clean(comparison.blended.text) + "\n\n")
    answers.show_sources(run.out, comparison.blended)
    answers.show_notes(run.out, comparison.blended)
    answers.show_comparison(run.out, comparison)


def _each(run: Run, workspace: Workspace, questions: Iterator[str]) -> int:
    run.load(workspace, embedder=True)
    rag = workspace.rag
    status = 0
    for question in questions:
        [answer] = rag.ask_batch([question])
        if isinstance(answer, LMCacheRAGError):
            status = PARTLY
            problem = as_error(type(answer).__name__, answer.message, answer.remedy)
            run.emit({"question": question, **problem}, indent=None)
        else:
            run.emit(answers.as_dict(answer), indent=None)
    return status


def _lines(name: str) -> Iterator[str]:
    if name == "-":
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    try:
        with Path(name).open(encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"The questions cannot be read from {name}: {problem}", remedy="Name a text file."
        ) from problem
