"""The passages as cards: drag them or move them by buttons; remove, add, shuffle; sources, scores and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nicegui import events, ui

from lmcache_rag.demo.page_parts import button, error, heading, icon_button, label, put
from lmcache_rag.demo.record import Problem, source_name

if TYPE_CHECKING:
    from lmcache_rag.demo.session import Session
    from lmcache_rag.store import Hit


class Passages:
    """Shows the passages of a session and lets the user change them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shown: object = None
        self._found: list[Hit] = []
        with ui.element("section").classes("d-card").props('aria-label="Passages" data-testid=passages'):
            with ui.element("div").classes("d-row"):
                heading("Passages")
                self._count = label("", classes="d-soft", test_id="passage-count")
            self._mode = ui.switch("Retrieve for each question", on_change=self._retrieve).props(
                "dense data-testid=retrieve"
            )
            self._hint = label("", classes="d-soft", test_id="order-hint")
            with ui.element("div").classes("d-row"):
                self._shuffle = button("Shuffle", session.shuffle, test_id="shuffle", icon="shuffle")
            self._list = ui.column().classes("d-list full-width").props("role=list data-testid=passage-list")
            self._list.make_sortable(handle=".d-handle", on_end=self._dragged)
            with ui.expansion("Add a passage").props("dense data-testid=add-passage"):
                with ui.element("div").classes("d-row"):
                    self._query = (
                        ui.input("Search the documents").props("dense outlined data-testid=find").classes("d-grow")
                    )
                    self._query.on("keydown.enter", self._find)
                    button("Search", self._find, test_id="find-button")
                self._results = ui.element("div").classes("d-list d-scroll").props("tabindex=0")

    def update(self) -> None:
        """Show what is new."""
        session = self.session
        key = ([hit.chunk_id for hit in session.passages], session.busy)
        if self._mode.value != session.controls.retrieve:
            self._mode.value = session.controls.retrieve
        if key == self._shown:
            return
        self._shown = key
        busy = bool(session.busy)
        self._shuffle.set_enabled(not busy and len(session.passages) > 1)
        put(self._count, f"{len(session.passages)}, {sum(hit.tokens for hit in session.passages):,} tokens")
        self._hint.set_visibility(len(session.passages) > 1)
        if session.passages:
            put(self._hint, session.stack.hint)
        self._list.clear()
        with self._list:
            for index, hit in enumerate(session.passages):
                self._card(index, hit)

    def _card(self, index: int, hit: Hit) -> None:
        name, last = source_name(hit), len(self.session.passages) - 1
        card = (
            ui.element("div").classes("d-passage").props(f"role=listitem data-testid=passage data-chunk={hit.chunk_id}")
        )
        with card:
            with ui.element("div").classes("d-row no-wrap"):
                ui.icon("drag_indicator", size="20px").classes("d-handle").props("aria-hidden=true data-testid=drag")
                label(f"{index + 1}", classes="text-weight-bold", test_id="passage-rank")
                label(_title(hit), classes="d-grow text-weight-bold", test_id="passage-source")
            with ui.element("div").classes("d-row"):
                score = f"score {hit.score:.2f}, " if hit.score else ""
                label(f"{score}{hit.tokens:,} tokens", classes="d-soft d-number d-grow", test_id="passage-facts")
                up = icon_button("arrow_upward", f"Move {name} up", self._moves(index, -1), test_id="up")
                down = icon_button("arrow_downward", f"Move {name} down", self._moves(index, 1), test_id="down")
                away = icon_button("close", f"Remove {name}", lambda: self.session.remove(index), test_id="remove")
                busy = bool(self.session.busy)
                up.set_enabled(index > 0 and not busy)
                down.set_enabled(index < last and not busy)
                away.set_enabled(not busy)
            with ui.expansion("Text").props("dense data-testid=passage-open"):
                label(hit.text, classes="d-scroll", test_id="passage-text").props("dir=auto tabindex=0")

    def _moves(self, index: int, by: int) -> Callable[[], None]:
        def move() -> None:
            client = ui.context.client  # the button itself is gone after the move
            moved = self.session.passages[index].chunk_id
            self.session.move(index, index + by)
            at_end = index + by in (0, len(self.session.passages) - 1)
            direction = ("down" if by < 0 else "up") if at_end else ("up" if by < 0 else "down")
            # The list is new: the keyboard goes on where it was.
            place = f"[data-chunk='{moved}'] [data-testid={direction}]"
            client.run_javascript(f'setTimeout(() => document.querySelector("{place}")?.focus(), 60)')

        return move

    def _dragged(self, event: events.SortableEventArguments) -> None:
        if self.session.busy:
            self._shown = None
            self.update()
            return
        self.session.move(event.old_index, event.new_index)

    def _retrieve(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.session.set(retrieve=bool(event.value))

    async def _find(self) -> None:
        self._results.clear()
        try:
            self._found = await self.session.find(str(self._query.value or ""))
        except Exception as problem:
            with self._results:
                error(Problem.of(problem), test_id="find-error")
            return
        with self._results:
            for hit in self._found:
                with ui.element("div").classes("d-passage").props("data-testid=found"):
                    with ui.element("div").classes("d-row no-wrap"):
                        label(_title(hit), classes="d-grow text-weight-bold")
                        icon_button("add", f"Add {source_name(hit)}", self._adds(hit), test_id="add")
                    label(f"score {hit.score:.2f}", classes="d-soft")
                    label(hit.text[:160], classes="d-soft").props("dir=auto")

    def _adds(self, hit: Hit) -> Callable[[], None]:
        return lambda: None if self.session.busy else self.session.add(hit)


def _title(hit: Hit) -> str:
    part = f", part {hit.documents[0].ordinal + 1}" if hit.documents else ""
    return f"{source_name(hit)}{part}"
