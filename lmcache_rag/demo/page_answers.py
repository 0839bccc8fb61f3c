"""What the page shows of answers: both panes, the check against full recompute, repetitions with a plot."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nicegui import ui

from lmcache_rag.demo.page_parts import button, error, heading, label, ms, put
from lmcache_rag.demo.record import (
    ARMS,
    KIND_WORDS,
    KINDS,
    ArmName,
    Turn,
    compare_words,
    segments,
    source_name,
    speedup_words,
    totals,
)
from lmcache_rag.protocol import COMPUTED, budget_words, decision_sentence

if TYPE_CHECKING:
    from lmcache_rag.demo.record import Check
    from lmcache_rag.demo.session import Pane, Repeats, Session

TITLES: dict[ArmName, str] = {"blended": "With blended KV", "baseline": "Without: full prefill"}
STATES = {
    "idle": "Ready.",
    "waiting": "Waits for its turn.",
    "sent": "Waiting for the first token …",
    "writing": "Answering …",
    "done": "",
    "stopped": "Stopped.",
    "failed": "Failed.",
}


_COLOURS = {"blended": "#1f9d55", "baseline": "#7a8696"}


class Panes:
    """Shows both panes of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        with ui.element("div").classes("d-card").props("aria-live=polite"):
            self._speedup = label("", classes="d-good", test_id="speedup")
            self._why = label("", classes="d-soft", test_id="order-note")
        with ui.element("div").classes("d-panes"):
            self._views = {name: _PaneView(session, name) for name in ARMS}

    def update(self) -> None:
        """Update what has changed."""
        factor = self.session.speedup
        put(self._speedup, f"{speedup_words(factor)}" if factor else "")
        self._speedup.set_visibility(bool(factor))
        put(self._why, self._order())
        for view in self._views.values():
            view.update()

    def tick(self) -> None:
        """Update the timers."""
        for view in self._views.values():
            view.tick()

    def _order(self) -> str:
        session = self.session
        blended = session.panes["blended"].turn
        shared = session.hub.start.phase == "ready" and session.stack.one_engine
        words = "The panes are asked in turn: blended KV first, then the full prefill."
        if session.controls.at_once:
            embedded = shared and session.stack.blended.engine.info.engine == "embedded"
            words = "Both panes are asked at the same time" + (
                "; the engine in this process answers one after the other." if embedded else "."
            )
        turns = [pane.turn for pane in session.panes.values() if pane.turn and pane.turn.completion]
        if not all(turn.alone for turn in turns):
            return f"{words} Other requests ran at the same time on the same engine, so no factor is given."
        if blended and blended.completion and not blended.completion.stats.blended:
            return f"{words} The blended answer reused no KV, so there is no factor."
        return words


