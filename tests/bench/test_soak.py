"""bench soak: does it notice what fails, what differs, and what stays behind?

Over a server without a model, whose answers are always the same text, whatever is reused.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_vllm import FakeVLLM
from openai_kit import vllm_serving
from soak_kit import AT_REST, GAUGES, MEMORY, STATUS
from typer.testing import CliRunner

from lmcache_rag.bench import soak as soak_module
from lmcache_rag.bench.exact import Trace, TracedServer
from lmcache_rag.bench.soak import Soak, SoakReport
from lmcache_rag.cli.app import app
from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.engines.vllm import VLLMEngine
from lmcache_rag.prompt import PromptBuilder


@pytest.fixture
def server(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    """vLLM and LMCache at one address; nothing stays behind in them."""
    monkeypatch.setattr(soak_module, "SETTLE_S", 0.5)
    monkeypatch.setattr(soak_module, "LEAST", 120)  # enough for some of each kind
    with vllm_serving(tokenizer) as server:
        server.gauges, server.status = dict(GAUGES), copy.deepcopy(STATUS)
        yield server


def told(body: dict[str, Any]) -> dict[str, Any]:
    return body.get("kv_transfer_params") or {}


def test_a_soak_counts_every_kind(server: FakeVLLM, tmp_path: Path, sentences: list[str]) -> None:
    documents = tmp_path / "docs"
    documents.mkdir()
    for i in range(14):
        (documents / f"{i}.txt").write_text(" ".join(sentences[6 * i :][:6]))
    arguments = ["bench", "soak", str(documents), "--engine", server.url, "--lmcache-url", f"{server.url}/"]
    arguments += ["--seconds", "1", "--chunk-tokens", "128", "--watch", str(os.getpid()), "--may-grow", "500", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--disturb", f"touch {tmp_path / 'done'}"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "done").exists()
    assert set(report["requests"]) == {"blended", "ratio 1", "unblended", "aborted"}
    assert report["reused"] > 0
    assert report["failed"] == []
    assert report["gauges"] == AT_REST
    assert report["may_grow_mb"] == 500
    assert len(report["memory_mb"][str(os.getpid())]) == 2
    assert all(size > 100 for size in report["memory_mb"][str(os.getpid())])

    server.status = None
    result = CliRunner().invoke(app, arguments[:-1])
    assert result.exit_code == 1
    assert "lmcache:active_prefetch_jobs at the end: not reported" in result.stdout


def test_a_soak_reports_failures_and_other_answers(server: FakeVLLM, tokenizer: Any, corpus: list[str]) -> None:
    engine = VLLMEngine(server.url, tokenizer=tokenizer)
    source = TracedServer(engine, PromptBuilder(engine.tokenizer, engine.info))
    source.keep(corpus)
    soak = Soak(source, corpus, tokens=4, lmcache_url=server.url)
    sound = soak.run(0.1)
    assert (sound.sound, sound.differing) == (True, [])
    blended = [tuple(body["prompt"]) for body in server.seen if told(body).get("lmcache_rag.blend") != "off"]
    assert len(blended) == len(set(blended)), "a prompt that is asked again is one exact prefix"
    in_full = [tuple(body["prompt"]) for body in server.seen if told(body).get("lmcache_rag.ratio") == 1.0]
    followed = {tuple(body["prompt"]) for body in server.seen if told(body).get("lmcache_rag.blend") == "off"}
    assert set(in_full) <= followed, "its full prefill is asked for behind it"
    cold = TracedServer(engine, source.prompts, named=False)
    prompt = source.prompts.query(corpus[:3], "What?")
    for each, names in ((source, True), (cold, False)):
        each.trace(prompt, BlendOptions("query", 0.15), 2)
        assert ("lmcache_rag.chunks" in told(server.seen[-1])) == names
    other = Trace((1, 2, 3, 4), tuple({token: -0.1} for token in (1, 2, 3, 4)))
    soak.full = dict.fromkeys(soak.full, other)
    server.fail = [500, 500, 500]
    report = soak.run(0.1)
    engine.close()
    assert len(report.failed) == 3
    assert {each["kind"] for each in report.differing} == {"unblended"}
    assert not report.sound


# -- what stays behind --------------------------------------------------------------------------------------------


def settled(server: FakeVLLM, seconds: float = 0.0) -> SoakReport:
    async def read() -> dict[str, float | None]:
        async with httpx.AsyncClient(base_url=server.url) as http:
            return await soak_module.settled(http, server.url, seconds=seconds)

    return SoakReport(gauges=asyncio.run(read()))


def test_nothing_left_is_sound(server: FakeVLLM) -> None:
    report = settled(server, seconds=30)  # and does not wait for long
    assert (report.sound, report.gauges) == (True, AT_REST)


@pytest.mark.parametrize("name", soak_module.VLLM_GAUGES)
def test_what_vllm_still_holds_is_not_sound(server: FakeVLLM, name: str) -> None:
    server.gauges[name] = 0.25
    report = settled(server)
    assert (report.sound, report.left) == (False, {name: 0.25})


@pytest.mark.parametrize("place", soak_module.LMCACHE_GAUGES)
def test_what_lmcache_still_holds_is_not_sound(server: FakeVLLM, place: str) -> None:
    server.status["storage_manager"]["l1_managers"]["another"] = dict(MEMORY)
    *way, last = place.replace("*", "another").split(".")
    at = server.status
    for step in way:
        at = at[step]
    at[last] = 2
    report = settled(server)
    assert (report.sound, report.left) == (False, {f"lmcache:{place}": 2.0})
    del at[last]
    report = settled(server)
    assert (report.sound, report.left, report.unknown) == (False, {}, [f"lmcache:{place}"])


def test_what_nobody_says_is_not_sound(server: FakeVLLM) -> None:
    server.gauges = {}
    report = settled(server)
    assert (report.sound, report.unknown) == (False, list(soak_module.VLLM_GAUGES))
    server.gauges, server.status = dict(GAUGES), None
    report = settled(server)
    assert (report.sound, report.unknown) == (False, [f"lmcache:{place}" for place in soak_module.LMCACHE_GAUGES])
    server.status = {"detail": "another server"}
    assert settled(server).unknown == report.unknown
    del server.gauges["vllm:kv_cache_usage_perc"]
    assert settled(server).unknown[0] == "vllm:kv_cache_usage_perc"
    assert not SoakReport().sound, "nobody was asked"


def test_what_ends_a_moment_later_did_not_stay(server: FakeVLLM) -> None:
    server.status["active_prefetch_jobs"] = 1
    timer = threading.Timer(0.7, lambda: server.status.update(active_prefetch_jobs=0))
    timer.start()
    assert settled(server, seconds=30).sound
    timer.join()


@pytest.mark.parametrize(
    ("sizes", "sound"),
    [
        ([100.0, 163.0], True),
        ([100.0, 165.0], False),
        ([300.0, 100.0], True),
        ([100.0, 0.0], False),
        ([0.0, 0.0], False),
    ],
)
def test_a_process_that_grows_or_ends_is_not_sound(sizes: list[float], sound: bool) -> None:
    report = SoakReport(gauges=dict(AT_REST), memory_mb={1: [100.0, 100.0], 2: sizes})
    assert report.sound == sound
    assert list(report.grown) == ([] if sound else [2])
    assert report.as_dict()["grown"] == report.grown


def test_resident_memory_is_that_of_the_process() -> None:
    code = "data = b'x' * 80_000_000; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 80 < soak_module.resident_mb(process.pid) < 160
        process.communicate(b"\n")
    assert soak_module.resident_mb(process.pid) == 0


@pytest.mark.parametrize(
    ("unblended", "ratio_1", "sound"),
    [
        ([], [], True),
        ([], [0.3], False),  # nothing says that the server differs from itself by so much
        ([0.375, 0.3], [0.375, -0.3], True),
        ([0.3], [0.375], False),
        ([0.375], [None], False),  # the other token was not even among the likeliest
        ([0.375, None], [], False),
        ([3.0], [2.5], False),  # such a server is wrong without any blending
    ],
)
def test_answers_are_measured_by_the_servers_own_noise(
    unblended: list[float | None], ratio_1: list[float | None], sound: bool
) -> None:
    report = SoakReport(gauges=dict(AT_REST))
    report.differing = [{"kind": "unblended", "place": 1, "gap": gap} for gap in unblended]
    report.differing += [{"kind": "ratio 1", "place": 1, "gap": gap} for gap in ratio_1]
    assert report.sound == sound
    assert report.as_dict()["sound"] == sound


def test_the_example_does_not_kill_the_bench_itself() -> None:
    """pkill -f looks at whole command lines, and the bench's own holds the pattern."""
    shown = CliRunner().invoke(app, ["bench", "soak", "--help"]).output
    assert 'pkill -9 -f "[l]mcache.cli.main server"' in " ".join(shown.split())  # however wide the screen
