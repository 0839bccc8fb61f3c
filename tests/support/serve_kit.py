"""Stand-ins for vLLM and LMCache as real processes that a test can let hang, end or resist.

    python serve_kit.py vllm PORT FOLDER

FOLDER is how a test and a stand-in talk. A test makes the files `hang` (no answers while it is there), `end` (holds an
exit status), `mode`. The stand-in appends to `pids` (its own, then those of two children, one in a session of its own)
and to `signals`. Nothing outside the standard library: it must start at once.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHUNK = 64


class Cache:
    """What our connector would find: whole chunks behind the first one, at any offset."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.known: set[tuple[int, ...]] = set()
        self.chunk = chunk

    def store(self, prompt: list[int], most: int) -> None:
        end = min(len(prompt), most)
        self.known |= {tuple(prompt[i : i + self.chunk]) for i in range(self.chunk, end - self.chunk + 1, self.chunk)}

    def exact(self, prompt: list[int]) -> int:
        """Whole chunks from the beginning; of the first one it is always there."""
        held = self.chunk
        while tuple(prompt[held : held + self.chunk]) in self.known:
            held += self.chunk
        return held

    def found(self, prompt: list[int]) -> int:
        position, tokens = self.chunk, 0
        while position + self.chunk <= len(prompt):
            hit = tuple(prompt[position : position + self.chunk]) in self.known
            tokens += self.chunk * hit
            position += self.chunk if hit else 1
        return tokens


