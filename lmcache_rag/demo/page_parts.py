"""Small parts of the page. Text of documents, models and users goes into labels only, which never make HTML of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from lmcache_rag._utils import clean
from lmcache_rag.demo.record import Problem

PRIMARY = "#1d4ed8"
_TURNS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}")
CSS = """
:root { --ground: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #55606e; --line: #d5dae1; --accent: #1d4ed8;
  --prefix: #2f6fd0; --reused: #15803d; --recomputed: #d97706; --computed: #8a94a3; --mark: #fde68a; --markink: #3b2f00;
  --error: #fdecec; --errorink: #8f1d1d; --note: #fff6dd; --noteink: #6b4700; --good: #146c34; }
body.body--dark { --ground: #11151b; --card: #1a2029; --ink: #e8ecf2; --soft: #a9b4c2; --line: #333d4a;
  --accent: #8ab4ff;
  --prefix: #5d97ee; --reused: #37b265; --recomputed: #f0a63a; --computed: #6c7787; --mark: #6b5200; --markink: #fff3c4;
  --error: #3d1a1d; --errorink: #ffb9b9; --note: #33290f; --noteink: #ffdf94; --good: #6ad793; }
body { background: var(--ground); color: var(--ink); font-family: system-ui, sans-serif; }
.nicegui-content { padding: 0; gap: 0; align-items: stretch; }
.d-head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; padding: 10px 16px;
  border-bottom: 1px solid var(--line); background: var(--card); }
.d-main { display: grid; gap: 12px; padding: 12px 16px; max-width: 1500px; width: 100%; margin: 0 auto;
  box-sizing: border-box;
  grid-template-columns: minmax(280px, 360px) minmax(0, 1fr); align-items: start; }
.d-col { display: flex; flex-direction: column; gap: 12px; min-width: 0; }
.d-panes { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; align-items: start; }
.d-right { grid-column: 2; grid-row: 1; } .d-left { grid-column: 1; grid-row: 1; }
@media (max-width: 900px) { .d-main { grid-template-columns: minmax(0, 1fr); padding: 8px; }
  .d-right { grid-column: 1; grid-row: 1; } .d-left { grid-column: 1; grid-row: 2; } }
@media (max-width: 700px) { .d-panes { grid-template-columns: minmax(0, 1fr); } .d-head { padding: 8px; } }
.d-card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; display: flex;
  flex-direction: column; gap: 8px; min-width: 0; }
.d-row { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; min-width: 0; }
.d-grow { flex: 1 1 160px; min-width: 0; }
.d-h1 { font-size: 1.15rem; font-weight: 700; margin: 0; line-height: 1.3; }
.d-h2 { font-size: 1rem; font-weight: 650; margin: 0; line-height: 1.3; }
.d-soft { color: var(--soft); font-size: .85rem; }
.d-number { font-variant-numeric: tabular-nums; }
.d-big { font-size: 1.7rem; font-weight: 700; font-variant-numeric: tabular-nums; line-height: 1.1; }
.d-good { color: var(--good); font-weight: 700; font-size: 1.15rem; }
.d-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; min-width: 0; }
.d-scroll { max-height: 22rem; overflow: auto; }
.d-answer { min-height: 3.5em; line-height: 1.5; }
.d-answer .d-piece { display: inline; white-space: pre-wrap; overflow-wrap: anywhere; }
.d-answer .d-differs { background: var(--mark); color: var(--markink); border-radius: 3px; text-decoration: underline; }
.d-error { background: var(--error); color: var(--errorink); border-radius: 6px; padding: 8px 10px; }
.d-note { background: var(--note); color: var(--noteink); border-radius: 6px; padding: 6px 10px; font-size: .88rem; }
.d-bar { display: flex; height: 22px; border-radius: 4px; overflow: hidden; background: var(--line); gap: 1px; }
.d-bar > div { min-width: 2px; height: 100%; }
.d-start { border-left: 2px solid var(--ink); }
.k-prefix { background: var(--prefix); } .k-reused { background: var(--reused); }
.k-cached { background: repeating-linear-gradient(90deg, var(--reused) 0 12px, var(--recomputed) 12px 14px); }
.k-recomputed { background: var(--recomputed); } .k-computed { background: var(--computed); }
.d-legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .88rem; }
.d-legend > div { display: flex; align-items: center; gap: 5px; }
.d-swatch { width: 11px; height: 11px; border-radius: 2px; flex: none; }
.d-table { display: grid; grid-template-columns: minmax(90px, 1fr) repeat(4, auto); gap: 2px 10px; font-size: .82rem;
  font-variant-numeric: tabular-nums; overflow-x: auto; }
