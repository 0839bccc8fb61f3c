"""The page: question, passages, settings, uploads, export. It shows a session and calls its methods.

Elements that show a figure or take an action have a `data-testid`:

    start-phase, start-progress, start-error, start-again
    question, ask, stop, sample-N, context-tokens, at-once, follow-up, new-conversation, note, problem
    speedup, order-note
    ARM-pane, -state, -timer, -ttft, -bar, -prefix, -reused, -recomputed, -computed, -prompt, -budget,
        -passage-N-KIND, -by-passage, -answer, -note, -error, -history, -turn, -turn-ttft      (ARM: blended, baseline)
    passages, passage-count, order-hint, retrieve, shuffle, passage-list, add-passage, find, find-button, found, add,
        find-error
    passage (with data-chunk), drag, passage-rank, passage-source, passage-facts, up, down, remove, passage-open,
        passage-text
    model, policy, ratio, ratio-auto, ratio-value, top-k, max-tokens, temperature, words, system, instruction, cold,
        warm
    check, check-result; repeat-times, repeat, repeat-progress, -medians, -speedup, -differing, -plot, -error
    upload, add-files, upload-STATE; export, dark; password, login, login-error

Once both answers are there, a differing word has `data-differs`, and a bar's part `data-kind`, `data-tokens` and
`data-passage` (from 1; empty around the passages).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from nicegui import events, ui

from lmcache_rag.budget import AUTO, Ratio, parse_budget
from lmcache_rag.demo import samples
from lmcache_rag.demo.hub import MOST_UPLOAD_BYTES
from lmcache_rag.demo.page_answers import CheckView, Panes, RepeatView
from lmcache_rag.demo.page_parts import CSS, PRIMARY, button, error, heading, icon_button, label, put
from lmcache_rag.demo.record import Problem, source_name
from lmcache_rag.documents.types import place_words
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.policies import POLICIES

if TYPE_CHECKING:
    from lmcache_rag.demo.hub import Hub, Start
    from lmcache_rag.demo.session import Session
    from lmcache_rag.store import Hit

_TICK_S = 0.1
_MOST_FILES = 20
_PHASES = {
    "new": "Starting",
    "opening": "Opening the engine and the store",
    "ingesting": "First start: ingesting the sample documents, each passage's KV is computed once",
    "warming": "Sending the passages to the server, so that it has their KV",
    "ready": "Ready",
    "failed": "It could not start",
}


# A field that grows measures its text when that changes; while collapsed it had no height.
_GROW = """() => document.querySelectorAll(".d-words textarea").forEach(
    field => field.dispatchEvent(new Event("input", {bubbles: true})))"""


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
        """Update every part that has changed."""
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


class Question:
    """The question, the tokens of the next prompt, and the buttons that start and stop."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._counted: object = None
        with ui.element("section").classes("d-card").props('aria-label="Question"'):
            with ui.element("div").classes("d-row"):
                self._text = (
                    ui.input("Your question", value=session.question)
                    .props("outlined dense data-testid=question")
                    .classes("d-grow")
                )
                self._text.on("keydown.enter", self._ask)
                self._ask_button = button("Ask both", self._ask, test_id="ask", icon="play_arrow", main=True)
                self._stop = button("Stop", session.stop, test_id="stop", icon="stop")
            with ui.element("div").classes("d-row"):
                for number, text in enumerate(samples.questions(), start=1):
                    button(text, self._takes(text), test_id=f"sample-{number}").props("flat").classes("d-sample")
            with ui.element("div").classes("d-row"):
                self._tokens = label("", classes="d-soft d-number", test_id="context-tokens")
                self._at_once = ui.switch(
                    "At the same time",
                    value=session.controls.at_once,
                    on_change=lambda event: session.set(at_once=bool(event.value)),
                ).props("dense data-testid=at-once")
                self._follow = ui.switch(
                    "Follow-up: send earlier turns",
                    value=session.controls.follow_up,
                    on_change=lambda event: session.set(follow_up=bool(event.value)),
                ).props("dense data-testid=follow-up")
                button("New conversation", session.new_conversation, test_id="new-conversation")
            self._note = label("", classes="d-note", test_id="note")
            self._problem = ui.element("div")

    def update(self) -> None:
        """Update what has changed."""
        session = self.session
        ready = session.hub.start.phase == "ready"
        self._ask_button.set_enabled(ready and not session.busy)
        self._stop.set_enabled(bool(session.busy))
        put(self._note, session.note)
        self._note.set_visibility(bool(session.note))
        self._problem.clear()
        if session.problem:
            with self._problem:
                error(session.problem, test_id="problem")

    async def count(self) -> None:
        """Count the tokens of the next prompt, if something has changed."""
        session = self.session
        if session.busy or session.hub.start.phase != "ready":
            return
        session.question = str(self._text.value or "").strip()
        chosen = session.controls
        key = (
            session.question,
            [hit.chunk_id for hit in session.passages],
            chosen,
            len(session.panes["blended"].turns),
        )
        if key == self._counted:
            return
        self._counted = key
        try:
            found = await session.tokens()
        except LMCacheRAGError:  # a question shows the error
            return
        if found is not None:
            fits = "" if found[0] < found[1] else "; that is too long, so the lowest scores are left out"
            put(self._tokens, f"The prompt has {found[0]:,} tokens of {found[1]:,} in the context{fits}.")

    def _ask(self) -> None:
        self.session.ask(str(self._text.value or ""))

    def _takes(self, text: str) -> Callable[[], None]:
        def take() -> None:
            self._text.value = text
            if not self.session.busy:
                self.session.set(retrieve=True)

        return take


