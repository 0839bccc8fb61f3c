"""Write an answer to stdout while it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lmcache_rag.cli.render import clean
from lmcache_rag.engines.base import TextDelta

if TYPE_CHECKING:
    from lmcache_rag.cli.run import Run
    from lmcache_rag.rag import Answer, RAGEvent


def follow(
    run: Run,
    events: Iterator[RAGEvent],
    on_answer: Callable[[Answer], None],
    *,
    pieces: list[str] | None = None,
    quiet: bool = False,
) -> None:
    """Follow RAG.stream to its end; leaving early, by Ctrl-C too, stops the computation.

    Args:
        run: The run.
        events: What RAG.stream gave.
        on_answer: Called once the answer is whole. Missing KV is computed and kept after that.
        pieces: Takes the text as it comes.
        quiet: Do not write the text.
    """
    try:
        with run.waiting("Answering") as stop_waiting:
            for event in events:
                stop_waiting()
                if not isinstance(event, TextDelta):
                    on_answer(event)
                    continue
                if pieces is not None:
                    pieces.append(event.text)
                if not quiet:
                    run.write(clean(event.text))
    finally:
        if close := getattr(events, "close", None):
            close()
