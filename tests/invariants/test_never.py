"""DESIGN.md, "What must never happen": the five lines, each with tests that fail when it is broken.

1. An answer computed from KV of other text, another model, another tenant or another prefix.
2. A request called blended when nothing was reused. The statistics come from what the engine did.
3. Blended (approximate) KV stored or served as exact KV, to anyone.
4. A missing, slow or dead cache turning into a failed answer: it turns into a full prefill and a warning.
5. Silence: an engine without blending says so once, loudly, and works.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_model
from rag_kit import Parts, kv_file

from lmcache_rag._utils import AsyncFromStream
from lmcache_rag.engines.base import BlendOptions, Engine, ReuseStats, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.errors import UnsupportedModelError
from lmcache_rag.prompt import PromptBuilder, PromptFormat
from lmcache_rag.rag import RAG
from lmcache_rag.store import Store

SHORT = Sampling(max_tokens=4)
FULL = BlendOptions(enabled=False)
HUNG = 120.0  # seconds after which a test lets go of what it holds up


def warnings_of(caplog):
    ours = [record for record in caplog.records if record.name.startswith("lmcache_rag")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


# -- 1. KV of other text, another model, another tenant or another prefix ----------------------------------------


@pytest.mark.parametrize("change", ["tenant", "prefix", "revision", "dtype", "tokenizer"])
def test_kv_of_other_tenant_prefix_or_model_is_unused(change, tokenizer, corpus, tmp_path):
    def engine(seed=0, dtype=torch.float32, **facts):
        model = HFModel.wrap(tiny_model("llama", seed=seed).to(dtype), tokenizer)
        return EmbeddedEngine.from_model(model, name="tiny", kv_dir=tmp_path, **({"revision": "0"} | facts))

    first = engine(tokenizer_hash="t")
    list(first.precompute(map(PromptBuilder(tokenizer, first.info).ingest, corpus)))
    facts = {
        "revision": {"seed": 1, "revision": "1"},
        "dtype": {"dtype": torch.bfloat16},
        "tokenizer": {"tokenizer_hash": "u"},
    }
    second = engine(**({"tokenizer_hash": "t"} | facts.get(change, {})))
    builder = PromptBuilder(
        tokenizer,
        second.info,
        tenant="other" if change == "tenant" else "",
        format=PromptFormat(system="Speak like a pirate.") if change == "prefix" else None,
    )
    prompt = builder.query(corpus, "What?")
    assert second.missing(list(map(builder.ingest, corpus))) == [True] * 6
    stats = second.generate(prompt, SHORT, BlendOptions()).stats
    assert (stats.chunks_hit, stats.chunks_missed, stats.prefix_tokens) == (0, 6, 0)
    got, wanted = (second.prefill(prompt, blend).logits.float() for blend in (BlendOptions("none"), FULL))
    assert (got - wanted).abs().max() < (1e-3 if change != "dtype" else 0.5)


def test_two_tenants_of_one_engine_share_nothing(tiny, corpus):
    mine = PromptBuilder(tiny.tokenizer, tiny.info, tenant="mine")
    yours = PromptBuilder(tiny.tokenizer, tiny.info, tenant="yours")
    list(tiny.precompute(map(mine.ingest, corpus)))
    assert tiny.generate(mine.query(corpus, "What?"), SHORT, BlendOptions()).stats.chunks_hit == 6
    assert tiny.usage().memory_bytes > 0
    stats = tiny.generate(yours.query(corpus, "What?"), SHORT, BlendOptions()).stats
    assert (stats.chunks_hit, stats.prefix_tokens) == (0, 0)


@pytest.mark.parametrize("source", ["another text", "another tenant"])
def test_a_file_under_a_wrong_name_is_never_used(source, tiny, corpus, tmp_path, caplog):
    builder, other = (PromptBuilder(tiny.tokenizer, tiny.info, tenant=tenant) for tenant in ("", "other"))
    for each in (builder, other):
        list(tiny.precompute(map(each.ingest, corpus)))
    target = kv_file(tmp_path, builder.chunk_key(corpus[2]))
    wrong = builder.chunk_key(corpus[3]) if source == "another text" else other.chunk_key(corpus[2])
    shutil.copyfile(kv_file(tmp_path, wrong), target)
    prompt = builder.query(corpus, "What?")
    done = tiny.generate(prompt, SHORT, BlendOptions("all"))
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (5, 1)
    assert done.token_ids == tiny.generate(prompt, SHORT, FULL).token_ids
    assert "belongs to another chunk" in caplog.text


def test_another_model_or_splitter_never_reads_old_kv(parts, documents, tokenizer, embedder):
    parts.ingestor.ingest(documents)
    parts.store.close()
    other = Parts(parts.store.path, tokenizer, embedder, seed=1)
    assert other.rag.ask("What?").stats.chunks_hit == 0
    assert other.maintainer.status().store.stale_bytes > 0
    assert other.maintainer.prune() > 0
    assert other.maintainer.status().store.stale_bytes == 0
    other.store.close()
    split = Parts(parts.store.path, tokenizer, embedder, seed=1, chunk_tokens=32)
    assert len(split.ingestor.ingest(documents).updated) == 4
    split.store.close()


# -- 2. Called blended when nothing was reused --------------------------------------------------------------------


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up"):
        ReuseStats(10, prefix_tokens=4, reused_tokens=5)


def test_nothing_is_called_blended_when_no_kv_is_there(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    done = tiny.generate(builder.query(corpus, "What?"), SHORT, BlendOptions())
    assert (done.stats.reused_tokens, done.stats.recomputed_tokens, done.stats.chunks_hit) == (0, 0, 0)
    assert not done.stats.blended
    assert "missing" in done.warnings[0]


def test_a_full_prefill_reuses_nothing(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    list(tiny.precompute(map(builder.ingest, corpus)))
    prompt = builder.query(corpus, "What?")
    stats = tiny.generate(prompt, SHORT, FULL).stats
    assert stats.computed_tokens == len(prompt)
    assert (stats.chunks_hit, stats.blended) == (0, False)


def test_exact_or_recomputed_kv_is_not_called_blended(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    list(tiny.precompute(map(builder.ingest, corpus)))
    recomputed = tiny.generate(builder.query(corpus, "What?"), SHORT, BlendOptions("all")).stats
    assert (recomputed.chunks_hit, recomputed.reused_tokens, recomputed.blended) == (6, 0, False)
    exact = tiny.generate(builder.query(corpus[:1], "What?"), SHORT, BlendOptions()).stats
    assert (exact.chunks_hit, exact.reused_tokens, exact.blended) == (1, 0, False)


@pytest.mark.parametrize(("policy", "kept"), [("none", 6), ("head", 6), ("head", 4), ("all", 6), ("none", 0)])
def test_counts_are_those_of_computed_tokens(policy, kept, tokenizer, corpus, tmp_path):
    model = tiny_model("llama")
    engine = EmbeddedEngine.from_model(HFModel.wrap(model, tokenizer), name="t", revision="0", kv_dir=tmp_path)
    builder = PromptBuilder(tokenizer, engine.info)
    list(engine.precompute(map(builder.ingest, corpus[:kept])))
    through = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: through.append(out.shape[1]))
    prompt = builder.query(corpus[::-1], "What?")
    stats = engine.generate(prompt, Sampling(max_tokens=1), BlendOptions(policy, 0.3)).stats
    assert sum(through) == stats.recomputed_tokens + stats.computed_tokens
    assert stats.prompt_tokens - sum(through) == stats.prefix_tokens + stats.reused_tokens


# -- 3. Blended KV stored or served as exact ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["query", "hkvd", "none"])
def test_blended_kv_is_never_kept(policy, tokenizer, corpus, tmp_path):
    model = HFModel.wrap(tiny_model("llama"), tokenizer)

    def engine():
        return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path)

    used = engine()
    builder = PromptBuilder(tokenizer, used.info)
    known = [corpus[i] for i in (0, 1, 3, 5)]  # the others stand between them, behind reused KV
    list(used.precompute(map(builder.ingest, known)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    for _ in range(2):  # the second time from memory
        used.generate(builder.query(corpus, "What?"), SHORT, BlendOptions(policy, 0.3))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    prompt = builder.query(known[::-1], "Which?")
    got, wanted = (each.prefill(prompt, BlendOptions("none")).logits for each in (used, engine()))
    assert torch.equal(got, wanted)


def test_what_a_question_leaves_behind_is_exact_kv(parts, documents):
    parts.ingestor.ingest(documents[:2])
    parts.ingestor.ingest(documents[2:], kv=False)
    hits = [hit for pair in zip(*halves(parts, documents), strict=True) for hit in pair]
    answer = parts.rag.ask("What?", hits=hits)
    assert answer.stats.reused_tokens > 0
    assert answer.stats.chunks_missed == 2
    assert parts.rag.ask("What?", hits=hits).stats.chunks_missed == 0
    checks = [parts.engine.verify(parts.prompts.ingest(hit.text)) for hit in hits]
    assert [check.status for check in checks] == ["ok"] * 4


def halves(parts, documents):
    """Two hits from the documents with KV, two from those without."""
    first = {document.doc_id for document in documents[:2]}
    hits = parts.rag.retrieve("What?", top_k=100)
    return [[hit for hit in hits if (hit.documents[0].doc_id in first) is kv][:2] for kv in (True, False)]


@pytest.mark.parametrize("form", [PromptFormat(), PromptFormat(neutral=())])
def test_only_the_prefix_and_chunks_in_place_are_exact(form, tiny, corpus):
    """After neutral passages no chunk's KV is computed where a query has it."""
    builder = PromptBuilder(tiny.tokenizer, tiny.info, format=form)
    list(tiny.precompute(map(builder.ingest, corpus[1:])))
    blend = BlendOptions("none")
    first, prefix = len(builder.chunk_ids(corpus[1])), len(builder.prefix_ids)
    in_place = 0 if form.neutral else first
    hit = tiny.generate(builder.query(corpus[1:4], "What?"), SHORT, blend).stats
    assert hit.prefix_tokens == prefix + in_place
    assert hit.reused_tokens == sum(len(builder.chunk_ids(text)) for text in corpus[1:4]) - in_place
    miss = tiny.generate(builder.query(corpus[:3], "What?"), SHORT, blend).stats  # the first chunk has no KV
    assert miss.prefix_tokens == prefix
    assert miss.reused_tokens == first + len(builder.chunk_ids(corpus[2]))


