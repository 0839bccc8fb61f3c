"""The contract between clients and the connector: request keys, codes, statistics, metric names."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag import protocol
from lmcache_rag.budget import Budget, read_budget
from lmcache_rag.policies import POLICIES
from lmcache_rag.protocol import read_params


def wrong(params: Any, tokens: int = protocol.MOST_TOKENS) -> str:
    return protocol.joined(protocol.complaints(params, tokens))


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"llm-d.hint": {"deep": [1]}, "LMCACHE.x": 1, "transfer_id": 7, 3: 4},
        {"lmcache.max_offload_tokens": 0},
        {"lmcache_rag.policy": "head", "lmcache_rag.ratio": 1, "lmcache_rag.blend": "off"},
        {"lmcache_rag.ratio": "auto"},
        {"lmcache_rag.ratio": {"tokens": 400}},
        {"lmcache_rag.blend": True, "lmcache_rag.chunks": [[64, 128], [130, 200]], "lmcache_rag.prefix": 64},
        {"lmcache_rag.ingest": True, "lmcache_rag.chunks": []},
    ],
)
def test_what_may_be_asked(params: Any) -> None:
    assert wrong(params) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", "best"),
        ("policy", ["query"]),
        ("ratio", 1.5),
        ("ratio", True),
        ("ratio", float("nan")),
        ("ratio", "0.15"),
        ("ratio", {"tokens": -1}),
        ("ratio", {"tokens": True}),
        ("ratio", {"tokens": 10**400}),
        ("ratio", {"tokens": {"tokens": 1}}),
        ("ratio", {"tokens": 1, "more": 1}),
        ("blend", "perhaps"),
        ("blend", {}),
        ("blend", 1),
        ("chunks", 1),
        ("chunks", [[5, 5]]),
        ("chunks", [[1, 2, 3]]),
        ("chunks", [["a", "b"]]),
        ("prefix", -1),
        ("prefix", "64"),
        ("prefix", True),
        ("ingest", "yes"),
        ("forget", 1),
        ("spans", "on"),
        ("raito", 0.1),
    ],
)
def test_what_may_not(key: str, value: Any) -> None:
    message = wrong({"lmcache_rag.policy": "query"} | {protocol.NAMESPACE + key: value})
    assert protocol.NAMESPACE + key in message
    assert "is used" not in message, "nothing is used: it is refused"


def test_an_unknown_key_lists_those_that_exist() -> None:
    assert all(key in wrong({"lmcache_rag.x": 1}) for key in protocol.REQUEST_KEYS)


HUGE = {
    "text": "x\n" * 5_000_000,
    "control characters": "x\x1b[31m\r\ny\x00\u2028",
    "surrogates": "\ud800" * 100,
    "list": [[0]] * 1_000_000,
    "object": {str(number): {} for number in range(100_000)},
    "number": 10**20_000,
    "negative": -(10**20_000),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", [*protocol.REQUEST_KEYS, *protocol.LMCACHE_KEYS])
def test_a_huge_value_is_cut_in_the_message(key: str, value: Any) -> None:
    message = wrong({key: value})
    assert 0 < len(message) < 500
    assert message.isprintable()


def test_a_deep_value_is_no_recursion() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for key in (*protocol.REQUEST_KEYS, *protocol.LMCACHE_KEYS):
        assert len(wrong({key: deep})) < 500
    while deep:  # freed one by one
        deep = deep.pop()


def test_many_unknown_keys_are_not_all_listed() -> None:
    assert len(wrong({f"lmcache_rag.{number}\n": 1 for number in range(100_000)})) < 1500


@pytest.mark.parametrize("params", ["text", 5, [], [["lmcache_rag.blend", "off"]], True])
def test_what_is_no_object_is_refused(params: Any) -> None:
    assert "is not an object" in wrong(params)


@pytest.mark.parametrize(
    "key", ["do_remote_prefill", "do_remote_decode", "cached_token_stats", "remote_host", "remote_block_ids"]
)
@pytest.mark.parametrize("value", [True, False, None, 1, {}])
def test_keys_of_disaggregated_prefill_are_refused(key: str, value: Any) -> None:
    assert f"{key!r} belongs to disaggregated prefill" in wrong({key: value})


@pytest.mark.parametrize("key", ["lmcache.skip_save", "lmcache.tag.x", "lmcache.", "lmcache.mp.host"])
def test_other_keys_of_lmcache_are_refused(key: str) -> None:
    assert f"{key!r} is not supported" in wrong({key: 1})


@pytest.mark.parametrize("value", ["x", [], {}, 100.5, True, None, -1, 2**31, 10**30])
def test_a_store_limit_must_be_a_number_of_tokens(value: Any) -> None:
    assert protocol.MAX_OFFLOAD_TOKENS in wrong({protocol.MAX_OFFLOAD_TOKENS: value})


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 64], [32, 96]],  # one in the other
        [[64, 128], [0, 64]],  # descending
        [[0, 161]],  # after the prompt
        [[0, 10**400]],
        [[at, at + 1] for at in range(11)],  # one for 16 tokens
        [[0.0, 64]],
        [[False, True]],
    ],
)
def test_spans_must_be_in_the_prompt_and_few(spans: list[Any]) -> None:
    assert protocol.CHUNKS in wrong({protocol.CHUNKS: spans}, 160)
    assert wrong({protocol.CHUNKS: [[0, 64], [64, 100], [101, 160]]}, 160) == ""


def test_places_after_the_prompt_are_dropped() -> None:
    """Where they are looked at before the prompt's length is known."""
    params = {protocol.CHUNKS: [[0, 64], [64, 100]], protocol.PREFIX: 64, protocol.RATIO: 0.5}
    assert protocol.accepted(params, 100) == params
    assert protocol.accepted(params, 99) == {protocol.PREFIX: 64, protocol.RATIO: 0.5}
    assert protocol.accepted(params, 31) == {protocol.RATIO: 0.5}


