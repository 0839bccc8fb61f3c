"""Progress on stderr: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from lmcache_rag.cli.run import Run
    from lmcache_rag.ingest import Progress as Step

_EVERY_S = 10.0  # between two lines where there is no terminal


class _TimeLeft(TimeRemainingColumn):
    """The time left, for one bar only: that of the others would promise too much."""

    def __init__(self, name: str) -> None:
        super().__init__(compact=True)
        self._name = name

    def render(self, task: Task) -> Text:
        return super().render(task) if task.description == self._name else Text()


class Bars:
    """Bars by name, with a rate and the time left. Use it as a context manager.

    Args:
        run: Gives the console.
        main: The bar whose time left counts, and whose tokens make the rate.
    """

    def __init__(self, run: Run, main: str) -> None:
        self._run, self._main = run, main
        self._tasks: dict[str, TaskID] = {}
        self._tokens = 0
        self._begin: float | None = None
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>14}"),
            _TimeLeft(main),
            console=run.err,
            transient=True,
            disable=not run.err.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, *, tokens: int = 0) -> None:
        """Set a bar; it appears with its first update."""
        now = time.monotonic()
        rate = ""
        if name == self._main:
            self._begin = self._begin or now
            if tokens and now > self._begin:  # the first chunk's own time is not known
                self._tokens += tokens
                rate = f"{self._tokens / (now - self._begin):,.0f} tokens/s"
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, rate="")
        self._progress.update(self._tasks[name], completed=done, total=total)
        if rate:
            self._progress.update(self._tasks[name], rate=rate)
        if not self._run.err.is_terminal and now - self._told >= _EVERY_S:
            self._told = now
            self._run.tell("; ".join(self._lines()) + (f"; {rate}" if rate else ""))

    def _lines(self) -> list[str]:
        return [f"{task.description} {task.completed:,.0f} of {task.total:,.0f}" for task in self._progress.tasks]


class IngestBars(Bars):
    """The two bars of an ingestion: documents, and the KV of their chunks."""

    def __init__(self, run: Run, *, with_kv: bool) -> None:
        super().__init__(run, "KV" if with_kv else "documents")
        self._documents = (0, 0)
        self._chunks = (0, 0)

    def step(self, step: Step) -> None:
        """Take one step of the ingestor."""
        if step.step == "document":
            self._documents = (step.done, step.known)
            self.update("documents", *self._documents)
        else:
            self._chunks = (step.done, step.known)
            self.update("KV", step.done, self._expected(), tokens=step.tokens)

    def _expected(self) -> int:
        """Chunks in all, if the documents still to come hold as many as those read."""
        read, documents = self._documents
        known = self._chunks[1]
        return known if not read else max(known, round(known * max(documents, read) / read))
