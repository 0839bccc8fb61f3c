"""The key that ingesting and forgetting need: its file, the API server's side, the scheduler's side."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.connector.authorization import MIDDLEWARE, SIGNATURE, IngestKey, IngestKeyMiddleware, RequestValidation
from lmcache_rag.credentials import ingest_key, read_ingest_key
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import FORGET, INGEST, PREFIX, RATIO
from lmcache_rag.serving.commands import ServeOptions, commands

KEY = "0123456789abcdef" * 2
HEADER = b"X-LMCache-RAG-Ingest-Key"
PROMPT = list(range(200))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ingest.key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def served(headers: list[tuple[bytes, bytes]], params: Any, key: str = KEY) -> Any:
    """What a request with these headers is told: the status of its refusal, or what goes to the engine."""
    validation = RequestValidation(1024, 16, IngestKey(key))
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        refusal = validation.refusal(params)
        found.append(refusal.status if refusal else validation.for_engine(params, PROMPT, len(PROMPT)))

    asyncio.run(IngestKeyMiddleware(app)({"type": "http", "headers": headers}, None, None))  # type: ignore[arg-type]
    return found[0]


@pytest.mark.parametrize("params", [{INGEST: True}, {FORGET: True, PREFIX: 64}])
def test_the_key_authorises(params: Any) -> None:
    assert served([], params) == 401
    assert served([(HEADER, b"")], params) == 401
    assert served([(HEADER, KEY.encode()), (HEADER, b"x")], params) == 401, "one of two"
    assert served([(HEADER, b"another")], params) == 403
    seen = served([(HEADER.lower(), KEY.encode())], params)
    assert IngestKey(KEY).permitted(seen, PROMPT) == params


def test_a_question_needs_no_key() -> None:
    assert served([], {RATIO: 0.5, PREFIX: 64, INGEST: False}) == {RATIO: 0.5, PREFIX: 64, INGEST: False}


def test_what_the_middleware_has_not_seen_is_refused() -> None:
    refusal = IngestKey(KEY).refusal({INGEST: True})
    assert refusal is not None
    assert refusal.status == 401


def test_the_next_request_needs_the_key_again() -> None:
    key, found = IngestKey(KEY), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(key.refusal({INGEST: True}))

    async def both() -> None:
        await IngestKeyMiddleware(app)({"type": "http", "headers": [(HEADER, KEY.encode())]}, None, None)  # type: ignore[arg-type]
        found.append(key.refusal({INGEST: True}))

    asyncio.run(both())
    assert found[0] is None
    assert found[1] is not None


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        ({SIGNATURE: "0" * 64}, PROMPT),
        ({SIGNATURE: None}, PROMPT),
        ({SIGNATURE: "\N{SNOWMAN}"}, PROMPT),
        ({PREFIX: 10**400}, PROMPT),
        ({}, PROMPT[1:]),
        ({}, None),
    ],
)
def test_without_a_valid_signature_nothing_is_ingested(change: Any, prompt: Any) -> None:
    params = {INGEST: True, PREFIX: 64}
    signed = params | {SIGNATURE: IngestKey(KEY).signature(params, PROMPT)}
    assert IngestKey(KEY).permitted(signed, PROMPT) == params
    assert INGEST not in IngestKey(KEY).permitted(signed | change, prompt)
    assert INGEST not in IngestKey("another" * 5).permitted(signed, PROMPT)
    assert IngestKey(KEY).permitted({SIGNATURE: "x", RATIO: 1}, PROMPT) == {RATIO: 1}


def test_the_key_comes_from_a_private_file(file: Path) -> None:
    assert read_ingest_key(file) == KEY
    assert ingest_key({"LMCACHE_RAG_INGEST_KEY_FILE": str(file)}) == KEY
    assert ingest_key({"LMCACHE_RAG_INGEST_KEY": KEY, "LMCACHE_RAG_INGEST_KEY_FILE": "nowhere"}) == KEY
    assert ingest_key({}) == ""
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        read_ingest_key(file)


@pytest.mark.parametrize("text", ["", "short", "0123456789abcdef " * 2, "ä" * 40])
def test_what_is_no_key_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"no (key|secret)"):
        read_ingest_key(file)


def test_serve_hands_vllm_the_files_path_only(file: Path) -> None:
    made = commands(ServeOptions("tiny", ingest_key_file=file), {})
    words = list(made.vllm)
    config = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"]["lmcache_rag.ingest_key_file"] == str(file)
    assert words[words.index("--middleware") + 1] == MIDDLEWARE
    assert KEY not in " ".join([*made.shell(), *made.lmcache, *made.environment.values()])
    assert "--middleware" not in commands(ServeOptions("tiny"), {}).vllm


def test_serve_refuses_a_key_file_without_effect(file: Path) -> None:
    own = ("--kv-transfer-config", '{"kv_connector": "CacheBlendConnector"}')
    with pytest.raises(ConfigError, match="has no effect"):
        commands(ServeOptions("tiny", vllm=own, ingest_key_file=file), {})
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        commands(ServeOptions("tiny", ingest_key_file=file), {})
