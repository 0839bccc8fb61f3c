"""The question and the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nicegui import events, ui

from lmcache_rag.demo import samples
from lmcache_rag.demo.page_parts import button, error, heading, label, put
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.policies import POLICIES

if TYPE_CHECKING:
    from lmcache_rag.demo.session import Session


# A field that grows measures its text when that changes; while it was folded away it had no height.
_GROW = """() => document.querySelectorAll(".d-words textarea").forEach(
    field => field.dispatchEvent(new Event("input", {bubbles: true})))"""


class Question:
    """The question, the tokens of the prompt to come, and the buttons that begin and stop."""

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
        """Show what is new."""
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
        """Count the tokens of the prompt to come, where something has changed."""
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
        except LMCacheRAGError:  # asking shows it
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
    """A slider that moves in the browser; NiceGUI's own goes back to what the server knew when a key was pressed."""

    LOOPBACK = False


class Settings:
    """What else can be set: blending, sampling, words, caches, the model."""

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
                self._ratio = label(f"{chosen.ratio:.2f}", classes="d-number text-weight-bold", test_id="ratio-value")
            self._slider = _Slider(min=0, max=1, step=0.05, value=chosen.ratio, on_change=self._set_ratio)
            self._slider.props('data-testid=ratio aria-label="Recompute ratio"')
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
        """Show what is new."""
        session = self.session
        for each in (self._cold, self._warm):
            each.set_enabled(session.hub.start.phase == "ready" and not session.busy)
        if round(self._slider.value or 0.0, 2) != session.controls.ratio:  # another page of this session moved it
            self._slider.value = session.controls.ratio
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

    def _set_ratio(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.session.set(ratio=round(float(event.value), 2))
        put(self._ratio, f"{event.value:.2f}")