def test_a_prefix_longer_than_the_prompt_is_refused() -> None:
    assert wrong({protocol.PREFIX: 160}, 160) == ""
    assert protocol.PREFIX in wrong({protocol.PREFIX: 161}, 160)


@pytest.mark.parametrize(
    ("params", "start"),
    [
        ({protocol.PREFIX: 64}, 64),
        ({protocol.PREFIX: 64, protocol.CHUNKS: [[576, 700]]}, 576),
        ({protocol.PREFIX: 64, protocol.CHUNKS: [[576, 640], [640, 700]]}, 64),  # of a query, not of one chunk
        ({protocol.PREFIX: 64, protocol.CHUNKS: [[32, 700]]}, 64),  # begins in the prefix
        ({protocol.PREFIX: 64, protocol.CHUNKS: [[576, 701]]}, 64),  # ends after the prompt
        ({protocol.CHUNKS: [[576, 700]]}, 0),
        ({protocol.PREFIX: True, protocol.CHUNKS: [[576, 700]]}, 0),
        (None, 0),
    ],
)
def test_where_an_ingested_chunk_begins(params: Any, start: int) -> None:
    assert protocol.chunk_start(params, 700) == start


def test_too_many_spans_are_not_read() -> None:
    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("a list that is too long was read")

    assert "has more than 8192 spans" in wrong({protocol.CHUNKS: Unread([[0, 1]] * 131_072)}, 131_072)


def test_what_a_removal_may_ask_for() -> None:
    removal = {protocol.FORGET: True, protocol.PREFIX: 64}
    assert protocol.complaints(removal | {protocol.KEEP: 16, protocol.HELD: True}, 200) == []
    for alone in ({protocol.KEEP: 16}, {protocol.HELD: True}):
        assert "needs lmcache_rag.forget" in protocol.joined(protocol.complaints(alone, 200))
    assert protocol.complaints(removal | {protocol.KEEP: 201}, 200)
    assert protocol.complaints(removal | {protocol.HELD: "yes"}, 200)
    for keep, start in ((0, 64), (16, 80), (136, 0), (-1, 0), (True, 0), ("x", 0)):
        assert protocol.removal_start(removal | {protocol.KEEP: keep}, 200) == start
    assert protocol.removal_start({protocol.FORGET: True, protocol.KEEP: 5}, 200) == 0, "without a prefix nothing goes"
    assert protocol.read_held({"memory": 2, "x": "y"}) == {"memory": 2}
    assert protocol.read_held(None) == {}


