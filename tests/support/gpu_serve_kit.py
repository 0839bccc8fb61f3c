"""`lmcache-rag serve` on a GPU, and prompts of real text for it."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import torch
from vllm_cpu_kit import Process, answers, free_port

LACKING = not torch.cuda.is_available() or not all(map(importlib.util.find_spec, ("vllm", "lmcache")))
DATA = Path(__file__).parents[2] / "examples" / "data" / "documents"
PREFIX, TOKENS = 64, 48
ALL = {"lmcache_rag.policy": "query", "lmcache_rag.ratio": 1.0}


class Served:
    """The command, and prompts of real text in chunks."""

    def __init__(self, model: Path, folder: Path, *more: str) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.lmcache, self.health, self.tier = free_port(), free_port(), folder / "kv"
        url = f"http://127.0.0.1:{free_port()}"
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = " ".join(path.read_text() for path in sorted(DATA.rglob("*")) if path.suffix in (".txt", ".md"))
        ids = tokenizer.encode(text)
        self._rng = random.Random(0)
        self._prefix, self._gap = ids[:PREFIX], tokenizer.encode("\n\n")
        self._question = tokenizer.encode("\n\nQuestion: what do these passages say? Answer:")
        self.chunks = [ids[at : at + self._rng.randrange(200, 300)] for at in range(PREFIX, PREFIX + 300 * 20, 300)]
        options = f"--port {url.rpartition(':')[2]} --lmcache-port {self.lmcache} --lmcache-http-port {self.health}"
        options += f" --l2 {self.tier} --l1-gb 4 --max-model-len 8192"
        options += " --gpu-memory-utilization 0.05 --kv-cache-memory-bytes 2000000000"
        options += " --max-cudagraph-capture-size 2048"  # as several ranks get it: passes as padded graphs
        if "--dtype" not in more:
            options += " --dtype float32 --attention-backend TRITON_ATTN"
        self._client = httpx.Client(base_url=url, timeout=120)
        self.process = Process(
            [
                sys.executable,
                "-m",
                "lmcache_rag",
                "serve",
                str(model),
                *options.split(),
                *more,
                "--log-dir",
                str(folder),
            ],
            folder / "serve.log",
            CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            TRITON_F32_DEFAULT="ieee",
        )
        self.process.wait_for(lambda: answers(f"{url}/health"), 500)
        self.name = self._client.get("/v1/models").json()["data"][0]["id"]
        self.adapter = ""  # of the requests that follow

    def ask(
        self, prompt: list[int], tokens: int = TOKENS, salt: str = "", model: str = "", **params: Any
    ) -> tuple[list[int], Any]:
        """Greedy tokens, and what was reused."""
        body: dict[str, Any] = {
            "model": model or self.adapter or self.name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
        }
        body |= {"ignore_eos": True, "return_token_ids": True, "kv_transfer_params": params}
        answer = self._client.post("/v1/completions", json=body | ({"cache_salt": salt} if salt else {}))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["choices"][0]["token_ids"], (found.get("kv_transfer_params") or {}).get("lmcache_rag")

    def full(self, prompt: list[int]) -> list[int]:
        """The answer of a full prefill: the salt shares no KV with anything."""
        return self.ask(prompt, salt=f"full {self._rng.random()}", **{"lmcache_rag.blend": "off"})[0]

    def ingest(self) -> int:
        """As our client does; returns how many tokens were there already."""
        params = {"lmcache_rag.blend": "off", "lmcache_rag.ingest": True, "lmcache_rag.prefix": PREFIX}
        told = [self.ask(self._prefix + chunk, 1, **params)[1] for chunk in self.chunks]
        return sum(one["prefix_tokens"] for one in told)

    def prompt(self, prefix: list[int] | None = None) -> tuple[list[int], list[list[int]]]:
        """Four to eight chunks in random order, and where they stand."""
        prompt, spans = list(prefix or self._prefix), []
        for chunk in self._rng.sample(self.chunks, self._rng.randrange(4, 9)):
            spans.append([len(prompt), len(prompt) + len(chunk)])
            prompt += chunk + self._gap
        return prompt + self._question, spans

    def forget(self, *, force: bool = False) -> None:
        """LMCache lets go of what its memory holds; with force also of what is being read. Its second tier keeps it."""
        body = {"tier": "l1", "force": force}
        assert httpx.post(f"http://127.0.0.1:{self.health}/cache/clear", json=body, timeout=30).is_success

    def close(self) -> None:
        self.process.kill()
        self._client.close()

    def reused(self) -> bool:
        return bool(self.ask(self.prompt()[0], 1)[1]["reused_tokens"])

    def signal(self, number: int) -> None:
        """Send it to the LMCache server."""
        pattern = f"lmcache.cli.main server.*--port {self.lmcache}"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            os.kill(int(pid), number)


def parted(told: dict[str, Any], prompt: list[int]) -> bool:
    names = ("prefix_tokens", "reused_tokens", "recomputed_tokens", "computed_tokens")
    return sum(told[name] for name in names) == len(prompt)