class _PaneView:
    def __init__(self, session: Session, name: ArmName) -> None:
        self.session, self.name = session, name
        self._shown: object = None
        self._history_shown = -1
        with ui.element("section").classes("d-card").props(f'data-testid={name}-pane aria-label="{TITLES[name]}"'):
            with ui.element("div").classes("d-row"):
                heading(TITLES[name])
                self._state = label("", classes="d-soft", test_id=f"{name}-state")
            with ui.element("div").classes("d-row"):
                self._timer = label("–", classes="d-big", test_id=f"{name}-timer")
                self._ttft = label("", classes="d-soft d-number", test_id=f"{name}-ttft")
            self._facts = ui.element("div").classes("d-list")
            self._answer = (
                ui.element("div")
                .classes("d-answer d-scroll")
                .props(f'data-testid={name}-answer dir=auto tabindex=0 role=region aria-label="Answer, {TITLES[name]}"')
            )
            self._notes = ui.element("div").classes("d-list")
            with ui.expansion("Earlier answers").props(f"data-testid={name}-history dense") as self._history:
                self._turns = ui.element("div").classes("d-list d-scroll").props("tabindex=0")
            with self._answer:
                self._text = label("", classes="d-piece")

    @property
    def pane(self) -> Pane:
        return self.session.panes[self.name]

    def tick(self) -> None:
        """Update the timer, and the text of a running answer."""
        pane = self.pane
        if pane.state == "sent":
            put(self._timer, f"{time.perf_counter() - pane.sent:.1f} s")
        if pane.state == "writing":
            put(self._text, pane.text)

    def update(self) -> None:
        pane = self.pane
        other = self.session.panes["baseline" if self.name == "blended" else "blended"].turn
        key = (pane.state, pane.turn, other, len(pane.turns))
        if key == self._shown:
            return
        self._shown = key
        put(self._state, STATES[pane.state])
        turn = pane.turn
        if pane.state in ("idle", "waiting"):
            put(self._timer, "–")
            put(self._ttft, "")
        elif pane.state == "writing":
            put(self._timer, f"{(time.perf_counter() - pane.sent) * 1e3:,.0f} ms")
        elif turn is not None:
            put(self._timer, ms(turn.ttft_ms))
            put(self._ttft, f"to the first token; {turn.total_ms / 1e3:.1f} s to the end" if turn.ttft_ms else "")
        self._show_facts(turn)
        self._show_answer(turn, other)
        self._show_notes(turn)
        if len(pane.turns) != self._history_shown:
            self._history_shown = len(pane.turns)
            self._show_history(pane.turns)

    def _show_facts(self, turn: Turn | None) -> None:
        self._facts.clear()
        if turn is None or turn.completion is None:
            return
        sums, name = totals(turn), self.name
        with self._facts:
            words = ", ".join(f"{count:,} {KIND_WORDS[kind]}" for kind, count in sums.items())
            bar = ui.element("div").classes("d-bar").props(f"data-testid={name}-bar role=img")
            bar.props["aria-label"] = f"Tokens of the prompt: {words}"
            with bar:
                last: int | None = None
                for segment in segments(turn):
                    piece = ui.element("div").classes(f"k-{segment.kind}").style(f"flex: {segment.tokens} 1 0")
                    passage = "" if segment.passage is None else segment.passage + 1
                    piece.props(f'data-kind={segment.kind} data-tokens={segment.tokens} data-passage="{passage}"')
                    where = f"passage {passage}" if passage else "around the passages"
                    with piece:
                        ui.tooltip(f"{segment.tokens:,} tokens {KIND_WORDS[segment.kind]}, {where}")
                    if segment.passage is not None and segment.passage != last:
                        piece.classes("d-start")
                    last = segment.passage
            with ui.element("div").classes("d-legend"):
                for kind, count in sums.items():
                    with ui.element("div"):
                        ui.element("div").classes(f"d-swatch k-{kind}")
                        label(f"{count:,}", classes="d-number", test_id=f"{name}-{kind}")
                        label(KIND_WORDS[kind])
                with ui.element("div"):
                    label("of")
                    label(f"{turn.completion.stats.prompt_tokens:,}", classes="d-number", test_id=f"{name}-prompt")
                    label("tokens")
            if budget := budget_words(turn.completion.stats.budget_reason):
                label(f"Recomputed by {budget}.", classes="d-soft", test_id=f"{name}-budget")
            if turn.completion.chunks:
                with ui.expansion("Tokens by passage").props(f"dense data-testid={name}-by-passage"):
                    self._show_table(turn)

    def _show_table(self, turn: Turn) -> None:
        with ui.element("div").classes("d-table").props("tabindex=0 role=region aria-label='Tokens by passage'"):
            for head in ("Passage", "prefix", "reused", "recomputed", "computed"):
                label(head, classes="d-soft d-name" if head == "Passage" else "d-soft d-n")
            assert turn.completion is not None  # noqa: S101 - the caller checked
            for index, (hit, chunk) in enumerate(zip(turn.passages, turn.completion.chunks, strict=False), start=1):
                label(f"{index} {source_name(hit)}", classes="d-name")
                for kind in KINDS:
                    count = getattr(chunk, f"{kind}_tokens")
                    words = "in those" if count is None else f"{count:,}"
                    label(words, classes="d-n", test_id=f"{self.name}-passage-{index}-{kind}")

    def _show_answer(self, turn: Turn | None, other: Turn | None) -> None:
        self._answer.clear()
        with self._answer:
            both = turn is not None and other is not None and turn.ask == other.ask
            if not both or turn is None or other is None or not (turn.text and other.text):
                self._text = label(self.pane.text, classes="d-piece")
                return
            mine, _ = compare_words(turn.text, other.text)
            for piece in mine:
                made = label(piece.text, classes="d-piece d-differs" if piece.differs else "d-piece")
                if piece.differs:
                    made.props("data-differs=true")

    def _show_notes(self, turn: Turn | None) -> None:
        self._notes.clear()
        with self._notes:
            if turn is None:
                return
            if turn.problem:
                error(turn.problem, test_id=f"{self.name}-error")
            notes = list(turn.warnings)
            arm = self.session.stack.blended
            if self.name == "blended" and turn.problem is None and arm.why_not:
                notes.append(f"This pane is not blended: {arm.why_not}. Start the server with `lmcache-rag serve`.")
            stats = turn.completion.stats if turn.completion else None
            if self.name == "blended" and stats is not None and stats.decision in COMPUTED:
                notes.append(decision_sentence(stats.as_dict()))
            if turn.completion and turn.completion.finish_reason == "length":
                notes.append("The answer was cut at its longest; more tokens can be allowed in the settings.")
            for note in notes:
                label(note, classes="d-note", test_id=f"{self.name}-note")

    def _show_history(self, turns: list[Turn]) -> None:
        self._turns.clear()
        self._history.set_visibility(bool(turns))
        with self._turns:
            for turn in reversed(turns):
                with ui.element("div").classes("d-turn").props(f"data-testid={self.name}-turn"):
                    label(turn.question, classes="text-weight-bold")
                    label(
                        f"first token {ms(turn.ttft_ms)}" + (", stopped" if turn.stopped else ""),
                        classes="d-soft",
                        test_id=f"{self.name}-turn-ttft",
                    )
                    label(turn.problem.message if turn.problem else turn.text)


