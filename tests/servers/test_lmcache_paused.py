"""LMCache is paused under load: no request waits for long, and what is stored and served is right.

A real vLLM (CPU build) with what `serve` sets, and a real LMCache. 5 s: LMCache answers again before a heartbeat has
failed. 130 s: it forgets vLLM's worker after 120 s. vLLM has so few blocks that requests are preempted.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag.bench.soak import paused
from lmcache_rag.serving.commands import HEARTBEAT_S, WAIT_S

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]

CLIENTS, PROMPTS, WHOLE = 4, 8, 4
BLOCKS = 38  # four prompts, and one block more for their answers
COMPARED, LENGTH = 8, 30  # tokens of an answer
DEADLINES_S = 10.0  # of a look-up and a load, together
LOOKED_UP_S = 0.5  # a waiting request has been looked up after this
SILENT_S = 0.75 * WAIT_S  # vLLM answers somebody within this time, however busy the machine is; waiting takes `WAIT_S`
KNOWN = "known"  # the salt of what LMCache has
STORED, LOADED = "lmcache_mp_l1_write_chunks_total", "vllm:external_prefix_cache_hits_total"


@pytest.fixture(scope="module")
def own(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    connector = {"lmcache.mp.mq_timeout": WAIT_S, "lmcache.mp.heartbeat_interval": HEARTBEAT_S}
    options = ("--num-gpu-blocks-override", str(BLOCKS))
    pair = Servers(smollm2_path, tmp_path_factory.mktemp("paused"), *options, connector=connector, guarded=True)
    try:
        yield pair
    finally:
        pair.close()


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    number: int
    salt: str
    begin: float
    seconds: float
    tokens: list[int]


@dataclass
class Load:
    """Clients that ask one thing after another: now a prompt that LMCache has, now one that is to be stored."""

    servers: Servers
    prompts: list[list[int]]
    answers: list[Answer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    name: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, client: int) -> None:
        rng, turn = random.Random(client), client
        while not self._stop.is_set():
            number, turn = rng.randrange(len(self.prompts)), turn + 1
            salt = f"new {self.name} {client} {turn}" if turn % 2 else KNOWN
            begin = time.monotonic()
            try:
                tokens = self.servers.tokens(self.prompts[number], cache_salt=salt, max_tokens=LENGTH)
            except Exception as problem:
                self.failed.append(f"{type(problem).__name__}: {problem}"[:300])
                return
            self.answers.append(Answer(number, salt, begin, time.monotonic() - begin, tokens))

    def more(self, requests: int, seconds: float = 600) -> None:
        """Wait until so many more are answered."""
        wanted = len(self.answers) + requests
        assert until(lambda: len(self.answers) >= wanted or bool(self.failed), seconds)
        assert self.failed == []


def texts(path: Path, sentences: list[str]) -> list[list[int]]:
    """Prompts of different text with the same end, so that KV of another shows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(" ".join(sentences))["input_ids"]
    end = tokenizer("\nThis text is about")["input_ids"]
    assert len(ids) > PROMPTS * WHOLE * CHUNK
    return [ids[n * WHOLE * CHUNK : (n + 1) * WHOLE * CHUNK] + end for n in range(PROMPTS)]


@pytest.mark.parametrize("seconds", [5, 130])
def test_a_pause_under_load_delays_and_harms_nothing(
    own: Servers, smollm2_path: Path, sentences: list[str], seconds: float
) -> None:
    servers = own
    prompts = texts(smollm2_path, sentences)
    wanted = [
        servers.tokens(prompt, cache_salt=f"alone {seconds} {n}", max_tokens=COMPARED)
        for n, prompt in enumerate(prompts)
    ]
    assert len(set(map(tuple, wanted))) == PROMPTS, "each prompt has another answer"
    for prompt in prompts:
        servers.tokens(prompt, cache_salt=KNOWN)
    engine, preempted = servers.vllm.engine_core(), servers.vllm_counter("vllm:num_preemptions_total")
    with Load(servers, prompts, name=str(seconds)) as load, ThreadPoolExecutor(PROMPTS) as beside:
        load.more(4 * CLIENTS)
        usual = max(answer.seconds for answer in load.answers)
        assert servers.vllm_counter(LOADED) > 0
        # More than fit beside each other. Some are looked up before the pause, wait for blocks, and are stored while
        # LMCache does not answer and is not known to be away yet. Those that come later wait for their look-up.
        stores = [
            beside.submit(servers.tokens, prompt, cache_salt=f"pause {seconds}", max_tokens=COMPARED)
            for prompt in prompts
        ]
        time.sleep(LOOKED_UP_S)
        with paused(servers.lmcache.pid):
            stopped = time.monotonic()
            time.sleep(seconds)
        resumed = time.monotonic()
        load.more(3 * CLIENTS)
        loaded = servers.vllm_counter(LOADED)

        def resumes() -> bool:
            load.more(CLIENTS)
            return servers.vllm_counter(LOADED) > loaded

        assert until(resumes, 120), "KV is loaded again"
    slowest = max(answer.seconds for answer in load.answers)
    ends = sorted(answer.begin + answer.seconds for answer in load.answers)
    silent = max(after - before for before, after in pairwise(ends))
    during = [answer for answer in load.answers if stopped < answer.begin + answer.seconds < resumed]
    preemptions = servers.vllm_counter("vllm:num_preemptions_total") - preempted
    print(f"{len(load.answers)} requests, {len(during)} of them ended in the pause; {preemptions:.0f} preemptions;")
    print(f"the slowest took {usual:.1f} s before, {slowest:.1f} s in all; nobody was answered for {silent:.1f} s")
    assert servers.vllm.engine_core() == engine
    assert preemptions > 0
    assert [a for a in load.answers if a.tokens[:COMPARED] != wanted[a.number]] == []
    assert [store.result() for store in stores] == wanted
    assert slowest < DEADLINES_S + 3 * usual + 5
    assert silent < SILENT_S
    assert during or seconds < DEADLINES_S

    def stored() -> bool:  # in the namespace of this question
        nonlocal attempt
        attempt += 1
        before = servers.lmcache_counter(STORED)
        servers.tokens(prompts[0], cache_salt=f"after {seconds} {attempt}")
        return until(lambda: servers.lmcache_counter(STORED) >= before + WHOLE, 5)

    attempt = 0
    assert until(stored, 60), "KV is stored again"
    servers.forget()
    loaded = servers.vllm_counter(LOADED)
    for answer in [a for a in load.answers if a.salt != KNOWN][-6 * CLIENTS :]:
        assert servers.tokens(prompts[answer.number], cache_salt=answer.salt) == wanted[answer.number], answer
    assert servers.vllm_counter(LOADED) > loaded, "some of it was stored"