# -- 4. A missing, slow or dead cache -----------------------------------------------------------------------------

LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""
WRITE_ONLY = Path("/proc/sys/vm/compact_memory")  # even root is not let in to read it
# Opens the other end at last, and so ends the wait of whoever reads.
PIPE = "import os, sys, time; time.sleep(float(sys.argv[2])); os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)"


def hurt(path, fault):
    """Do that to the file; returns a process that lets go of it in the end, so that a hang fails instead."""
    data = path.read_bytes()
    if fault == "leased":  # whoever opens it waits until the holder is done, as on a file system that hangs
        holder = subprocess.Popen([sys.executable, "-c", LEASE, path, str(HUNG)], stdout=subprocess.PIPE, text=True)
        if holder.stdout.readline() != "held\n":
            pytest.skip("no file leases here")
        return holder
    path.unlink()
    if fault == "pipe":
        os.mkfifo(path)
        return subprocess.Popen([sys.executable, "-c", PIPE, path, str(HUNG)], stderr=subprocess.DEVNULL)
    if fault == "unreadable":
        if os.geteuid() != 0:
            path.touch(0o000)
        elif WRITE_ONLY.exists():
            path.symlink_to(WRITE_ONLY)
        else:
            pytest.skip("root may read everything here")
    elif fault == "folder":
        path.mkdir()
    elif fault == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif fault == "link to itself":
        path.symlink_to(path)
    elif fault != "missing":
        flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        path.write_bytes({"empty": b"", "truncated": data[:-100], "flipped": flipped, "noise": b"\xff" * 999}[fault])
    return None


