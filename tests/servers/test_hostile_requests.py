"""What any client can send, to real servers: vLLM's CPU build with our connector and LMCache's blend server.

No request may end EngineCore or keep it from answering others. Prints requests by endpoint and EngineCore's process
id before and after each test; an ordinary answer follows each batch. At most so many seconds of anything at random:
LMCACHE_RAG_HOSTILE_SECONDS, 30 if it is not set.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile_kit import KEYS, VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_cpu_kit import Servers, needs_vllm_cpu

from lmcache_rag import protocol
from lmcache_rag.connector.authorization import MIDDLEWARE
from lmcache_rag.protocol import CHUNKS, FORGET, INGEST, INGEST_KEY_HEADER, PREFIX, RATIO

pytestmark = [needs_vllm_cpu]

SECONDS = float(os.environ.get("LMCACHE_RAG_HOSTILE_SECONDS", "30"))
KEY = "an-ingest-key-of-these-tests-only"
SHORT, LONG = 3, 900  # tokens, about
PARAMS = "kv_transfer_params"


def words(long: bool) -> str:
    return "word " * (LONG if long else SHORT)


def completions(long: bool) -> dict[str, Any]:
    return {"prompt": [7 + at % 90 for at in range(LONG if long else SHORT)], "max_tokens": 2}


def chat(long: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": words(long)}], "max_tokens": 2}


def batch(long: bool) -> dict[str, Any]:
    return {"messages": [chat(long)["messages"], chat(False)["messages"]], "max_tokens": 2}


def responses(long: bool) -> dict[str, Any]:
    return {"input": words(long), "max_output_tokens": 2}


def generate(long: bool) -> dict[str, Any]:
    return {"token_ids": completions(long)["prompt"], "sampling_params": {"max_tokens": 2}}


ENDPOINTS = {
    "/v1/completions": completions,
    "/v1/chat/completions": chat,
    "/v1/chat/completions/batch": batch,
    "/v1/messages": chat,
    "/v1/responses": responses,
    "/inference/v1/generate": generate,
}
ONCE = ("/v1/chat/completions/batch",)  # answers in one piece only


class Traffic:
    """Sends requests, and looks after each batch whether the engine still answers."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.client = httpx.Client(base_url=servers.url, timeout=120)
        self.sent: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.prompt = [5, 6, 7, 8]
        self.answer = servers.tokens(self.prompt)
        self.engine = servers.vllm.engine_core()
        assert len(self.engine) == 1

    def body(self, endpoint: str, params: Any, *, long: bool = False, **more: Any) -> dict[str, Any]:
        return {"model": "smollm2", "temperature": 0, **ENDPOINTS[endpoint](long), PARAMS: params, **more}

    def send(self, endpoint: str, params: Any, *, long: bool = False, **more: Any) -> tuple[int, str]:
        return self.post(endpoint, self.body(endpoint, params, long=long, **more))

    def post(self, endpoint: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """(status, text); the status of a stream that breaks off with an error is that error's."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.client.post(
            endpoint, content=content, headers={"Content-Type": "application/json"} | (headers or {})
        )
        self.sent[endpoint] += 1
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, (endpoint, content[:500], answer.text[:500])
        return answer.status_code, answer.text

    def many(self, requests: list[tuple[str, Any, dict[str, Any]]]) -> list[tuple[int, str]]:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda one: self.send(one[0], one[1], **one[2]), requests))
        self.ordinary()
        return answers

    def hang_up(self, endpoint: str, params: Any, after: float, **more: Any) -> None:
        """Send a request and leave: at once, or after some time."""
        content = json.dumps(self.body(endpoint, params, long=True, **more)).encode()
        host, _, port = self.servers.url.removeprefix("http://").rpartition(":")
        head = f"POST {endpoint} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            time.sleep(after)
        self.sent[endpoint] += 1

    def ordinary(self) -> None:
        assert self.servers.tokens(self.prompt) == self.answer
        assert self.servers.vllm.engine_core() == self.engine, "EngineCore is another process"


def small_model(tokenizer: Path, folder: Path) -> Path:
    """A model of random weights that computes in no time, with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "chat_template", "generation")):
            shutil.copy(path, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("hostile")
    model = small_model(smollm2_path, tmp_path_factory.mktemp("model"))
    key = folder / "ingest.key"
    key.write_text(KEY)
    key.chmod(0o600)
    options = ("--enable-scale-out", "--middleware", MIDDLEWARE)
    pair = Servers(model, folder, *options, connector={"lmcache_rag.ingest_key_file": str(key)})
    yield pair
    pair.close()


@pytest.fixture
def traffic(hostile: Servers, capsys: pytest.CaptureFixture[str]) -> Iterator[Traffic]:
    made = Traffic(hostile)
    began = time.monotonic()
    yield made
    made.ordinary()
    made.client.close()
    with capsys.disabled():
        took = time.monotonic() - began
        print(f"\n  {sum(made.sent.values())} requests in {took:.0f} s, EngineCore {made.engine} before, ", end="")
        print(f"{hostile.vllm.engine_core()} after; status {dict(sorted(made.statuses.items()))}")
        for endpoint, count in sorted(made.sent.items()):
            print(f"    {count:5d} {endpoint}")


# -- requests that have ended EngineCore ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", [], 100.5])
def test_a_store_limit_of_another_type_is_refused(traffic: Traffic, value: Any) -> None:
    for endpoint in ENDPOINTS:
        status, text = traffic.send(endpoint, {"lmcache.max_offload_tokens": value})
        assert status == 400, text
        assert "lmcache.max_offload_tokens" in text
        traffic.ordinary()


def test_a_refused_request_does_not_reach_the_engine(traffic: Traffic) -> None:
    asked = {"stream": True, "use_beam_search": True}
    status, text = traffic.send("/v1/completions", {"do_remote_prefill": True, "cached_token_stats": 1}, **asked)
    assert status == 400
    assert "disaggregated prefill" in text
    traffic.ordinary()
    status, _ = traffic.send("/v1/completions", {"x": 1}, **asked)
    assert status == 400, "vLLM streams no beam search"


# -- everything else ----------------------------------------------------------------------------------------------


def takers(servers: Servers) -> set[str]:
    """Endpoints whose requests may hold kv_transfer_params."""
    api = servers.client.get("/openapi.json").json()

    def holds(schema: Any) -> bool:
        if isinstance(schema, dict) and "$ref" in schema:
            return holds(api["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        return isinstance(schema, dict) and PARAMS in schema.get("properties", {})

    found = set()
    for path, operations in api["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if holds(body.get("schema", {})):
            found.add(path)
    return found


def test_every_endpoint_that_takes_them_is_tested(hostile: Servers) -> None:
    found = takers(hostile)
    assert "/v1/completions" in found
    not_the_engines = {path for path in found if "render" in path}  # they make or read text, and compute nothing
    assert found - not_the_engines <= set(ENDPOINTS)


def test_each_key_with_each_kind_of_value(traffic: Traffic) -> None:
    """All of them to completions; to the others every fourth value, each time others."""
    requests: list[tuple[str, Any, dict[str, Any]]] = []
    for turn, endpoint in enumerate(ENDPOINTS):
        step = 1 if turn == 0 else 4
        for number, key in enumerate(KEYS):
            requests += [(endpoint, {key: value}, {}) for value in VALUES[(number + turn) % step :: step]]
    random.Random(5).shuffle(requests)
    for start in range(0, len(requests), 200):
        some = requests[start : start + 200]
        for (endpoint, params, _), (status, text) in zip(some, traffic.many(some), strict=True):
            wrong = protocol.complaints(params, 1024)
            needs_key = protocol.pins(params) is not None or True in (params.get(INGEST), params.get(FORGET))
            if wrong:
                assert (status, len(text) < 2000) == (400, True), (endpoint, str(params)[:200], text)
            elif not {CHUNKS, PREFIX, "prompt_token_ids"} & set(
                params
            ):  # vLLM reads the last, and a place may be wrong
                assert status == (401 if needs_key else 200), (endpoint, str(params)[:200], text)


SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30)
)
ANYTHING = st.recursive(
    SCALAR | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SOUND = st.fixed_dictionaries(
    {},
    optional={
        protocol.POLICY: st.sampled_from(("query", "head", "none", "all", "hkvd")),
        protocol.RATIO: st.floats(0, 1),
        protocol.BLEND: st.sampled_from(("on", "off", True, False)),
        protocol.CHUNKS: st.sampled_from(([], [[0, 3]], [[64, 128]], [[32, 96], [96, 800]], [[64, 899], [899, 900]])),
        protocol.PREFIX: st.sampled_from((0, 1, 3, 64, 900)),
        protocol.SPANS: st.booleans(),
        protocol.MAX_OFFLOAD_TOKENS: st.sampled_from((0, 1, 64, 900, 2**31 - 1)),
    },
)
PARAMETERS = SOUND | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), ANYTHING, max_size=4) | ANYTHING
WAYS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"stream": True},
        {"n": 3, "temperature": 1},
        {"n": 2, "temperature": 1, "stream": True},
        {"use_beam_search": True, "n": 2},
        {"logprobs": 3, "echo": True},
        {"prompt_logprobs": 2},
        {"prompt": [[5, 6, 7], [8] * 200]},
        {"prompt": "text", "vllm_xargs": {PARAMS: "text"}},
        {"prompt": "text", "vllm_xargs": {PARAMS: [1]}, "stream": True},
        {"cache_salt": "x" * 1000},
        {"max_tokens": 60},
        {"priority": 0, "request_id": "\u2028 x"},
    ],
    "/v1/chat/completions": [
        {"stream": True},
        {"n": 2, "temperature": 1},
        {"use_beam_search": True, "n": 2},
        {"logprobs": True, "top_logprobs": 2, "stream": True},
        {"max_tokens": 40, "stream": True},
    ],
    "/v1/chat/completions/batch": [{"n": 1}, {"logprobs": True}],
    "/v1/messages": [{"stream": True}],
    "/v1/responses": [{"stream": True}, {"store": False}],
    "/inference/v1/generate": [
        {"stream": True},
        {"sampling_params": {"n": 2, "max_tokens": 3}},
        {"sampling_params": {"max_tokens": 3, "logprobs": 2, "prompt_logprobs": 1}},
        {"sampling_params": {"max_tokens": 1, "extra_args": {PARAMS: {"lmcache.max_offload_tokens": "x"}}}},
        {"sampling_params": {"max_tokens": 1, "extra_args": {PARAMS: [1]}}, PARAMS: None, "stream": True},
    ],
}


