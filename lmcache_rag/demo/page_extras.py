"""The check against full recompute, repetitions with a plot, uploads, and the export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nicegui import events, ui

from lmcache_rag.demo.hub import MOST_UPLOAD_BYTES
from lmcache_rag.demo.page_parts import button, error, heading, label, ms, put
from lmcache_rag.demo.record import ARMS, speedup_words

if TYPE_CHECKING:
    from lmcache_rag.demo.record import Check
    from lmcache_rag.demo.repeating import Repeats
    from lmcache_rag.demo.session import Session

_COLOURS = {"blended": "#1f9d55", "baseline": "#7a8696"}
_MOST_FILES = 20


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
        """Show what is new."""
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
        """Show what is new."""
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


class Uploads:
    """Files of the user's."""

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
        """Show what is new."""
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