class FakeServer:
    """Answers like vLLM or LMCache, as far as serve and doctor ask.

    Modes: "" (all well), "bare" (no connector), "unable" (one that cannot blend), "all" (it recomputes everything),
    "empty" (nothing is ever found), "wrong" (recomputing everything gives other tokens), "tie" (the same, where both
    are about equally likely), "unblended" (an LMCache of the default engine), "unregistered" (no rotary table), "half"
    (of one worker only), "ill" (not healthy), "misfit" (blocks of 48 tokens), "long" (chunks of 256 tokens, which only
    vLLM says), "full" (an index that is nearly so), "no index" (that shows no metrics), "unchecked" (says nothing of a
    self-check), "not checked" (skipped it), "strange" (JSON of another server), "key" (asks for one), "cached" and
    "uncached" (vLLM's prefix cache is on, or off), "cpu" (it computes on one: exact prefixes only).

    `facts` are what it publishes to be compared, `instances` what it knows as a coordinator.
    """

    def __init__(self, role: str, port: int = 0, mode: str = "", model: str = "tiny") -> None:
        self.role, self.mode, self.model = role, mode, model
        self.cache = Cache(256 if mode == "long" else CHUNK)
        self.hang = lambda: False
        self.requests: list[dict[str, Any]] = []
        self.hits = 0
        self.facts: dict[str, str] = {}
        self.instances: list[dict[str, Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                needs_key = outer.role == "lmcache" and outer.mode == "key" and self.path != "/healthcheck"
                if needs_key and self.headers.get("Authorization") != "Bearer secret":
                    return self._send(401, {"detail": "Invalid or missing API key"})
                return self._send(*outer.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.mode == "key" and self.headers.get("Authorization") != "Bearer secret":
                    return self._send(401, {"error": "Unauthorized"})
                return self._send(*outer.complete(body))

            def _send(self, status: int, body: Any) -> None:
                while outer.hang():
                    time.sleep(0.05)
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self._thread.join()
        self.http.server_close()

    def get(self, path: str) -> tuple[int, Any]:
        if self.role == "lmcache":
            status: dict[str, Any] = {"is_healthy": self.mode != "ill", "chunk_size": CHUNK, "registered_gpu_ids": [1]}
            if self.mode == "half":
                status["registered_gpu_ids"] = [1, 2]
            if self.mode != "unblended":
                status["registered_cb_rope_instances"] = [] if self.mode == "unregistered" else [1]
            if self.mode in ("two ranks", "one of two ranks"):
                status["registered_gpu_ids"] = [1, 2]
                status["registered_cb_rope_instances"] = [1, 2]
                facts = {"model_name": "some/model", "world_size": 2}
                status["cache_context_meta"] = {"1": facts, "2": facts} if self.mode == "two ranks" else {"1": facts}
            size = 4096
            numbers = {"index_entries": 4000 if self.mode == "full" else 40, "index_size": size}
            numbers |= {"chunks_asked_total": 2000, "chunks_found_total": 1500}
            lines = [f'lmcache_rag_{name}{{scope="lmcache_rag"}} {value}.0' for name, value in numbers.items()]
            if self.mode in ("full", "pinned"):
                gigabytes = 97 if self.mode == "full" else 25
                lines.append(f'lmcache_rag_pinned_bytes{{scope="lmcache_rag"}} {gigabytes}e+08')
                lines.append('lmcache_rag_pinned_limit_bytes{scope="lmcache_rag"} 1e+10')
                for name, value in (("tenant_bytes", 4e9), ("tenant_budget_bytes", 5e9), ("tenant_evicted_total", 7)):
                    lines.append(f'lmcache_rag_{name}{{scope="lmcache_rag",tenant="ac\\"me"}} {value}')
            pages: dict[str, Any] = {"/healthcheck": {"status": "healthy"}, "/status": status}
            if self.instances:
                pages |= {"/healthz": {}, "/instances": {"instances": self.instances}}
                pages["/directory/stats"] = {"blend": {"num_chunks": 1234}}
            if self.facts:
                lines.append(self._info("lmcache_rag_lmcache_info"))
            if self.mode != "no index":
                pages["/metrics"] = "\n".join(lines)
        else:
            card = {"id": self.model, "root": self.model, "max_model_len": 4096}
            pages = {
                "/health": "",
                "/version": {"version": "0.25.1"},
                "/v1/models": {"data": [] if self.mode == "strange" else [card]},
                "/metrics": f'vllm:cache_config_info{{block_size="{48 if self.mode == "misfit" else 16}",x="y"}} 1.0\n',
            }
            if self.mode in ("cached", "uncached"):
                caching = f'enable_prefix_caching="{self.mode == "cached"}"'
                pages["/metrics"] = f'vllm:cache_config_info{{block_size="528",{caching},x="y"}} 1.0\n'
            if self.mode != "uncounted":
                hits = self.hits if self.mode != "stuck" else 0
                pages["/metrics"] += f'vllm:lmcache_rag_prompt_tokens_total{{engine="0",source="reused"}} {hits}.0\n'
                pages["/metrics"] += 'vllm:lmcache_rag_prompt_tokens_total{engine="0",source="recomputed"} 7.0\n'
                costs = {"prefill_1024": 14.2, "prefill_8192": 105.0, "lookup_8192": 7.1}
                for name, ms in costs.items():
                    pages["/metrics"] += f'vllm:lmcache_rag_cost_ms{{cost="{name}",engine="0"}} {ms}\n'
                for tier, tokens in {"l1": 1881.0, "hot": 0.0}.items():
                    pages["/metrics"] += f'vllm:lmcache_rag_blended_from_tokens{{engine="0",tier="{tier}"}} {tokens}\n'
            if self.facts:
                pages["/metrics"] += self._info("vllm:lmcache_rag_server_info") + "\n"
            if self.mode == "long":
                pages["/metrics"] += 'vllm:lmcache_rag_chunk_tokens{engine="0"} 256.0\n'
        return (200, pages[path]) if path in pages else (404, {"detail": "Not Found"})

    def _info(self, name: str) -> str:
        labels = {"engine": "0", **self.facts}
        return f"{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in labels.items())}}} 1.0"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append(body)
        prompt, params = body["prompt"], body["kv_transfer_params"]
        blend = params.get("lmcache_rag.blend") != "off"
        ratio = params.get("lmcache_rag.ratio", 1.0 if self.mode == "all" else 0.15)
        found = self.cache.found(prompt) if blend and self.mode not in ("empty", "unable", "cpu") else 0
        exact = self.cache.exact(prompt) if self.mode == "cpu" else 0
        self.cache.store(prompt, params.get("lmcache.max_offload_tokens", len(prompt)))
        self.hits += found
        again = round(found * ratio)
        tokens = [(sum(prompt) + n) % 10000 for n in range(body["max_tokens"])]
        likely = -0.1 if self.mode == "tie" else -2.0
        top = [{f"token_id:{token}": -0.05, f"token_id:{token + 1}": likely} for token in tokens]
        if self.mode in ("wrong", "tie") and ratio == 1 and len(tokens) > 1:
            tokens[3] += 1
        statistics = {
            "prompt_tokens": len(prompt),
            "prefix_tokens": exact,
            "reused_tokens": found - again,
            "recomputed_tokens": again,
            "computed_tokens": len(prompt) - found,
            "lookup_ms": 1.0,
            "load_ms": 2.0,
            "blend_ms": 3.0,
            "policy": params.get("lmcache_rag.policy", "all" if self.mode == "all" else "query"),
            "ratio": ratio,
            "failure": "the server is full" if self.mode == "empty" else "",
        }
        if self.mode == "unable":
            why_not = {"failure": "sliding window attention is not supported", "reason": "attention"}
            statistics |= {**why_not, "can_blend": False}
        elif self.mode == "cpu":
            statistics |= {"failure": "it needs an NVIDIA GPU", "reason": "needs CUDA", "can_blend": False}
        elif self.mode not in ("bare", "unchecked"):
            statistics["self_check"] = "skipped" if self.mode == "not checked" else "passed"
        return 200, {
            "choices": [{"token_ids": tokens, "logprobs": {"top_logprobs": top}}],
            "kv_transfer_params": None if self.mode == "bare" else {"lmcache_rag": statistics},
        }


UNDEFINED = "cuda_ops.so: undefined symbol: _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb"
_MAIN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import serve_kit
serve_kit.main({role!r}, int(sys.argv[sys.argv.index({flag!r}) + 1]), Path({folder!r}))
"""


def fake_packages(folder: Path, *, cuda: str | None = "13.0", code: str = "print('hello')") -> Path:
    """A folder for PYTHONPATH with a PyTorch built for that CUDA, an LMCache with such an extension, and a vLLM.

    Their commands run the stand-ins of this module, with folders of their names in `folder`.
    """
    place, tests = folder / "packages", str(Path(__file__).parent)
    texts = {
        "torch/__init__.py": f"class version:\n    cuda = {cuda!r}\n__version__ = '2.13.0+cu130'\n",
        "lmcache/__init__.py": "print('LMCache logs something')\n",
        "lmcache/cuda_ops.py": f"{code}\n",
    }
    for role, where, flag in (("lmcache", "cli", "--http-port"), ("vllm", "entrypoints/cli", "--port")):
        program = _MAIN.format(tests=tests, role=role, flag=flag, folder=str(folder / role))
        texts[f"{role}/{where}/main.py"] = program
        texts[f"{role}-0.5.6.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {role}\nVersion: 0.5.6\n"
    texts["vllm/__init__.py"] = ""
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to whoever asks for any, so that no other test gets one in the meantime."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main(role: str, port: int, folder: Path) -> None:
    """A server process with two children, until it is told to end."""
    if (folder / "fail").exists():
        print(f"{role} cannot start: no such model", flush=True)
        raise SystemExit(5)
    stubborn = (folder / "stubborn").exists()

    def note(number: int, frame: object) -> None:
        with (folder / "signals").open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")
        if not stubborn:
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    child = [sys.executable, "-S", "-c", "import signal, time; time.sleep(600)"]
    deaf = [sys.executable, "-S", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    children = [subprocess.Popen(deaf if stubborn else child), subprocess.Popen(child, start_new_session=True)]
    with (folder / "pids").open("a") as file:
        file.write(" ".join(map(str, [os.getpid(), *(one.pid for one in children)])) + "\n")
    server = FakeServer(role, port, (folder / "mode").read_text() if (folder / "mode").exists() else "")
    server.hang = (folder / "hang").exists
    with server:
        print(f"{role} listens on {port}", flush=True)
        end = folder / "end"
        while not (end.exists() and end.read_text()):  # a test makes the file, and then writes to it
            time.sleep(0.02)
        print(f"{role} says its last words", flush=True)
        status = int(end.read_text())
        end.unlink()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