FAULTS = [
    *("missing", "empty", "truncated", "flipped", "noise", "unreadable"),
    *("folder", "pipe", "leased", "link to nothing", "link to itself"),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("whose", ["chunk", "prefix"])
def test_a_bad_kv_file_is_recomputed_with_a_warning(whose, fault, tiny, corpus, tmp_path, caplog):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompts = [builder.ingest(text) for text in corpus]
    list(tiny.precompute(prompts))
    keys = {prompt.key for prompt in prompts}
    tiny.close()  # nothing in memory
    files = {path.stem: path for path in tmp_path.rglob("*.safetensors")}
    victim = files[prompts[2].key] if whose == "chunk" else next(files[key] for key in files.keys() - keys)
    holder = hurt(victim, fault)
    try:
        query = builder.query(corpus, "What?")
        begin = time.monotonic()
        done = tiny.generate(query, SHORT, BlendOptions("all"))
        assert time.monotonic() - begin < HUNG / 2
        assert done.token_ids == tiny.generate(query, SHORT, FULL).token_ids
        missed = int(whose == "chunk")
        assert (done.stats.chunks_hit, done.stats.chunks_missed) == (6 - missed, missed)
        if whose == "chunk":
            assert "1 chunk(s) was missing" in done.warnings[0]
            assert done.stats.prefix_tokens > 0
        else:
            assert done.stats.prefix_tokens == 0
        if fault not in ("missing", "link to nothing"):
            assert victim.name in "".join(warnings_of(caplog))
        if fault in ("empty", "truncated", "flipped", "noise", "pipe", "link to itself") and whose == "chunk":
            assert tiny.missing(prompts) == [False, False, True, False, False, False]  # removed, to be computed anew
    finally:
        if holder:
            holder.kill()
            holder.communicate()


@pytest.mark.parametrize("fault", ["truncated", "flipped", "noise", "pipe", "folder"])
def test_verify_calls_it_damaged(fault, tiny, corpus, tmp_path):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompt = builder.ingest(corpus[0])
    list(tiny.precompute([prompt]))
    holder = hurt(kv_file(tmp_path, prompt.key), fault)
    assert tiny.verify(prompt).status == "damaged"
    if holder:
        holder.kill()
        holder.communicate()


def test_a_busy_file_is_not_taken_for_a_damaged_one(tiny, corpus, tmp_path):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    list(tiny.precompute(map(builder.ingest, corpus)))
    tiny.close()
    holder = hurt(kv_file(tmp_path, builder.chunk_key(corpus[1])), "leased")
    prompt = builder.query(corpus, "What?")
    assert tiny.generate(prompt, SHORT, BlendOptions()).stats.chunks_missed == 1
    holder.kill()
    holder.communicate()
    assert tiny.generate(prompt, SHORT, BlendOptions()).stats.chunks_missed == 0


@pytest.mark.parametrize("fault", ["gone", "a file", "cannot be written"])
def test_a_dead_kv_folder_costs_time_but_no_answer(fault, parts, documents, caplog):
    parts.ingestor.ingest(documents)
    parts.engine.close()
    hits = parts.rag.retrieve("What?")
    wanted = parts.rag.ask("What?", hits=hits, blend=FULL).text
    folder = parts.store.kv_dir
    shutil.rmtree(folder)
    if fault == "a file":
        folder.write_text("not a folder")
    elif fault == "cannot be written":
        folder.symlink_to("/proc/sys")  # not even root can make files there
    for _ in range(2):
        answer = parts.rag.ask("What?", hits=hits)
        assert answer.text == wanted
        if fault != "gone":
            assert answer.stats.chunks_missed == 3
            assert "missing" in answer.completion.warnings[0]
    if fault == "gone":  # and it mends itself
        assert answer.stats.chunks_hit == 3
    else:
        assert "cannot be written" in "".join(warnings_of(caplog))


def test_a_question_does_not_wait_for_another_writer(parts, documents):
    parts.ingestor.ingest(documents, kv=False)
    other = Store.open(parts.store.path)
    with other.writing():
        begin = time.monotonic()
        assert parts.rag.ask("What?").stats.chunks_missed == 3
        assert time.monotonic() - begin < HUNG / 2
        assert parts.rag.ask("What?").stats.chunks_missed == 3  # nothing was kept meanwhile
    other.close()
    parts.rag.ask("What?")
    assert parts.rag.ask("What?").stats.chunks_hit == 3


# -- 5. Silence ---------------------------------------------------------------------------------------------------


class PlainServer(AsyncFromStream):
    """An engine without blending, as a server without our connector is: the real one, used without its KV."""

    def __init__(self, engine):
        self._engine = engine
        self.info = replace(engine.info, can_blend=False, why_not="it runs without our connector", falls_back=True)
        self.tokenizer = engine.tokenizer
        self.asked = []

    def stream(self, prompt, sampling, blend):
        self.asked.append(blend)
        return self._engine.stream(prompt, sampling, FULL)

    def generate(self, prompt, sampling, blend):
        self.asked.append(blend)
        return self._engine.generate(prompt, sampling, FULL)

    def precompute(self, prompts, *, stop=None):
        raise UnsupportedModelError("no KV here")

    def missing(self, prompts):
        return [True] * len(prompts)

    def forget(self, pairs):
        pass

    def verify(self, prompt):
        raise UnsupportedModelError("no KV here")

    def usage(self):
        return self._engine.usage()

    def close(self):
        pass


@pytest.fixture
def server(parts, documents, embedder):
    parts.ingestor.ingest(documents)
    engine = PlainServer(parts.engine)
    assert isinstance(engine, Engine)
    return RAG(parts.store, engine, embedder, parts.prompts, top_k=3, sampling=SHORT)


def test_an_engine_without_blending_warns_once(server, parts, caplog):
    wanted = parts.rag.ask("What?", blend=FULL).text
    answers = [server.ask("What?"), server.ask("What?")]
    with ThreadPoolExecutor(4) as pool:
        answers += pool.map(lambda _: server.ask("What?"), range(4))
    assert [answer.text for answer in answers] == [wanted] * 6
    assert all(answer.stats.computed_tokens == answer.stats.prompt_tokens for answer in answers)
    assert not any(answer.stats.blended for answer in answers)
    assert not any(blend.enabled for blend in server.engine.asked)
    assert warnings_of(caplog) == [
        "tiny does not blend: it runs without our connector. Answers come from full prefills."
    ]


async def test_it_also_warns_in_event_loops_and_compare(server, caplog):
    await server.aask("What?")
    assert server.compare("What?").first_difference is None
    assert len(warnings_of(caplog)) == 1


def test_who_asks_for_a_full_prefill_needs_no_warning(server, caplog):
    server.ask("What?", blend=FULL)
    assert warnings_of(caplog) == []


def test_an_unsupported_family_answers_unblended(parts, documents, tokenizer, embedder, caplog):
    import transformers

    config = transformers.GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=2, n_positions=2048, eos_token_id=2)
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = HFModel.wrap(transformers.GPT2LMHeadModel(config).eval(), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="gpt2", revision="0", kv_dir=parts.store.kv_dir)
    (said,) = warnings_of(caplog)
    assert "gpt2 is not blended" in said
    parts.ingestor.ingest(documents, kv=False)
    builder = PromptBuilder(tokenizer, engine.info)
    rag = RAG(parts.store, engine, embedder, builder, sampling=SHORT)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*Llama.*--no-blend"):
        rag.ask("What?")
    with pytest.raises(UnsupportedModelError, match="--no-kv"):
        list(engine.precompute([builder.ingest("some text")]))
    answer = rag.ask("What?", blend=FULL)
    assert answer.completion.token_ids
    assert not answer.stats.blended
    logits = engine.prefill(builder.query(["some text"], "What?"), FULL).logits
    assert logits.shape == (49152,)
