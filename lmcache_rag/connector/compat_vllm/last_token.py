"""A prompt's last token computed by a blend: vLLM's own pass over it is left out.

A pass over one token takes as long as reading all weights. A step that has nothing else to do but that token, which the
blend before it computed with its last piece, needs none.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger("lmcache_rag")

_offered: list[Any] = []  # at most one; a worker's steps come one after another


def offer_hidden_state(hidden: Any) -> None:
    """Of the one token that the worker's step computes, [1, width]; None: there is none. Ends with the step."""
    _offered[:] = [] if hidden is None else [hidden]


def take_hidden_states() -> None:
    """Wrap ModelCudaGraphManager.run_fullgraph: it gives what is offered, and replays its graph where nothing is.

    vLLM runs one token as such a graph in its default settings; in others (eager, the older model runner) it computes
    the token once more. Safe to call twice, and does nothing where vLLM has no such class.
    """
    try:
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    except ImportError:
        return
    run = ModelCudaGraphManager.run_fullgraph
    if getattr(run, "_lmcache_rag", False):
        return

    @functools.wraps(run)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        states = getattr(self, "hidden_states", None)
        if not _offered or states is None or self.use_aux_hidden_state_outputs:
            return run(self, desc)
        log.debug("This step's only token was computed with its blend")
        states[:1].copy_(_offered.pop())
        return states[: desc.num_tokens]

    run_fullgraph._lmcache_rag = True  # type: ignore[attr-defined]
    ModelCudaGraphManager.run_fullgraph = run_fullgraph