def test_a_chunk_is_not_ingested_and_forgotten_at_once() -> None:
    assert "contradict" in wrong({protocol.INGEST: True, protocol.FORGET: True})


def test_keys_of_others_do_not_reach_the_engine() -> None:
    ours = {protocol.RATIO: 0.5, protocol.MAX_OFFLOAD_TOKENS: 64}
    assert protocol.accepted({"gateway.hint": [1], "disagg_spec": {}, 3: 4, **ours}) == ours
    assert protocol.accepted(None) == protocol.accepted("text") == {}


def test_only_the_first_chunk_may_be_below_a_block() -> None:
    spans = [[64, 70], [70, 86], [90, 105], [105, 200]]
    assert protocol.accepted({protocol.CHUNKS: spans})[protocol.CHUNKS] == [[64, 70], [70, 86], [105, 200]]
    assert protocol.accepted({protocol.CHUNKS: spans}, block=32)[protocol.CHUNKS] == [[64, 70], [105, 200]]
    assert len(spans) == 4, "the client's own list is as it was"


def asked(params: Any) -> protocol.RequestParams:
    found, complaints = read_params(params)
    assert complaints == []
    return found


def test_a_request_without_parameters_gets_defaults() -> None:
    assert asked(None) == protocol.RequestParams("query", Budget(), True)
    assert read_params({"lmcache.max_offload_tokens": 4}, "hkvd", 0.2)[0] == protocol.RequestParams(
        "hkvd", Budget(share=0.2), True
    )


@pytest.mark.parametrize(("switch", "wanted"), [("on", True), ("off", False), (True, True), (False, False)])
def test_a_request_gets_what_it_asks_for(switch: Any, wanted: bool) -> None:
    params = {"lmcache_rag.policy": "head", "lmcache_rag.ratio": 1, "lmcache_rag.blend": switch}
    assert asked(params) == protocol.RequestParams("head", Budget(share=1.0), wanted)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_any_json_gives_usable_parameters(policy: Any, ratio: Any, switch: Any, flag: Any) -> None:
    params = {"lmcache_rag.policy": policy, "lmcache_rag.ratio": ratio, "lmcache_rag.blend": switch}
    flags = {"lmcache_rag.ingest": flag, "lmcache_rag.forget": flag, "lmcache_rag.spans": flag}
    found, complaints = read_params(params | flags)
    assert found.policy in POLICIES
    assert read_budget(found.budget.wire) == found.budget
    assert {type(value) for value in (found.blend, found.ingest, found.forget, found.spans)} == {bool}
    fine = isinstance(policy, str) and policy in POLICIES
    assert any("lmcache_rag.policy" in complaint for complaint in complaints) != fine


# -- the public surface never changes -----------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from((*protocol.REQUEST_KEYS, *protocol.LMCACHE_KEYS)), ANYTHING), st.integers(0, 99))
def test_any_json_is_refused_or_safe_for_the_engine(params: dict[str, Any], tokens: int) -> None:
    if protocol.complaints(params, tokens):
        return
    kept = protocol.accepted(params, tokens)
    found, wrong = read_params(kept)
    assert not wrong
    assert not (found.ingest and found.forget)
    assert protocol.named_spans(kept, tokens) == [tuple(span) for span in kept.get(protocol.CHUNKS, [])]
    assert 0 <= kept.get(protocol.PREFIX, 0) <= tokens
    assert isinstance(kept.get(protocol.MAX_OFFLOAD_TOKENS, 0), int)


def test_request_keys_stay() -> None:
    assert {
        "lmcache_rag.policy",
        "lmcache_rag.ratio",
        "lmcache_rag.blend",
        "lmcache_rag.chunks",
        "lmcache_rag.prefix",
        "lmcache_rag.ingest",
    } <= set(protocol.REQUEST_KEYS)
    assert protocol.MAX_OFFLOAD_TOKENS == "lmcache.max_offload_tokens"
    assert protocol.ANSWER == "lmcache_rag"


