"""The contract between clients and the connector: request keys, codes, statistics, metric names."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag import protocol
from lmcache_rag.blend.policies import POLICIES
from lmcache_rag.connector.wishes import wrong
from lmcache_rag.protocol import read_params


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        "not ours to judge",
        {"lmcache.x": "anything", "do_remote_prefill": 1, 3: 4},
        {"lmcache_rag.policy": "head", "lmcache_rag.ratio": 1, "lmcache_rag.blend": "off"},
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
        ("raito", 0.1),
    ],
)
def test_what_may_not(key: str, value: Any) -> None:
    message = wrong({"lmcache_rag.policy": "query"} | {protocol.NAMESPACE + key: value})
    assert protocol.NAMESPACE + key in message
    assert "is used" not in message, "nothing is used: it is refused"


def test_an_unknown_key_lists_those_that_exist() -> None:
    assert all(key in wrong({"lmcache_rag.x": 1}) for key in protocol.REQUEST_KEYS)


def test_a_huge_value_is_cut_in_the_message() -> None:
    for key in protocol.REQUEST_KEYS:
        assert len(wrong({key: "x\n" * 5_000_000})) < 500
        assert "\n" not in wrong({key: "x\ny"})


def asked(params: Any) -> protocol.RequestParams:
    found, complaints = read_params(params)
    assert complaints == []
    return found


def test_a_request_that_asks_for_nothing_gets_the_defaults() -> None:
    assert asked(None) == protocol.RequestParams("query", 0.15, True)
    assert read_params({"lmcache.max_offload_tokens": 4}, "hkvd", 0.2)[0] == protocol.RequestParams("hkvd", 0.2, True)


@pytest.mark.parametrize(("switch", "wanted"), [("on", True), ("off", False), (True, True), (False, False)])
def test_a_request_gets_what_it_asks_for(switch: Any, wanted: bool) -> None:
    params = {"lmcache_rag.policy": "head", "lmcache_rag.ratio": 1, "lmcache_rag.blend": switch}
    assert asked(params) == protocol.RequestParams("head", 1.0, wanted)


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
    assert isinstance(found.ratio, float)
    assert 0 <= found.ratio <= 1
    assert {type(value) for value in (found.blend, found.ingest, found.forget, found.spans)} == {bool}
    fine = isinstance(policy, str) and policy in POLICIES
    assert any("lmcache_rag.policy" in complaint for complaint in complaints) != fine


# -- the public surface never changes -----------------------------------------------------------------------------


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
    from lmcache_rag.connector.request_state import RequestState, statistics, unblended

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
        "failure",
    }
    assert fields <= set(statistics(10, RequestState("query", 0.15, True)))
    assert fields | {"can_blend"} <= set(unblended(10, 0, "query", 0.15, "no"))


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