class _Slider(ui.slider):
    """A slider that moves in the browser; NiceGUI's own is reset to the server's value when a key is pressed."""

    LOOPBACK = False


class Settings:
    """Blending, sampling, texts before the passages, caches, the model."""

    def __init__(self, session: Session) -> None:
        self.session = session
        chosen = session.controls
        with ui.element("section").classes("d-card").props('aria-label="Settings"'):
            heading("Settings")
            self._models = ui.element("div")
            policy = ui.select(
                list(POLICIES), value=chosen.policy, label="Recompute policy", on_change=self._sets("policy")
            )
            policy.props("dense outlined data-testid=policy")
            with ui.element("div").classes("d-row"):
                label("Recompute ratio", classes="d-soft")
                self._ratio = label(
                    ratio_words(chosen.ratio), classes="d-number text-weight-bold", test_id="ratio-value"
                )
                self._auto = ui.switch("Choose for each question", value=chosen.ratio == AUTO, on_change=self._set_auto)
                self._auto.props("dense data-testid=ratio-auto")
            self._slider = _Slider(min=0, max=1, step=0.05, value=share(chosen.ratio), on_change=self._set_ratio)
            self._slider.props('data-testid=ratio aria-label="Recompute ratio"')
            self._slider.set_enabled(chosen.ratio != AUTO)
            with ui.element("div").classes("d-row"):
                self._number("Passages (top-k)", "top_k", chosen.top_k, 1, 32, 1)
                self._number("Most tokens", "max_tokens", chosen.max_tokens, 1, 4096, 16)
                self._number("Temperature", "temperature", chosen.temperature, 0, 2, 0.1)
            with ui.expansion("Words before the passages").props("dense data-testid=words") as words:
                words.classes("d-words").on("after-show", js_handler=_GROW)
                for name, title in (("system", "System prompt"), ("instruction", "Instruction")):
                    area = ui.textarea(title, value=getattr(chosen, name), on_change=self._sets(name))
                    area.props(f"dense outlined autogrow debounce=500 data-testid={name}").classes("full-width")
                label(
                    "Other words mean other KV: the first answer computes the passages and keeps them.",
                    classes="d-soft",
                )
            with ui.element("div").classes("d-row"):
                self._cold = button("Cold", session.cold, test_id="cold", icon="ac_unit")
                self._warm = button("Warm", session.warm, test_id="warm", icon="local_fire_department")
                label("Empty or fill the caches of this session.", classes="d-soft d-grow")
        self._models_shown: list[str] = []
        self._picker: ui.select | None = None

    def update(self) -> None:
        """Update what has changed."""
        session = self.session
        for each in (self._cold, self._warm):
            each.set_enabled(session.hub.start.phase == "ready" and not session.busy)
        ratio = session.controls.ratio  # another page of this session may have changed it
        if self._auto.value != (ratio == AUTO):
            self._auto.value = ratio == AUTO
        self._slider.set_enabled(ratio != AUTO)
        if isinstance(ratio, float) and round(self._slider.value or 0.0, 2) != ratio:
            self._slider.value = ratio
        put(self._ratio, ratio_words(ratio))
        if session.hub.models != self._models_shown:
            self._models_shown = list(session.hub.models)
            self._models.clear()
            with self._models:
                self._picker = ui.select(
                    self._models_shown, value=self._model(), label="Model", on_change=self._choose
                ).props("dense outlined data-testid=model")
        if self._picker is not None and not session.busy and self._picker.value != self._model():
            self._picker.value = self._model()  # the chosen one could not be opened

    def _model(self) -> str:
        return self.session.controls.model or self._models_shown[0]

    def _choose(self, event: events.ValueChangeEventArguments[Any]) -> None:
        if event.value != self._model():
            self.session.choose(event.value)

    def _number(self, title: str, name: str, value: float, least: float, most: float, step: float) -> None:
        whole = isinstance(value, int)

        def changed(event: events.ValueChangeEventArguments[Any]) -> None:
            if event.value is not None and least <= event.value <= most:
                self.session.set(**{name: int(event.value) if whole else float(event.value)})

        field = ui.number(title, value=value, min=least, max=most, step=step, on_change=changed)
        field.props(f"dense outlined data-testid={name.replace('_', '-')}").style("width: 7.5rem")

    def _sets(self, name: str) -> Callable[[events.ValueChangeEventArguments[Any]], Any]:
        return lambda event: self.session.set(**{name: event.value})

    def _set_auto(self, event: events.ValueChangeEventArguments[Any]) -> None:
        if event.value != (self.session.controls.ratio == AUTO):
            self.session.set(ratio=AUTO if event.value else round(float(self._slider.value), 2))
            self._slider.set_enabled(not event.value)
            put(self._ratio, ratio_words(self.session.controls.ratio))

    def _set_ratio(self, event: events.ValueChangeEventArguments[Any]) -> None:
        if self.session.controls.ratio != AUTO:
            self.session.set(ratio=round(float(event.value), 2))
            put(self._ratio, f"{event.value:.2f}")


