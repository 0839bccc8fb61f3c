"""Alerts and dashboard: PromQL that is valid, metrics and labels that exist, alerts that fire when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import metric_lists
import promql_parser
import pytest
import yaml
from metric_lists import MONITORING, expressions

from lmcache_rag.protocol import Decision, Fallback

ADDED = {"instance", "job", "le"}  # by Prometheus, and by histograms
ROOT = MONITORING.parents[3]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]


def promtool() -> str | None:
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lmcache-rag-ci" / "promtool"
    return shutil.which("promtool") or (str(kept) if kept.exists() else None)


def selectors(expression: str) -> list[Any]:
    """The metrics of an expression, with what they are matched by."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    return found


def grouped(expression: str) -> set[str]:
    """The labels after `by`."""
    lists = re.findall(r"\bby \(([^)]*)\)", expression)
    return {label.strip() for each in lists for label in each.split(",")}


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_metrics_and_labels_exist(place: str, expression: str) -> None:
    known = {name: set(labels) for found in metric_lists.kept().values() for name, labels in found.items()}
    found = selectors(expression)
    assert found, place
    for each in found:
        assert each.name in known, f"{place}: there is no {each.name}"
        if each.name.startswith("vllm:"):  # LMCache adds labels when a counter moves
            assert {matcher.name for matcher in each.matchers.matchers} <= known[each.name] | ADDED, place
    if all(each.name.startswith("vllm:") for each in found):
        assert grouped(expression) <= set.union(*(known[each.name] for each in found)) | ADDED, place


def test_all_names_are_those_that_contracts_check() -> None:
    parsed = {each.name for _, expression in expressions() for each in selectors(expression)}
    assert parsed == metric_lists.named()


def test_values_of_labels_are_codes_of_the_protocol() -> None:
    known = {
        *map(str, Fallback),
        *map(str, Decision),
        "unblended",
        "blended",
        "prefix",
        "computed",
        "reused",
        "recomputed",
        ".*",
    }
    for place, expression in expressions():
        for text in re.findall(r'(?:reason|how|source|decision)[!=]~?"([^"]*)"', expression):
            assert set(text.split("|")) <= known, place


def test_each_alert_is_tested_and_in_the_runbook() -> None:
    tested = {test["alertname"] for case in yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
              for test in case["alert_rule_test"] if test.get("exp_alerts")}  # fmt: skip
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in RULES:
        assert rule["alert"] in tested
        assert f"`{rule['alert']}`" in page
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_promtool_takes_the_rules_and_their_tests() -> None:
    if (tool := promtool()) is None:
        pytest.skip("needs promtool, of Debian's package prometheus (.ci/promtool)")
    for words in (
        ("check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml"),
        ("test", "rules", "alerts_test.yaml"),
    ):
        done = subprocess.run([tool, *words], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_log_lines_of_the_runbook_are_logged() -> None:
    """Each piece of what stands after **Log**; an ellipsis stands for what differs."""
    sources = "".join(file.read_text() for file in sorted((ROOT / "lmcache_rag").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    page = (ROOT / "docs" / "operations.md").read_text()
    logs = re.findall(r"^- \*\*Log\*\*(.*(?:\n  .*)*)", page, re.MULTILINE)
    pieces = [piece.strip() for log in logs for line in re.findall(r"`([^`]+)`", log) for piece in line.split("…")]
    assert len(pieces) > 20
    assert [piece for piece in pieces if " ".join(piece.split()) not in joined] == []


# -- the dashboard ----------------------------------------------------------------------------------------------------


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_every_query_asks_the_chosen_data_source() -> None:
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "model", "instance"}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