def test_fallback_codes_and_metric_labels_stay() -> None:
    assert {
        "cannot blend",
        "no server",
        "look-up deadline",
        "load failed",
        "load failed on another rank",
        "no copy of hot chunks",
        "damaged KV",
        "out of memory",
        "other",
    } <= {str(code) for code in protocol.Fallback}
    assert protocol.SOURCES == ("prefix", "reused", "recomputed", "computed")
    assert protocol.OUTCOMES == ("blended", "prefix", "computed", "unblended")


def test_metric_names_stay() -> None:
    assert protocol.CHUNK_GAUGE == "vllm:lmcache_rag_chunk_tokens"
    assert protocol.METRICS == "vllm:lmcache_rag_"


def test_answer_fields_stay() -> None:
    from lmcache_rag.connector.metrics import reuse_statistics, unblended_statistics

    fields = {
        "prompt_tokens",
        "prefix_tokens",
        "reused_tokens",
        "recomputed_tokens",
        "computed_tokens",
        "blocks_hit",
        "hot_tokens",
        "lookup_ms",
        "load_ms",
        "blend_ms",
        "blended",
        "policy",
        "ratio",
        "budget_tokens",
        "budget_reason",
        "failure",
    }
    assert fields <= set(reuse_statistics(10, "query", Budget()))
    no = protocol.Unsupported(protocol.CannotBlend.LORA, "no")
    assert fields | {"can_blend", "reason"} <= set(unblended_statistics(10, 0, "query", Budget(), no))


def test_every_fallback_has_a_sentence() -> None:
    for code in protocol.Fallback:
        assert protocol.fallback_sentence(code) != code
    assert protocol.fallback_sentence("a newer server's") == "a newer server's"
    assert protocol.Fallback.of("a newer server's") is protocol.Fallback.OTHER


def test_why_a_server_cannot_blend_is_read_by_its_code() -> None:
    assert protocol.cannot_blend(None) is None
    assert protocol.cannot_blend({"failure": "no server"}) is None
    found = protocol.cannot_blend({"can_blend": False, "failure": "words", "reason": "needs CUDA"})
    assert found == protocol.Unsupported(protocol.CannotBlend.NEEDS_CUDA, "words")
    older = protocol.cannot_blend({"can_blend": False, "failure": "words"})
    assert older == protocol.Unsupported(protocol.CannotBlend.ERROR, "words")


def test_no_key_is_spelled_elsewhere() -> None:
    """In code, that is: the contract is spelled once."""
    root = pathlib.Path(__file__).parents[1]
    keys = "policy|ratio|blend|chunks|prefix|forget|spans"  # not ingest: a module is called so
    spelled = re.compile(rf"""["'](?:lmcache_rag\.(?:{keys})|lmcache\.max_offload_tokens)["']""")
    files = [path for folder in ("lmcache_rag", "integrations", "benchmarks") for path in (root / folder).rglob("*.py")]
    assert len(files) > 100
    allowed = {"protocol.py", "commands.py"}  # in commands.py they are the connector's settings, of the same names
    assert [path.name for path in files if path.name not in allowed and spelled.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("value", "blend", "always"),
    [("always", True, True), ("on", True, False), (True, True, False), ("off", False, False), (False, False, False)],
)
def test_always_is_a_way_to_blend(value: Any, blend: bool, always: bool) -> None:
    params, wrong = protocol.read_params({protocol.BLEND: value})
    assert (params.blend, params.always, wrong) == (blend, always, [])
    assert protocol.complaints({protocol.BLEND: "sometimes"})


def test_a_decision_has_a_sentence() -> None:
    for decision in protocol.Decision:
        assert protocol.decision_sentence({protocol.DECISION: str(decision)}).endswith(".")
    found = {protocol.DECISION: "computed: not faster", "predicted_blend_ms": 46.7, "predicted_compute_ms": 32.7}
    assert protocol.decision_sentence(found) == (
        "Computed, since blending would not start the answer earlier: "
        "46.7 ms blended and 32.7 ms computed are predicted."
    )
    assert protocol.decision_sentence({}) == ""