.d-table > .d-n { text-align: right; overflow-wrap: normal; }
@media (max-width: 480px) { .d-table { grid-template-columns: repeat(4, auto); }
  .d-table > .d-name { grid-column: 1 / -1; } }
.d-words textarea { min-height: 5.5rem; line-height: 1.4; }
.d-passage { border: 1px solid var(--line); border-radius: 6px; padding: 6px 8px; background: var(--ground);
  display: flex;
  flex-direction: column; gap: 4px; min-width: 0; }
.d-handle { cursor: grab; touch-action: none; color: var(--soft); }
.d-list > * { width: 100%; box-sizing: border-box; }
.d-list { align-items: stretch !important; display: flex; flex-direction: column; gap: 6px; min-width: 0; }
.d-turn { border-top: 1px solid var(--line); padding-top: 6px; display: flex; flex-direction: column; gap: 2px; }
.d-sample .q-btn__content { justify-content: flex-start; text-align: left; }
.q-btn { text-transform: none; }
.q-btn--outline, .q-btn--flat { color: var(--accent) !important; }
body.body--dark .q-field__label, body.body--dark .q-field__native,
body.body--dark .q-field__input { color: var(--ink); }
.q-field__label, .q-field__native::placeholder { color: var(--soft); opacity: 1; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
"""


def harmless(text: str) -> str:
    """Text with control characters, and those that turn the direction of what follows, made visible."""
    return clean(text).translate(_TURNS)


def label(text: str, *, classes: str = "", test_id: str = "", tag: str = "") -> ui.label:
    """A label; control characters in text from documents, models and users are made visible."""
    made = ui.label(harmless(text)).classes(f"d-text {classes}")
    if test_id:
        made.props(f"data-testid={test_id}")
    if tag:
        made.props(f"role=heading aria-level={tag[1:]}")
    return made


def put(element: ui.label, text: str) -> None:
    """Set a label's text."""
    element.set_text(harmless(text))


def heading(text: str, level: int = 2) -> ui.label:
    """A heading."""
    return label(text, classes=f"d-h{level}", tag=f"h{level}")


def button(text: str, work: Callable[[], Any], *, test_id: str, icon: str = "", main: bool = False) -> ui.button:
    """A button with a text."""
    made = ui.button(text, on_click=work, icon=icon or None, color="primary" if main else None)
    return made.props(f"data-testid={test_id} dense no-caps {'unelevated' if main else 'outline'}").classes("q-px-sm")


def icon_button(icon: str, name: str, work: Callable[[], Any], *, test_id: str) -> ui.button:
    """A button with an icon, and an accessible name."""
    made = ui.button(icon=icon, on_click=work, color=None).props(f"data-testid={test_id} flat dense round size=sm")
    made.props["aria-label"] = name
    with made:
        ui.tooltip(name)
    return made


def error(problem: Problem, *, test_id: str) -> None:
    """A problem with its remedy."""
    with ui.element("div").classes("d-error").props(f"data-testid={test_id} role=alert"):
        label(problem.message, classes="text-weight-bold")
        if problem.remedy:
            label(problem.remedy)


def ms(milliseconds: float | None) -> str:
    """For example "84 ms", "1,203 ms"."""
    return "–" if milliseconds is None else f"{milliseconds:,.0f} ms"
