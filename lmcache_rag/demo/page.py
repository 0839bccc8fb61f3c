"""The page, put together. It only shows a session, and hands on what the user does.

Elements that show a figure or take an action have a `data-testid`:

    start-phase, start-progress, start-error, start-again
    question, ask, stop, sample-N, context-tokens, at-once, follow-up, new-conversation, note, problem
    speedup, order-note
    ARM-pane, -state, -timer, -ttft, -bar, -prefix, -reused, -recomputed, -computed, -prompt, -passage-N-KIND,
        -by-passage, -answer, -note, -error, -history, -turn, -turn-ttft        (ARM: blended, baseline)
    passages, passage-count, order-hint, retrieve, shuffle, passage-list, add-passage, find, find-button, found, add,
        find-error
    passage (with data-chunk), drag, passage-rank, passage-source, passage-facts, up, down, remove, passage-open,
        passage-text
    model, policy, ratio, ratio-value, top-k, max-tokens, temperature, words, system, instruction, cold, warm
    check, check-result; repeat-times, repeat, repeat-progress, -medians, -speedup, -differing, -plot, -error
    upload, add-files, upload-STATE; export, dark; password, login, login-error

Once both answers are there, a differing word has `data-differs`, and a bar's part `data-kind`, `data-tokens` and
`data-passage` (from 1; empty around the passages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nicegui import ui

from lmcache_rag.demo.page_controls import Question, Settings
from lmcache_rag.demo.page_extras import CheckView, RepeatView, Uploads, export
from lmcache_rag.demo.page_panes import Panes
from lmcache_rag.demo.page_parts import CSS, PRIMARY, button, error, heading, icon_button, label, put
from lmcache_rag.demo.page_passages import Passages

if TYPE_CHECKING:
    from lmcache_rag.demo.hub import Hub, Start
    from lmcache_rag.demo.session import Session

_TICK_S = 0.1
_PHASES = {
    "new": "Starting",
    "opening": "Opening the engine and the store",
    "ingesting": "First start: ingesting the sample documents, each passage's KV is computed once",
    "warming": "Sending the passages to the server, so that it has their KV",
    "ready": "Ready",
    "failed": "It could not start",
}


class _Part(Protocol):
    def update(self) -> None: ...


class Page:
    """One open page of a session."""

    def __init__(self, session: Session, hub: Hub) -> None:
        self.session, self.hub = session, hub
        self._version = -1
        self._start: Start | None = None
        ui.add_css(CSS)
        ui.colors(primary=PRIMARY)
        self._dark = ui.dark_mode(value=None)
        with ui.element("header").classes("d-head"):
            label("lmcache-rag: the same question, with and without blended KV", classes="d-h1 d-grow", tag="h1")
            self._model = label("", classes="d-soft", test_id="model-name")
            button("Export JSON", lambda: export(session), test_id="export", icon="download")
            icon_button("dark_mode", "Dark or light", self._toggle, test_id="dark")
        with ui.element("div").classes("d-main").style("display: block; padding-bottom: 0") as self._opening:
            self._start_card = ui.element("section").classes("d-card").props('aria-label="Start"')
        with ui.element("div").classes("d-main"):  # inside the main element that Quasar makes
            with ui.element("div").classes("d-col d-right"):
                self._question = Question(session)
                self._panes = Panes(session)
                check, repeats = CheckView(session), RepeatView(session)
            with ui.element("div").classes("d-col d-left"):
                passages = Passages(session)
                settings = Settings(session)
                uploads = Uploads(session)
        self._parts: list[_Part] = [self._question, passages, settings, uploads, self._panes, check, repeats]
        self._timer = ui.timer(_TICK_S, self._tick)
        client = ui.context.client
        session.listeners.append(self.update)
        client.on_delete(lambda: session.listeners.remove(self.update))
        self.update()

    def update(self) -> None:
        """Show everything that is new."""
        self._version = self.session.version
        if self.hub.start != self._start:
            self._start = self.hub.start
            self._show_start(self._start)
        for part in self._parts:
            part.update()

    async def _tick(self) -> None:
        self._panes.tick()
        if self.hub.start != self._start or self.session.version != self._version:
            self.update()
        await self._question.count()

    def _show_start(self, start: Start) -> None:
        self._opening.set_visibility(start.phase != "ready")
        self._start_card.clear()
        with self._start_card:
            heading(_PHASES[start.phase]).props("data-testid=start-phase")
            if start.problem:
                error(start.problem, test_id="start-error")
                button("Try again", self.hub.begin, test_id="start-again", icon="refresh")
            elif start.phase in ("ingesting", "warming"):
                (read, documents), (done, known) = start.documents, start.chunks
                words = f"{read} of {documents} documents, " if documents else ""
                label(f"{words}KV of {done} of {known} passages", classes="d-number", test_id="start-progress")
                whole = max(known * max(documents, 1) / max(read, 1), known, 1)
                bar = ui.linear_progress(min(1.0, done / whole), show_value=False)
                bar.props["aria-label"] = "Progress of the ingestion"
            else:
                ui.spinner(size="24px")
        if start.phase == "ready":
            info = self.session.stack.blended.engine.info
            put(self._model, f"{info.model} ({info.engine})")

    def _toggle(self) -> None:
        if self._dark.value is None:
            self._dark.value = False
        self._dark.value = not self._dark.value