@st.composite
def request(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    endpoint = draw(st.sampled_from(tuple(ENDPOINTS)))
    way = draw(st.sampled_from([{}, *WAYS[endpoint]]))
    return endpoint, draw(PARAMETERS), {"long": draw(st.booleans()), **way}


def test_batches_of_anything(traffic: Traffic) -> None:
    end = time.monotonic() + SECONDS

    @settings(max_examples=int(10 * SECONDS), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(request(), min_size=4, max_size=8))
    def check(requests: list[tuple[str, Any, dict[str, Any]]]) -> None:
        if time.monotonic() < end:
            traffic.many(requests)

    check()
    assert len(traffic.sent) > 1


def test_clients_that_hang_up_at_each_stage(traffic: Traffic) -> None:
    """As soon as it is sent, in the queue, in the prefill, while it decodes."""
    dice = random.Random(3)
    sound: list[Any] = [
        {protocol.CHUNKS: [[64, 500], [500, 899]], PREFIX: 64},
        {protocol.MAX_OFFLOAD_TOKENS: 0},
        {"lmcache.max_offload_tokens": "x"},
        {"do_remote_prefill": True},
        {},
    ]
    for _ in range(3):
        with ThreadPoolExecutor(12) as pool:  # more than run at once
            for endpoint in ENDPOINTS:
                for after in (0, 0.01, 0.1, 0.5):
                    more: dict[str, Any] = {} if endpoint in ONCE else {"stream": dice.random() < 0.5}
                    if endpoint.startswith("/v1/c"):
                        more["max_tokens"] = 60
                    pool.submit(traffic.hang_up, endpoint, dice.choice(sound), after, **more)
        traffic.ordinary()


RAW = {
    "not a number": b'{"lmcache_rag.ratio": NaN}',
    "infinite": b'{"lmcache_rag.ratio": -Infinity, "x": 1e999}',
    "half a character": b'{"lmcache_rag.policy": "\\ud800"}',
    "a key twice": b'{"lmcache_rag.ratio": 0.5, "lmcache_rag.ratio": "x"}',
    "a huge number": b'{"lmcache_rag.prefix": 1' + b"0" * 5000 + b"}",
    "very deep": b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "a text": b'"lmcache_rag.ratio"',
    "a budget of 5000 digits": b'{"lmcache_rag.ratio": {"tokens": 1' + b"0" * 5000 + b"}}",
    "a budget in a budget": b'{"lmcache_rag.ratio": {"tokens": {"tokens": 1}}}',
    "a negative budget": b'{"lmcache_rag.ratio": {"tokens": -1}}',
    "a budget that is true": b'{"lmcache_rag.ratio": {"tokens": true}}',
    "more than the prompt has": b'{"lmcache_rag.ratio": {"tokens": 2147483647}}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_odd_json(traffic: Traffic, raw: bytes) -> None:
    for endpoint in ENDPOINTS:
        body = json.dumps(traffic.body(endpoint, "HERE")).encode().replace(b'"HERE"', raw)
        status, _ = traffic.post(endpoint, body)
        assert status in (200, 400, 422)
    traffic.ordinary()


def test_a_body_of_too_many_spans_is_refused(traffic: Traffic) -> None:
    """131,072 of them; what they cost the scheduler is nothing."""
    spans = [[at, at + 1] for at in range(131_072)]
    for endpoint in ENDPOINTS:
        status, text = traffic.send(endpoint, {CHUNKS: spans})
        assert status == 400
        assert "has more than" in text
        assert len(text) < 500
    traffic.ordinary()


def test_the_ingest_key_on_every_endpoint(traffic: Traffic) -> None:
    cases = ((None, 401), ("", 401), ("not-the-key-of-this-server-but-long", 403), (KEY, 200))
    for endpoint in ENDPOINTS:
        for stream in (False,) if endpoint in ONCE else (False, True):
            for key, wanted in cases:
                body = traffic.body(endpoint, {INGEST: True, PREFIX: 1}, stream=stream)
                status, text = traffic.post(endpoint, body, {} if key is None else {INGEST_KEY_HEADER: key})
                assert status == wanted, (endpoint, stream, text)
                assert KEY not in text
                assert '"error"' not in text or status != 200, (endpoint, stream, text)
            assert traffic.send(endpoint, {RATIO: 0.5, PREFIX: 1}, stream=stream)[0] == 200, "a question needs none"


def test_the_log_holds_neither_the_key_nor_long_values(hostile: Servers, traffic: Traffic) -> None:
    traffic.send("/v1/completions", {protocol.POLICY: "SECRET" * 100_000})
    traffic.ordinary()
    assert KEY not in hostile.vllm.text
    assert "SECRET" * 20 not in hostile.vllm.text
