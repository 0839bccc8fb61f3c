"""The main job end to end: documents in, answers out, KV reused; the life of a chunk's KV."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from rag_kit import Parts, document

from lmcache_rag.documents import Document
from lmcache_rag.engines.base import BlendOptions, Sampling, TextDelta
from lmcache_rag.errors import ConfigError, ContextLengthError, LMCacheRAGError, PrecomputeError, PromptError
from lmcache_rag.prompt import Turn
from lmcache_rag.rag import RAG, Answer, first_difference, fit_context
from lmcache_rag.trace import chunk_name, read_trace


def test_documents_in_answers_out(parts, documents):
    report = parts.ingestor.ingest(documents)
    assert len(report.added) == 4
    assert report.kv.computed == report.chunks_added > 4
    answer = parts.rag.ask(documents[1].text[:60])
    assert answer.sources[0].documents[0].doc_id == "d1"
    assert answer.stats.chunks_hit == 3
    assert answer.stats.blended


def test_a_question_with_half_an_emoji_is_answered(parts, documents):
    parts.ingestor.ingest(documents)
    question = f"{documents[1].text[:60]} \ud83d"
    answer = parts.rag.ask(question)
    assert answer.question == question.replace("\ud83d", "\N{REPLACEMENT CHARACTER}")
    assert answer.sources[0].documents[0].doc_id == "d1"
    assert [hit.chunk_id for hit in parts.rag.retrieve(question)] == [hit.chunk_id for hit in answer.sources]


def test_a_document_with_half_an_emoji_is_ingested(parts):
    report = parts.ingestor.ingest([document("a", "Quince."), Document("b", "Half \ud83d an emoji.", "1", "b")])
    assert report.added == ("a", "b")
    assert "Half \N{REPLACEMENT CHARACTER} an emoji." in {chunk.text for chunk in parts.store.registry.chunks()}


def test_citing_reuses_the_same_kv_in_any_order(parts, documents):
    parts.ingestor.ingest(documents)
    question = documents[1].text[:60]
    hits = parts.rag.retrieve(question)
    plain = parts.rag.ask(question, hits=hits)
    parts.rag.cite = True
    files = parts.engine.usage().chunks
    for order in (hits, hits[::-1]):
        answer = parts.rag.ask(question, hits=order)
        assert answer.labels == tuple(str(hit.chunk_id) for hit in order)  # a passage's label is the same at any rank
        assert (answer.stats.chunks_hit, answer.stats.chunks_missed) == (3, 0)
        assert answer.stats.prompt_tokens > plain.stats.prompt_tokens
    assert parts.engine.usage().chunks == files
    assert plain.labels == ()


def test_what_an_answer_cites_is_found(parts, documents):
    parts.ingestor.ingest(documents)
    parts.rag.cite = True
    answer = parts.rag.ask(documents[1].text[:60])
    first, second, _ = answer.labels
    text = f"It opens [{second}]. It closes [{first}, {second}] in [1999] and [x]."
    assert replace(answer, text=text).cited == (second, first)


def test_labels_count_to_the_context(parts, documents):
    parts.ingestor.ingest(documents)
    hits = [replace(hit, chunk_id=10**30 + hit.chunk_id) for hit in parts.rag.retrieve(documents[1].text[:60])]
    plain = len(parts.prompts.query([hit.text for hit in hits], "What?"))
    fit = partial(fit_context, parts.prompts, "What?", hits, limit=plain + 10)
    assert not fit().dropped
    assert fit(cite=True).dropped


def test_only_changed_chunks_are_computed_again(parts, documents):
    first = parts.ingestor.ingest(documents)
    again = parts.ingestor.ingest(documents)
    assert (again.unchanged, again.kv.computed, again.chunks_added) == (4, 0, 0)
    changed = document("d0", documents[0].text + "\n\nA wholly new paragraph stands at the end of this document now.")
    report = parts.ingestor.ingest([changed, *documents[1:]])
    assert report.updated == ("d0",)
    assert 1 <= report.kv.computed <= 2 < first.kv.computed


def test_shared_kv_leaves_with_the_last_document(parts, documents):
    twin = document("twin", documents[0].text)
    report = parts.ingestor.ingest([documents[0], twin])
    files = parts.engine.usage().chunks
    assert files == report.chunks_added + 1  # and the prefix
    parts.maintainer.remove(["twin"])
    assert parts.engine.usage().chunks == files
    parts.maintainer.remove(["d0"])
    assert parts.engine.usage().chunks == 0  # and the prefix with the last chunk
    assert parts.rag.ask("What?").sources == ()


def test_the_first_question_computes_and_keeps_kv(parts, documents):
    assert parts.ingestor.ingest(documents, kv=False).kv.computed == 0
    question = "What is said first?"
    assert parts.rag.ask(question).stats.chunks_missed == 3
    assert parts.rag.ask(question).stats.chunks_hit == 3
    totals = parts.maintainer.warm()
    assert totals.computed == parts.maintainer.status().store.chunks - 3
    assert parts.maintainer.status().store.chunks_without_kv == 0


def test_warm_and_verify_never_take_all_texts_at_once(parts, documents, monkeypatch):
    monkeypatch.setattr("lmcache_rag.kv_manager._BATCH", 4)
    parts.ingestor.ingest(documents, kv=False)
    total = parts.maintainer.status().store.chunks
    assert total > 8
    sizes, seen = [], []
    absent, chunks = parts.engine.missing, parts.store.registry.chunks

    def listed(ids=None):
        sizes.append(0 if ids is None else len(ids))
        return chunks(ids)

    monkeypatch.setattr(parts.engine, "missing", lambda prompts: sizes.append(len(prompts)) or absent(prompts))
    monkeypatch.setattr(parts.store.registry, "chunks", listed)
    assert parts.maintainer.warm(on_chunk=lambda *step: seen.append(step[:2])).computed == total
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert parts.maintainer.warm().computed == 0
    assert parts.maintainer.verify(sample=None).checked == total
    assert parts.maintainer.verify(sample=5, seed=1).checked == 5
    assert max(sizes) == 4


def test_prune_leaves_nothing_of_the_other_model(parts, documents, tokenizer, embedder):
    parts.ingestor.ingest(documents)
    assert parts.engine.usage().chunks == parts.maintainer.status().store.chunks + 1
    parts.store.close()
    other = Parts(parts.store.path, tokenizer, embedder, seed=1)
    other.maintainer.warm()
    assert other.maintainer.prune() == other.maintainer.status().store.chunks
    assert other.engine.usage().chunks == other.maintainer.status().store.chunks + 1
    assert other.maintainer.verify(sample=None).bad == ()
    other.store.close()


def test_verify_finds_and_repairs_damage(parts, documents):
    parts.ingestor.ingest(documents)
    assert parts.maintainer.verify(sample=None).bad == ()
    path = parts.kv_file(next(iter(parts.store.registry.chunks())).text)
    path.write_bytes(path.read_bytes()[:-9])
    found = parts.maintainer.verify(sample=None, repair=False)
    assert [result.status for result in found.bad] == ["damaged"]
    assert parts.maintainer.verify(sample=None).repaired == 1
    assert parts.maintainer.verify(sample=None).bad == ()


def test_a_failed_precompute_raises_and_is_repaired(parts, documents, monkeypatch):
    whole = parts.model.forward
    calls = iter([False, False, False, False, True])  # the prefix, what stands before chunks, and two chunks go well

    def fail(*args):
        if next(calls, False):
            raise RuntimeError("out of memory")
        return whole(*args)

    monkeypatch.setattr(parts.model, "forward", fail)
    with pytest.raises(PrecomputeError, match=r"out of memory.*again"):
        parts.ingestor.ingest(documents)
    assert parts.engine.usage().chunks == 3
    report = parts.ingestor.ingest(documents)
    assert report.unchanged == 4
    assert report.kv.computed == parts.maintainer.status().store.chunks - 2
    assert parts.maintainer.status().store.chunks_without_kv == 0


def test_one_bad_file_never_stops_the_rest(parts, tmp_path):
    (tmp_path / "good.txt").write_text("A good document about rivers.")
    (tmp_path / "bad.txt").write_bytes(b"\x00\x01binary\x00")
    report = parts.ingestor.ingest([tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "none.txt"])
    assert len(report.added) == 1
    assert len(report.failed) == 2
    plan = parts.ingestor.plan([tmp_path / "good.txt"])
    assert (plan.documents, plan.unchanged) == (0, 1)
    with pytest.raises(ConfigError, match="list"):
        parts.ingestor.ingest(str(tmp_path))


def test_a_stream_ends_with_the_answer(parts, documents):
    parts.ingestor.ingest(documents)
    *deltas, answer = parts.rag.stream("What?")
    assert isinstance(answer, Answer)
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == answer.text


async def test_async_twins_and_batches_agree(parts, documents):
    await parts.ingestor.aingest(documents)
    one = parts.rag.ask("What?")
    many = await parts.rag.aask_batch(["What?", "What?", " "])
    assert [a.text for a in many[:2]] == [one.text] * 2
    assert isinstance(many[2], PromptError)
    assert [type(a) for a in parts.rag.ask_batch(["What?", ""])] == [Answer, PromptError]
    assert (await parts.maintainer.awarm()).computed == 0


async def test_queries_while_ingesting_all_get_answers(parts, documents):
    parts.ingestor.ingest(documents[:2])
    asked = [parts.rag.aask(f"What is number {i}?") for i in range(12)]
    *answers, report = await asyncio.gather(*asked, parts.ingestor.aingest(documents[2:]))
    assert len(report.added) == 2
    assert all(answer.stats.prompt_tokens for answer in answers)


def test_chunks_that_do_not_fit_go_lowest_score_first(parts, documents):
    parts.ingestor.ingest(documents)
    hits = parts.rag.retrieve("What?", top_k=3)
    answer = parts.rag.ask("What? " * 1900, hits=hits, sampling=Sampling(max_tokens=200))
    assert answer.dropped
    assert answer.dropped[0].score == min(hit.score for hit in hits)
    assert "did not fit" in answer.completion.warnings[-1]
    with pytest.raises(ContextLengthError, match="shorter question"):
        parts.rag.ask("What? " * 5000, hits=hits)


def test_history_keeps_the_chunks_reusable(parts, documents):
    parts.ingestor.ingest(documents)
    answer = parts.rag.ask("And then?", history=[Turn("user", "What?"), Turn("assistant", "That.")])
    assert answer.stats.chunks_hit == 3


def test_comparison_at_ratio_1_finds_no_difference(parts, documents):
    parts.ingestor.ingest(documents)
    parts.rag.blend = BlendOptions("all", 1.0)
    result = parts.rag.compare("What?")
    assert result.first_difference is None
    assert result.speedup > 0
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1


def test_bad_questions_are_errors(parts, documents):
    with pytest.raises(PromptError, match="empty"):
        parts.rag.ask("  ")
    with pytest.raises(ConfigError, match="top_k"):
        parts.rag.ask("What?", top_k=0)
    assert parts.rag.retrieve("What?", top_k=1000) == []
    assert issubclass(PromptError, LMCacheRAGError)


async def test_both_retrievers_give_unchanged_chunks(parts, documents):
    from lmcache_rag.integrations.langchain import LMCacheRetriever as ForLangChain
    from lmcache_rag.integrations.llama_index import LMCacheRetriever as ForLlamaIndex

    parts.ingestor.ingest(documents)
    wanted = [hit.text for hit in parts.rag.retrieve("What?")]
    chain = ForLangChain(rag=parts.rag)
    assert [d.page_content for d in chain.invoke("What?")] == wanted
    assert [d.page_content for d in await chain.ainvoke("What?", k=1)] == wanted[:1]
    llama = ForLlamaIndex(parts.rag)
    assert [n.get_content() for n in llama.retrieve("What?")] == wanted
    assert [n.node.text for n in await llama.aretrieve("What?")] == wanted


def test_the_package_lists_what_it_exports():
    code = (
        "import lmcache_rag; assert 'RAG' in dir(lmcache_rag); assert lmcache_rag.RAG.__name__ == 'RAG'; lmcache_rag.no"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError" in done.stderr


def test_answers_are_appended_to_a_trace(parts, documents, tmp_path):
    parts.ingestor.ingest(documents)
    rag = RAG(parts.store, parts.engine, parts.rag.embedder, parts.prompts, top_k=3, trace=tmp_path / "trace.jsonl")
    answers = [rag.ask(documents[1].text[:60]), *rag.ask_batch([documents[2].text[:60]])]
    compared = rag.compare(documents[0].text[:60])
    found = list(read_trace(tmp_path / "trace.jsonl"))
    assert [line.question for line in found] == [answer.question for answer in (*answers, compared.blended)], "once"
    for line, answer in zip(found, (*answers, compared.blended), strict=True):
        assert line.chunks == tuple(chunk_name(hit.text) for hit in answer.sources)
        assert line.tokens == tuple(hit.tokens for hit in answer.sources)
    parts.rag.ask(documents[1].text[:60])
    assert len(list(read_trace(tmp_path / "trace.jsonl"))) == 3, "off by default"
