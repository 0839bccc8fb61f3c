"""What a worker does before the first request, so that none waits for it: it sees whether it can blend, and gets ready.

Whatever goes wrong here is a reason not to blend. vLLM starts, and serves as it does without this project.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_rag.connector import compat_lmcache, compat_vllm
from lmcache_rag.connector.model import VLLMModel, rotary_of, takes_reports, why_not
from lmcache_rag.connector.worker_side import WorkerSide

if TYPE_CHECKING:
    from lmcache_rag.connector.hot_copy import HotCopy
    from lmcache_rag.connector.options import ConnectorOptions

    Parts = tuple[VLLMModel, compat_lmcache.WorkerLink, HotCopy | None]

log = logging.getLogger("lmcache_rag")

T = TypeVar("T")


class _Cannot(Exception):  # noqa: N818 - no error: a reason that is known
    """Blending is not possible here."""


def prepared(
    vllm_config: Any, adapter: Any, options: ConnectorOptions, *, absent: bool = False
) -> tuple[WorkerSide | None, str]:
    """A worker that blends, or None and why it does not. All tensor-parallel ranks do or none does.

    Args:
        vllm_config: vLLM's configuration.
        adapter: LMCache's worker adapter, its KV caches registered.
        options: The connector's.
        absent: Whether LMCache's server does not answer yet: it is asked, and told, when it does.
    """
    worker = compat_vllm.worker()
    if worker is None:
        return None, "the lmcache_rag plugin is not loaded in this process (VLLM_PLUGINS leaves it out?)"
    parts, reason = _tried(lambda: _parts(vllm_config, worker.model_runner, adapter, options, absent))
    # What comes next is done by all ranks together: who did without would keep the others waiting.
    if not compat_vllm.true_on_all_ranks(parts is not None) or parts is None:
        return None, reason or "another rank cannot blend"
    return _tried(lambda: _side(vllm_config, parts, options))


def _tried(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except _Cannot as known:
        return None, str(known)
    except Exception as problem:
        log.warning("Getting ready to blend failed", exc_info=True)
        return None, f"getting ready failed: {type(problem).__name__}: {problem}"


def _parts(vllm_config: Any, runner: Any, adapter: Any, options: ConnectorOptions, absent: bool) -> Parts:
    """What one rank does by itself."""
    model = runner.get_model()
    get = vllm_config.kv_transfer_config.get_from_extra_config
    parallel = adapter.parallel_strategy
    address = compat_lmcache.address(get, parallel.vllm_worker_id, parallel.vllm_world_size)
    link = compat_lmcache.WorkerLink(adapter, options.deadline, address, absent=absent)
    if reason := link.why_not() or why_not(vllm_config, model):
        raise _Cannot(reason)
    rotary = rotary_of(model)
    if reason := link.register_rope(rotary.cos_sin_cache, rotary.head_size, rotary.is_neox_style):
        raise _Cannot(reason)
    blendable = VLLMModel(vllm_config, runner)
    blendable.warm_up()
    hot = blendable.hot_copy() if options.hot else None
    if hot is not None:
        hot.warm_up()
    return blendable, link, hot


def _side(vllm_config: Any, parts: Parts, options: ConnectorOptions) -> WorkerSide:
    """What all ranks do together."""
    blendable, link, hot = parts
    blendable.capture()
    compat_vllm.begin_before_the_step()
    compat_vllm.take_hidden_states()
    return WorkerSide(blendable, link, may_report=takes_reports(vllm_config), hot=hot, piece=options.step_tokens)
