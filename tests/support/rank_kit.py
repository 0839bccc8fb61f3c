"""One of several tensor-parallel ranks: a process of its own, with its share of the heads.

    python rank_kit.py RANK RANKS FOLDER

runs each scenario with the real worker side and writes what came of it to FOLDER/rankN.pt. vLLM's own groups connect
the ranks where vLLM is installed, else gloo behind the same functions.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import tiny_model
from worker_kit import BLOCK, Model, World

from lmcache_rag import policies
from lmcache_rag.budget import AutoRule
from lmcache_rag.connector import blend_pass, vllm_internals
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.engines.hf_model import HFModel

RANKS = 2
RULE = AutoRule(tail=0.4, per_chunk=2, per_prompt=4, most_per_chunk=60)  # for prompts as short as these
SCENARIOS: dict[str, dict[str, Any]] = {
    "query": {"policy": "query"},
    "hkvd": {"policy": "hkvd"},
    "auto": {"ratio": "auto"},
    "auto, hkvd": {"ratio": "auto", "policy": "hkvd", "background": True},
    "dead": {"fault": "dead"},
    "late": {"fault": "late"},
    "damaged": {"fault": "damaged key"},
    "damaged, hkvd": {"fault": "damaged value", "policy": "hkvd"},
    "repaired": {"fault": "damaged last value", "vllm_recomputes_bad_blocks": False},
    "background": {"background": True},
    "background, late": {"background": True, "fault": "late"},
    "background, damaged": {"background": True, "fault": "damaged last value"},
    "little memory": {"memory": 16},
    "little memory, late": {"memory": 16, "fault": "late"},
    "background, little memory": {"memory": 16, "background": True},
    "no memory": {"memory": 0},
    "background, hkvd, memory for its pieces": {"memory": 30, "policy": "hkvd", "background": True},
}


def connect(rank: int, ranks: int, folder: Path) -> str:
    """Connect the ranks; returns by whom."""
    meeting = f"file://{folder}/meeting"
    if importlib.util.find_spec("vllm") is not None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(ranks, rank, meeting, rank, "gloo")
            initialize_model_parallel(ranks)
        return "vLLM"

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed)
        return summed

    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    stand_in = types.ModuleType("vllm.distributed")
    stand_in.get_tensor_model_parallel_world_size = lambda: ranks  # type: ignore[attr-defined]
    stand_in.tensor_model_parallel_all_reduce = all_reduce  # type: ignore[attr-defined]
    group = types.SimpleNamespace(cpu_group=torch.distributed.group.WORLD)
    stand_in.get_tp_group = lambda: group  # type: ignore[attr-defined]
    sys.modules |= {"vllm": types.ModuleType("vllm"), "vllm.distributed": stand_in}
    return "gloo"


class RankModel(Model):
    """A worker's model on one rank; what ranks say to each other goes through the connector's own functions."""

    def __init__(self, model: Any, *, rank: int, ranks: int) -> None:
        super().__init__(model, layout="NHD", block=BLOCK, blocks=20, rank=rank, ranks=ranks)

    memory = 1 << 30  # tokens of a pass

    def has_memory(self, tokens: int, length: int) -> bool:
        return tokens <= self.memory

    def forward(self, ids: torch.Tensor, *given: Any) -> torch.Tensor:
        if len(ids) > self.memory:
            raise torch.OutOfMemoryError  # the other rank would wait for this one for ever
        return super().forward(ids, *given)

    def join(self, out: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(out) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, out.contiguous())
        return torch.cat(parts, 1)

    def sum_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        self.own_scores = scores.clone()
        summed: torch.Tensor = vllm_internals.tensor_parallel_sum(scores)
        return summed

    def all_ranks(self, fine: bool) -> bool:
        return vllm_internals.true_on_all_ranks(fine)


class Rank(World):
    """The worker of one rank, with a fault on the last rank only."""

    def __init__(self, hf: HFModel, rank: int, *, fault: str = "", policy: str = "query", **options: Any) -> None:
        self.rank, self.ranks = rank, RANKS
        background, memory = options.pop("background", False), options.pop("memory", 1 << 30)
        super().__init__(hf, fault if rank == RANKS - 1 else "", policy, chunk_size=20, **options)
        self.plan = replace(self.plan, background=background)
        if rank == RANKS - 1:
            self.model.memory = memory

    model: RankModel

    def make_model(self, hf: HFModel) -> RankModel:
        return RankModel(hf, rank=self.rank, ranks=self.ranks)

    def run(self) -> Any:
        if not self.plan.background:
            return super().run()
        self.worker.run([self.plan], Allowance(20))
        self.worker.finish()
        while not self.worker.take_received():
            self.worker.run([], Allowance(20))
            self.worker.finish()
        (result,) = self.worker.take_results()
        return result

    def outcome(self) -> dict[str, Any]:
        """What came of it, with the KV of this rank's heads."""
        chosen: list[torch.Tensor] = []
        select = blend_pass.select

        def selecting(*given: Any, **options: Any) -> Any:
            selected = select(*given, **options)
            chosen.append(selected.positions)
            return selected

        blend_pass.select = selecting
        try:
            result = self.run()
        finally:
            blend_pass.select = select
        own = getattr(self.model, "own_scores", None)
        return {
            "chosen": chosen[0].tolist() if chosen else [],
            "own scores": own,
            "reason": result.budget_reason,
            "failure": str(result.failure),  # a plain string: torch.load takes no other classes
            "counts": (result.prefix_tokens, result.reused_tokens, result.recomputed_tokens, result.computed_tokens),
            "passes": list(self.model.passes),
            "bad": sorted(self.worker.take_bad_blocks()),
            "kv": [self.model.read(self.sequence, layer, self.end) for layer in range(self.hf.layers)],
        }

    def runs_out_of_memory(self) -> str:
        """What happens to a rank whose memory does not do for a pass, against what it was told; only it takes part."""
        real = self.model.forward

        def forward(*given: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

        self.model.forward = forward  # type: ignore[method-assign]
        try:
            self.run()
        except torch.OutOfMemoryError as problem:
            return str(problem)
        finally:
            self.model.forward = real  # type: ignore[method-assign]
        return ""


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    policies.AUTO_RULES = dict.fromkeys(("query", "hkvd"), RULE)  # type: ignore[misc]
    hf = HFModel.wrap(tiny_model("llama"), None)
    found: dict[str, Any] = {"by": connect(rank, ranks, folder)}
    for name, options in SCENARIOS.items():
        found[name] = Rank(hf, rank, **options).outcome()
    found["memory gone in a pass"] = Rank(hf, rank).runs_out_of_memory()
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