class CheckView:
    """Ratio 1 and a full prefill: are they equal?"""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shown = -1
        with ui.element("section").classes("d-card").props('aria-label="Check against full recompute"'):
            with ui.element("div").classes("d-row"):
                heading("Check against full recompute")
                self._button = button("Check", session.check, test_id="check", icon="fact_check")
            label("Blends this prompt with ratio 1, computes it in full, and compares the answers.", classes="d-soft")
            self._result = ui.element("div").classes("d-list")

    def update(self) -> None:
        """Update what has changed."""
        session = self.session
        self._button.set_enabled(session.hub.start.phase == "ready" and not session.busy and bool(session.question))
        if len(session.checks) != self._shown:
            self._shown = len(session.checks)
            self._result.clear()
            if session.checks:
                with self._result:
                    self._show(session.checks[-1])

    def _show(self, check: Check) -> None:
        if check.equal:
            label(f"Equal: all {check.tokens} tokens of both answers.", classes="d-good", test_id="check-result")
            return
        place = (check.first_difference or 0) + 1
        label(f"Different from token {place} of the answer on.", classes="d-note", test_id="check-result")
        for turn, title in ((check.recomputed, "Ratio 1"), (check.full, "Full prefill")):
            label(title, classes="text-weight-bold")
            label(turn.text)


class RepeatView:
    """Both arms many times: medians, a plot, how many answers differ."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shown: object = None
        with ui.element("section").classes("d-card").props('aria-label="Repeat"'):
            with ui.element("div").classes("d-row"):
                heading("Repeat in random order")
                self._times = (
                    ui.number("Times", value=20, min=1, max=200, step=1)
                    .props("dense outlined data-testid=repeat-times")
                    .style("width: 6rem")
                )
                self._button = button("Repeat", self._begin, test_id="repeat", icon="repeat")
            label("The passages are shuffled each time, and so is which pane comes first.", classes="d-soft")
            self._progress = label("", classes="d-soft d-number", test_id="repeat-progress")
            self._medians = label("", classes="d-number text-weight-bold", test_id="repeat-medians")
            self._factor = label("", classes="d-good", test_id="repeat-speedup")
            self._differ = label("", classes="d-number", test_id="repeat-differing")
            self._problem = ui.element("div")
            self._plot = ui.echart(_options(None)).props("data-testid=repeat-plot role=img").style("height: 220px")
            self._plot.props["aria-label"] = "Times to the first token of both panes, each repetition a point"

    def update(self) -> None:
        """Update what has changed."""
        session = self.session
        self._button.set_enabled(session.hub.start.phase == "ready" and not session.busy and bool(session.question))
        run = session.repeats[-1] if session.repeats else None
        self._plot.set_visibility(bool(run and run.pairs))
        key = (len(session.repeats), len(run.pairs), run.finished) if run else None
        if run is None or key == self._shown:
            return
        self._shown = key
        words = (
            "done" if run.finished and len(run.pairs) == run.wanted else "ended early" if run.finished else "under way"
        )
        left_out = f"; {run.disturbed} left out, since other requests ran then" if run.disturbed else ""
        put(self._progress, f"{len(run.pairs)} of {run.wanted}, {words}{left_out}")
        medians = run.medians
        put(
            self._medians,
            f"Median first token: {ms(medians[0])} blended, {ms(medians[1])} full prefill" if medians else "",
        )
        put(self._factor, speedup_words(run.speedup) if run.speedup else "")
        put(self._differ, f"{run.differing} of {len(run.pairs)} answers differ" if run.pairs else "")
        self._problem.clear()
        if run.problem:
            with self._problem:
                error(run.problem, test_id="repeat-error")
        self._plot.options.clear()
        self._plot.options.update(_options(run))
        self._plot.update()

    def _begin(self) -> None:
        if self._times.value:
            self.session.repeat(max(1, min(200, int(self._times.value))))


def _options(run: Repeats | None) -> dict[str, object]:
    pairs = run.pairs if run else []
    series = [
        {
            "name": "blended" if name == "blended" else "full prefill",
            "type": "scatter",
            "symbolSize": 8,
            "itemStyle": {"color": _COLOURS[name]},
            "data": [[at, round(getattr(pair, f"{name}_ms"), 1)] for at, pair in enumerate(pairs, start=1)],
        }
        for name in ARMS
    ]
    grey = {"color": "#7a8696"}
    axis = {"nameTextStyle": grey, "axisLabel": grey, "splitLine": {"lineStyle": {"color": "rgba(128,140,155,.3)"}}}
    return {
        "animation": False,
        "grid": {"left": 60, "right": 12, "top": 34, "bottom": 30},
        "legend": {"textStyle": grey, "top": 0, "right": 12, "bottom": "auto", "left": "auto"},
        "xAxis": {**axis, "type": "value", "minInterval": 1, "min": 0, "splitLine": {"show": False}},
        "yAxis": {**axis, "type": "value", "name": "first token, ms", "min": 0},
        "series": series,
    }