def ratio_words(ratio: Ratio) -> str:
    """The ratio beside its slider: "auto", "0.15" or "tokens=400"."""
    return f"{ratio:.2f}" if isinstance(ratio, float) else str(parse_budget(ratio))


def share(ratio: Ratio) -> float:
    """Where the slider stands; where the ratio is no share, at a usual one."""
    return ratio if isinstance(ratio, float) else 0.15


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
        """Update what has changed."""
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
            # The list is rebuilt: give the keyboard's focus back.
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
    first = hit.documents[0] if hit.documents else None
    part = f"{place_words(first.metadata)}, part {first.ordinal + 1}" if first is not None else ""
    return f"{source_name(hit)}{part}"


class Uploads:
    """Upload of the user's files."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shown: object = None
        with ui.element("section").classes("d-card").props('aria-label="Your files"'):
            heading("Your files")
            label("They go into the store of this page, where everyone who can open it finds them.", classes="d-soft")
            # Its own look has parts without a name; the button opens its file picker.
            self._upload = ui.upload(
                multiple=True,
                auto_upload=True,
                max_files=_MOST_FILES,
                max_file_size=MOST_UPLOAD_BYTES,
                on_multi_upload=self._take,
                on_rejected=self._rejected,
            )
            self._upload.props("data-testid=upload").style("display: none")
            self._add = button("Add files", lambda: None, test_id="add-files", icon="upload")
            self._add.on("click", js_handler=f"() => getElement({self._upload.id}).pickFiles()")
            self._rows = ui.element("div").classes("d-list")

    def update(self) -> None:
        """Update what has changed."""
        session = self.session
        self._add.set_enabled(session.hub.start.phase == "ready" and not session.busy)
        key = [(row.name, row.state, row.detail, row.kv) for row in session.uploads]
        if key == self._shown:
            return
        self._shown = key
        self._rows.clear()
        with self._rows:
            for row in session.uploads:
                kv = f" KV of {row.kv[0]} of {row.kv[1]} passages." if row.kv[1] and row.state == "ingesting" else ""
                style = "d-error" if row.state == "failed" else "d-soft"
                label(f"{row.name}: {row.detail or row.state}{kv}", classes=style, test_id=f"upload-{row.state}")

    async def _take(self, event: events.MultiUploadEventArguments) -> None:
        files = [(file.name, await file.read()) for file in event.files]
        self._upload.reset()
        if self.session.upload(files) is None:
            ui.notify("Something else is going on; upload it again afterwards.", type="warning")

    def _rejected(self) -> None:
        words = f"At most {_MOST_FILES} files, each of at most {MOST_UPLOAD_BYTES >> 20} MiB, are taken at once."
        ui.notify(words, type="warning")


def export(session: Session) -> None:
    """Have the browser save the session as JSON."""
    document = json.dumps(session.as_dict(), ensure_ascii=False, indent=1)
    ui.download.content(document, f"lmcache-rag-demo-{session.id[:8]}.json", "application/json")
