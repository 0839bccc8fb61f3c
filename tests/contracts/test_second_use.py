"""`serve --store second` with vLLM's scheduler and the connector: which chunks of a prompt were used before."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm_scheduler_kit import Engine, without_server

    from lmcache_rag import protocol
    from lmcache_rag.connector.lmcache_client import mark_unhealthy

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_an_answer_tells_which_chunks_were_used_before(tmp_path: Any, draw: random.Random) -> None:
    with without_server() as port:
        engine = Engine(port, tmp_path, store="second")
    mark_unhealthy(engine.connector.scheduler_adapter)
    finish = engine.connector.request_finished

    def finished(request: Any, blocks: Any) -> Any:
        answer = finish(request, blocks)
        engine.told[request.request_id] = (answer[1] or {}).get(protocol.ANSWER)
        return answer

    engine.connector.request_finished = finished
    prefix, first, second = ([draw.randrange(5, 40000) for _ in range(size)] for size in (64, 90, 70))

    def ask(name: str, prompt: list[int], **params: Any) -> Any:
        keys = {f"lmcache_rag.{key}": value for key, value in params.items()}
        engine.add_tokens(name, prompt, {protocol.PREFIX: 64, **keys})
        engine.to_the_end()
        return engine.told[name].get(protocol.USED_BEFORE)

    try:
        assert ask("a", prefix + first + second + [1], chunks=[[64, 154], [154, 224]]) == []
        assert ask("b", prefix + second + [2], chunks=[[64, 134]]) == [64]
        assert ask("c", prefix + first + [3], ingest=True) is None, "an ingestion is no use"
        assert ask("d", [*prefix, 4, 4, *first, 3], chunks=[[66, 156]]) == [66]
        assert engine.connector._client._used_before == {}, "nothing is kept of requests that ended"
    finally:
        engine.scheduler.shutdown()
