"""docs/wire-format.md says what the code does: keys and their ranges, statistics, codes, prompts; its client runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from openai_kit import vllm_serving

from lmcache_rag import protocol
from lmcache_rag.budget import Budget, BudgetReason
from lmcache_rag.connector import authorization, metrics
from lmcache_rag.costs import Forecast
from lmcache_rag.neutral import NEUTRAL_PASSAGES, NEUTRAL_TOKENS
from lmcache_rag.policies import POLICIES
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.protocol import CannotBlend, Decision, Fallback, SelfCheck, Unsupported, complaints

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "wire-format.md").read_text(encoding="utf-8")
TOKENS = 1600  # of a prompt

# Of each key: its type as the page has it, values in its range, values beyond, and words of the page's range.
KEYS: dict[str, tuple[str, list[Any], list[Any], list[str]]] = {
    protocol.POLICY: ("string", list(POLICIES), ["best", 1, None], [f"`{name}`" for name in POLICIES]),
    protocol.RATIO: (
        "number, string or object",
        [0, 1, 0.5, "auto", {"tokens": 0}, {"tokens": protocol.MOST_TOKENS}],
        [-0.1, 1.1, "0.5", True, {"tokens": -1}, {"tokens": protocol.MOST_TOKENS + 1}, {"tokens": 0.5}],
        ["0 to 1", '`"auto"`', f"N from 0 to {protocol.MOST_TOKENS}"],
    ),
    protocol.BLEND: (
        "string or boolean",
        ["on", True, "off", False, "always"],
        ["yes", 1, None],
        ['`"on"`, `true`, `"off"`, `false`, `"always"`'],
    ),
    protocol.CHUNKS: (
        "array of `[start, end]`",
        [[], [[0, 1]], [[0, 16], [16, TOKENS]], [[n, n + 1] for n in range(TOKENS // protocol.SPAN_TOKENS)]],
        [
            *([[5, 5]], [[5, 4]], [[-1, 4]], [[0, TOKENS + 1]], [[0, 20], [10, 30]], [[0, 1.5]], [0, 16]),
            [[n, n + 1] for n in range(TOKENS // protocol.SPAN_TOKENS + 1)],
        ],
        ["0 <= start < end <= tokens of the prompt", f"at most one for {protocol.SPAN_TOKENS} tokens"],
    ),
    protocol.PREFIX: ("integer", [0, TOKENS], [-1, TOKENS + 1, 1.5, True], ["0 to the tokens of the prompt"]),
    protocol.INGEST: ("boolean", [True, False], [1, "true"], ["`true`, `false`"]),
    protocol.FORGET: ("boolean", [True, False], [1, "true"], ["`true`, `false`"]),
    protocol.KEEP: ("integer", [0], [-1, TOKENS + 1, 1.5, True, 1], ["0 to the tokens of the prompt"]),
    protocol.HELD: ("boolean", [False], [1, "true", True], ["`true`, `false`"]),  # true: with forget only
    protocol.SPANS: ("boolean", [True, False], [1, "true"], ["`true`, `false`"]),
    protocol.PIN: ("boolean", [True, False], [1, "true"], ["`true`, `false`"]),
    protocol.TENANT: (
        "string",
        ["", "acme", "x" * 80],
        [1, None, "x" * 81, "a\nb"],
        ["at most 80 printable characters"],
    ),
    protocol.MAX_OFFLOAD_TOKENS: (
        "integer",
        [0, protocol.MOST_TOKENS],
        [-1, protocol.MOST_TOKENS + 1, "x"],
        [f"0 to {protocol.MOST_TOKENS}"],
    ),
}


def section(title: str) -> str:
    """The text below a title, up to the next one of its level or above."""
    begin = re.search(rf"^(#+) {re.escape(title)}\n", PAGE, re.MULTILINE)
    assert begin is not None, title
    return re.split(rf"^#{{1,{len(begin[1])}}} ", PAGE[begin.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    split = [[re.split(r" \| ", line.strip("| ")) for line in table.splitlines()] for table in tables]
    return [row for table in split for row in table[2:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_page_lists_the_keys_that_the_code_knows() -> None:
    listed = [code(row[0])[0] for row in rows(section("Keys of kv_transfer_params"))]
    assert listed == [*protocol.REQUEST_KEYS, *protocol.LMCACHE_KEYS]
    assert set(listed) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_keys_type_and_range_are_the_pages(key: str) -> None:
    (row,) = [row for row in rows(section("Keys of kv_transfer_params")) if code(row[0]) == [key]]
    kind, accepted, refused, words = KEYS[key]
    assert row[1] == kind
    assert [word for word in words if word not in row[2]] == []
    assert [value for value in accepted if complaints({key: value}, TOKENS)] == []
    assert [value for value in refused if not complaints({key: value}, TOKENS)] == []


def test_defaults_and_foreign_keys_are_the_pages() -> None:
    keys = {code(row[0])[0]: row for row in rows(section("Keys of kv_transfer_params"))}
    assert f"`{protocol.DEFAULT_POLICY}`" in keys[protocol.POLICY][3]
    assert json.dumps(protocol.DEFAULT_RATIO) in keys[protocol.RATIO][3]
    text = section("Keys of kv_transfer_params")
    assert all(f"`{key}`" in text for key in (*protocol.PD_KEYS, protocol.PD_PREFIX))
    assert complaints({"gateway.hint": 1}) == []
    assert all(complaints({key: 1}) for key in ("lmcache_rag.x", "lmcache.x", "remote_x", *protocol.PD_KEYS))
    assert complaints({protocol.INGEST: True, protocol.FORGET: True})


def test_the_page_lists_the_fields_of_an_answer() -> None:
    budget, why_not = Budget(), Unsupported(CannotBlend.NEEDS_CUDA, "it needs CUDA")
    made = metrics.reuse_statistics(100, "query", budget, spans=[])
    made |= metrics.decision_statistics(Decision.BLENDED, Forecast(1.0, 2.0))
    made |= metrics.unblended_statistics(100, 0, "query", budget, why_not)
    listed = [name for row in rows(section("An answer").partition("### Codes")[0]) for name in code(row[0])]
    assert sorted(listed) == sorted(
        [
            *made,
            protocol.USED_BEFORE,
            protocol.SELF_CHECK,
            protocol.FORGOTTEN,
            protocol.KV_HELD,
            protocol.PINNED,
            protocol.PINS,
        ]
    )
    assert f"`kv_transfer_params.{protocol.ANSWER}`" in section("An answer")
    assert [f"`{each}`" in section("An answer") for each in SelfCheck] == [True] * len(SelfCheck)


@pytest.mark.parametrize(("codes", "after"), [(Fallback, "`failure`:"), (Decision, "`decision`:")])
def test_the_page_lists_the_codes_in_tables(codes: Iterable[str], after: str) -> None:
    text = section("Codes").partition(after)[2].partition("\n\n`")[0]
    assert [code(row[0])[0] for row in rows(text + "\n")] == [str(each) for each in codes]


def test_the_page_lists_the_other_codes() -> None:
    text = section("Codes")
    reasons = code(text.partition("`reason`:")[2])
    assert reasons == [str(each) for each in CannotBlend]
    budgets = code(text.partition("`budget_reason`:")[2].partition("\n\n")[0])
    assert set(budgets) - {"none", "all", "auto"} | {"all"} == {str(each) for each in BudgetReason}


def test_the_statuses_of_our_own_errors_are_there() -> None:
    statuses = {row[0] for row in rows(section("Errors"))}
    assert {str(n) for n in (authorization.INVALID, authorization.UNAUTHORIZED, authorization.FORBIDDEN)} <= statuses
    assert f"`{protocol.INGEST_KEY_HEADER}: KEY`" in section("Headers")


def test_the_words_of_prompts_are_the_pages() -> None:
    words = {row[0]: code(row[1]) for row in rows(section("Prefix"))}
    form = PromptFormat()
    shown = {name: values[0].encode().decode("unicode_escape") for name, values in words.items() if values}
    assert (shown["system"], shown["instruction"]) == (form.system, form.instruction)
    assert (shown["head of the passages"], shown["separator"]) == (form.context_head, form.separator)
    assert shown["question"] + "{question}" == form.question
    assert form.filler == "\n"
    assert form.template_options["date_string"] in section("Prefix")
    assert json.loads((DOCS / "neutral-passages.json").read_text(encoding="utf-8")) == list(NEUTRAL_PASSAGES)
    assert section("Neutral passages").startswith(f"\n{NEUTRAL_TOKENS} tokens of text")
    assert protocol.CHUNK_GAUGE in section("What is found again")
    assert f": {protocol.LMCACHE_CHUNK} by default" in section("What is found again")


def test_requests_that_the_page_shows_are_accepted() -> None:
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
    assert len(shown) == 2
    assert [complaints(body["kv_transfer_params"]) for body in shown] == [[], []]


def test_the_smallest_client_reuses_kv(tokenizer: Any) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    with vllm_serving(tokenizer) as server:
        server.chunk = protocol.LMCACHE_CHUNK
        client = block.replace("http://localhost:8000", server.url)
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'blended': True" in done.stdout
    assert "'failure': ''" in done.stdout
