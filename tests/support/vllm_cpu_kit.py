"""A real LMCache blend server and a real vLLM for CPUs with our connector, as processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from contract_kit import missing

from lmcache_rag.connector.server_guard import MODULE

BLOCK, CHUNK = 32, 64  # vLLM's CPU attention wants blocks of 32
BIN = Path(sys.executable).parent
SURROUNDINGS = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A server in a session of its own, so that all of it can be ended."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        path = f"{BIN}:{os.environ.get('PATH', '')}"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **SURROUNDINGS, "PATH": path, **environment},
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def engine_core(self) -> list[int]:
        """Process ids of vLLM's EngineCore, by the name that it gives itself."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self._process.pid and b"EngineCore" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def wait_for(self, ready: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert self.runs, f"{self.log.name}:\n{self.text[-4000:]}"
            assert time.monotonic() < end, f"not ready after {seconds:.0f} s; {self.log.name}:\n{self.text[-4000:]}"
            time.sleep(0.25)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


class Servers:
    """Both servers. `lmcache` may be killed, or come later.

    Args:
        model: Folder of the model.
        folder: For the logs.
        options: Of vLLM.
        late: LMCache is started by the test.
        connector: Settings of the connector.
        guarded: LMCache loads our module, as with `serve`; or the module's settings.
        tier: Folder of a second tier.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        late: bool = False,
        connector: dict[str, Any] | None = None,
        guarded: bool | dict[str, Any] = False,
        tier: Path | None = None,
        gigabytes: float = 1,
        lmcache: Sequence[str] = (),
    ) -> None:
        self.model, self._options, self._connector, self._guarded = model, options, connector or {}, guarded
        self._tier, self._more = tier, lmcache
        self.port, self.http = free_port(), free_port()
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self.client = httpx.Client(base_url=self.url, timeout=120)
        try:
            if not late:
                self.start_lmcache(gigabytes)
            self.vllm = Process(
                self._vllm(),
                folder / "vllm.log",
                VLLM_CPU_NUM_OF_RESERVED_CPU="0",
                VLLM_CPU_KVCACHE_SPACE="1",
                VLLM_SERVER_DEV_MODE="1",  # for reset_prefix_cache
                VLLM_NO_USAGE_STATS="1",
                HF_HUB_OFFLINE="1",
            )
            self.vllm.wait_for(lambda: answers(f"{self.url}/health"), 900)
        except BaseException:
            self.close()
            raise

    def start_lmcache(self, gigabytes: float = 1) -> None:
        self.lmcache = Process(self._lmcache(gigabytes), self._folder / "lmcache.log")
        self.lmcache.wait_for(lambda: answers(f"http://127.0.0.1:{self.http}/healthcheck"), 120)

    def close(self) -> None:
        self.client.close()
        for process in (getattr(self, "vllm", None), getattr(self, "lmcache", None)):
            if process is not None:
                process.kill()

    def _lmcache(self, gigabytes: float) -> list[str]:
        options = {
            "engine-type": "blend",
            "supported-transfer-mode": "auto",
            "chunk-size": CHUNK,
            "l1-size-gb": gigabytes,
            "eviction-policy": "LRU",
            "host": "localhost",
            "port": self.port,
            "http-host": "127.0.0.1",
            "http-port": self.http,
        }
        if self._guarded is not False:
            config = self._guarded if isinstance(self._guarded, dict) else {}
            options["server-module"] = json.dumps({"module_path": MODULE, "config": config})
        if self._tier is not None:
            options["l2-adapter"] = json.dumps({"type": "fs", "base_path": str(self._tier)})
        words = (str(word) for name, value in options.items() for word in (f"--{name}", value))
        return [str(BIN / "lmcache"), "server", *words, *self._more]

    def _vllm(self) -> list[str]:
        connector = {
            "kv_connector": "CacheBlendConnector",
            "kv_connector_module_path": "lmcache_rag.connector.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://localhost",
                "lmcache.mp.port": self.port,
                "lmcache.mp.mq_timeout": 10,
                "lmcache.mp.heartbeat_interval": 1,
                "lmcache_rag.chunk_size": CHUNK,
                **self._connector,
            },
        }
        options = {
            "model": self.model,
            "served-model-name": "smollm2",
            "dtype": "float32",
            "block-size": BLOCK,
            "max-model-len": 1024,
            "max-num-batched-tokens": 512,
            "max-num-seqs": 4,
            "host": "127.0.0.1",
            "port": self.url.rpartition(":")[2],
            "kv-transfer-config": json.dumps(connector),
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        return [*command, *words, *self._options]

    def complete(self, prompt: list[int], *, replica: int | None = None, **more: Any) -> dict[str, Any]:
        body = {
            "model": "smollm2",
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": {},
        }
        headers = {} if replica is None else {"X-data-parallel-rank": str(replica)}
        response = self.client.post("/v1/completions", json=body | more, headers=headers)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def tokens(self, prompt: list[int], **more: Any) -> list[int]:
        return list(self.complete(prompt, **more)["choices"][0]["token_ids"])

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, so that only LMCache can hit."""
        self.client.post("/reset_prefix_cache").raise_for_status()

    def lmcache_counter(self, name: str) -> float:
        return counter(f"http://127.0.0.1:{self.http}/metrics", name)

    def vllm_counter(self, name: str, **labels: str) -> float:
        return counter(f"{self.url}/metrics", name, **labels)

    def post(self, kind: str, **body: Any) -> httpx.Response:
        response = self.client.post(f"/v1/{kind}", json={"model": "smollm2", "temperature": 0} | body)
        assert response.status_code == 200, response.text
        return response

    def stream(self, kind: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of an answer."""
        *events, end = self.post(kind, stream=True, **body).text.strip().split("\n\n")
        assert end == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


def counter(url: str, name: str, **labels: str) -> float:
    """A Prometheus counter, all other labels added up; 0 before it first moved."""
    found = [line for line in httpx.get(url, timeout=5).text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in found if all(label in line for label in wanted))


def until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _is_cpu_build() -> bool:
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_vllm_cpu = pytest.mark.skipif(
    missing() or not _is_cpu_build(), reason="needs vllm-cpu and LMCache (.ci/install-vllm-cpu)"
)


@pytest.fixture(scope="session")
def servers(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One pair for all tests of a run."""
    json_only = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})  # SmolLM2 would write only that
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    strict = ("--tool-strict-level", "parameter", "--structured-outputs-config", json_only)
    pair = Servers(smollm2_path, tmp_path_factory.mktemp("servers"), *tools, *strict)
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def replicas(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One LMCache server, and two replicas of vLLM behind one address."""
    pair = Servers(smollm2_path, tmp_path_factory.mktemp("replicas"), "--data-parallel-size", "2")
    yield pair
    pair.close()
