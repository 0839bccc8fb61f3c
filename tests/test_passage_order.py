"""The order of passages in a prompt: where it changes, that it repeats, and that labels and sources go with it."""

from __future__ import annotations

import itertools
import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import vllm_engine_kit
from rag_kit import Parts

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.errors import ConfigError
from lmcache_rag.families import CANNOT_RECUR
from lmcache_rag.passage_order import PassageOrder, SeenOrders, passage_order, rounded
from lmcache_rag.prompt import PromptBuilder, PromptFormat
from lmcache_rag.protocol import CannotBlend
from lmcache_rag.rag import arranged

smollm2_tokenizer, server, connect = (
    vllm_engine_kit.smollm2_tokenizer,
    vllm_engine_kit.server,
    vllm_engine_kit.connect,
)
engine, chunks = vllm_engine_kit.engine, vllm_engine_kit.chunks
KEYS = list("abcdef")


def names(seen: SeenOrders, keys: list[str]) -> list[str]:
    return [keys[index] for index in seen.arrange(keys)]


# -- the stable order -------------------------------------------------------------------------------------------------


def test_the_stable_order_does_not_depend_on_rank() -> None:
    for keys in itertools.permutations(KEYS[:4]):
        assert names(SeenOrders(), list(keys)) == KEYS[:4]
    seen = SeenOrders()
    first = names(seen, ["c", "a", "f", "b"])
    for keys in itertools.permutations(["a", "b", "c", "f"]):
        assert names(seen, list(keys)) == first


def test_the_longest_earlier_beginning_comes_first() -> None:
    seen = SeenOrders()
    assert names(seen, ["x", "y"]) == ["x", "y"]
    assert names(seen, ["b", "y", "x", "a"]) == ["x", "y", "a", "b"]
    assert names(seen, ["c", "b", "a", "x", "y"]) == ["x", "y", "a", "b", "c"]


def test_after_it_passages_in_use_come_first() -> None:
    seen = SeenOrders()
    for _ in range(4):
        seen.arrange(["q", "z"])
    assert names(seen, ["a", "z"]) == ["z", "a"]
    assert [rounded(uses) for uses in (0, 1, 2, 3, 4, 7, 8)] == [0, 1, 2, 2, 4, 4, 8]


def test_a_passage_that_is_there_twice_stays() -> None:
    seen = SeenOrders()
    assert seen.arrange(["b", "a", "b"]) == [1, 0, 2]
    assert seen.arrange([]) == []


def test_what_is_remembered_is_bounded() -> None:
    dice, seen = random.Random(0), SeenOrders(passages=100)
    for _ in range(500):
        seen.arrange([str(dice.randrange(1000)) for _ in range(6)])
    nodes, stack = 0, [seen._root]
    while stack:
        node = stack.pop()
        nodes += len(node.children)
        stack += node.children.values()
    assert nodes == len(seen._latest) <= 100


# -- where it changes -------------------------------------------------------------------------------------------------


def test_auto_is_stable_for_recurrent_layers(server: Any, engine: Any, chunks: list[str], caplog: Any) -> None:
    prompts = PromptBuilder(engine.tokenizer, engine.info)
    usual = list(range(len(chunks)))
    assert arranged(engine, prompts, chunks, "auto") == (usual, "retrieved"), "as far as is known it blends"
    server.why_not, server.why_code = "it has recurrent layers", CannotBlend.RECURRENT
    engine.generate(prompts.query(chunks[:1], "What?"), vllm_engine_kit.SHORT, BlendOptions())
    with caplog.at_level(logging.WARNING, "lmcache_rag"):
        found = [arranged(engine, prompts, [chunks[i] for i in order], "auto") for order in (usual, usual[::-1])]
    assert [order for _, order in found] == ["stable", "stable"]
    first, second = found[0][0], [usual[::-1][place] for place in found[1][0]]
    assert first == second
    assert [one.getMessage() for one in caplog.records if "stable order" in one.getMessage()] == [
        f"Passages for {engine.info.model} are put into a stable order, so that prompts begin alike and share KV. "
        "order=retrieved keeps the order of the retriever."
    ]
    assert arranged(engine, prompts, chunks, "retrieved") == (usual, "retrieved")


def test_auto_needs_recurrent_layers_and_a_cache(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order = passage_order(engine)
    for recurs, caches, wanted in ((True, True, "stable"), (True, False, "retrieved"), (False, True, "retrieved")):
        known = replace(engine.info, can_blend=False, recurrent=recurs, caches_prefixes=caches)
        monkeypatch.setattr(type(engine), "info", known)
        assert order.arrange(KEYS, "auto")[1] == wanted


def test_a_server_reports_its_prefix_cache(server: Any, connect: Any) -> None:
    assert connect(server.url).info.caches_prefixes, "it is on by default"
    server.prefix_caching = False
    assert not connect(server.url).info.caches_prefixes


def test_a_recurrent_model_is_known_from_the_start(server: Any, connect: Any, smollm2_path: Any, tmp_path: Any) -> None:
    for file in smollm2_path.iterdir():
        if file.name.startswith("tokenizer") or file.name.startswith("chat"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3NextForCausalLM"]}')
    info = connect(server.url, tokenizer=str(tmp_path)).info
    assert (info.can_blend, info.why_not) == (False, f"Qwen3NextForCausalLM {CANNOT_RECUR}")
    assert info.recurrent


def test_numbered_passages_and_leads_keep_their_order(engine: Any, chunks: list[str]) -> None:
    usual = list(range(len(chunks)))
    for changed in ({"separator": "\n\n[{rank}] "}, {"lead": "{question}\n\n"}):
        prompts = PromptBuilder(engine.tokenizer, engine.info, format=PromptFormat(**changed))
        assert arranged(engine, prompts, chunks, "stable") == (usual, "retrieved")


def test_an_order_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="order is 'sorted'"):
        BlendOptions(order="sorted")  # type: ignore[arg-type]


def test_an_engine_that_is_gone_is_forgotten() -> None:
    class Gone:
        pass

    order = PassageOrder(Gone())  # type: ignore[arg-type]
    assert order.arrange(["b", "a"], "auto") == ([0, 1], "retrieved")


# -- labels and sources go with the passages --------------------------------------------------------------------------


def test_labels_and_sources_follow_the_passages(parts: Parts, documents: Any, tokenizer: Any, monkeypatch: Any) -> None:
    parts.ingestor.ingest(documents)
    parts.rag.cite, prompts = True, []
    whole = parts.engine.stream
    monkeypatch.setattr(parts.engine, "stream", lambda prompt, *rest: prompts.append(prompt) or whole(prompt, *rest))
    question = documents[1].text[:60]
    hits, blend = parts.rag.retrieve(question), BlendOptions(ratio=0.15, order="stable")
    orders = set()
    for given in (hits, hits[::-1]):
        answer = parts.rag.ask(question, hits=given, blend=blend)
        orders.add(tuple(hit.chunk_id for hit in answer.sources))
        assert answer.stats.order == prompts[-1].order == "stable"
        at = prompts[-1].prefix_tokens
        for hit, label, span in zip(answer.sources, answer.labels, prompts[-1].chunks, strict=True):
            assert span.key == parts.prompts.chunk_key(hit.text)
            assert label == str(hit.chunk_id)
            assert f"[{label}] " in tokenizer.decode(prompts[-1].token_ids[at : span.start])
            at = span.end
    assert len(orders) == 1
    assert len({prompt.token_ids for prompt in prompts}) == 1
    parts.rag.blend = blend
    made = parts.rag.compare(question, hits=hits[::-1])
    assert made.blended.sources == made.full.sources == answer.sources
