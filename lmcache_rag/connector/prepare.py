"""What a worker does before the first request, so that none waits for it: it sees whether it can blend, and gets ready.

Whatever goes wrong here is a reason not to blend. vLLM starts, and serves as it does without this project.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lmcache_rag.connector import compat_lmcache, compat_vllm, passed
from lmcache_rag.connector.model_runner import VLLMModel, rotary_of, takes_reports, why_not
from lmcache_rag.connector.self_check import CheckedModel, examined
from lmcache_rag.connector.worker import WorkerSide
from lmcache_rag.protocol import CannotBlend, SelfCheck, Unsupported

if TYPE_CHECKING:
    from lmcache_rag.connector.hot_copy import HotCopy
    from lmcache_rag.connector.options import ConnectorOptions

    Parts = tuple[VLLMModel, compat_lmcache.WorkerLink, HotCopy | None]

log = logging.getLogger("lmcache_rag")

T = TypeVar("T")


class Prepared(NamedTuple):
    """What came of it.

    Attributes:
        side: The worker side; None where it cannot blend.
        why_not: Why it cannot; None where it can.
        self_check: Whether a blend was compared with a full prefill; None where it cannot blend.
    """

    side: WorkerSide | None
    why_not: Unsupported | None
    self_check: SelfCheck | None = None


class _Cannot(Exception):  # noqa: N818 - no error: a reason that is known
    """Blending is not possible here."""

    def __init__(self, reason: Unsupported) -> None:
        super().__init__(str(reason))
        self.reason = reason


def prepared(vllm_config: Any, adapter: Any, options: ConnectorOptions, *, absent: bool = False) -> Prepared:
    """A worker that blends, or why it does not. All tensor-parallel ranks do or none does.

    Args:
        vllm_config: vLLM's configuration.
        adapter: LMCache's worker adapter, its KV caches registered.
        options: The connector's.
        absent: Whether LMCache's server does not answer yet: it is asked, and told, when it does.
    """
    worker = compat_vllm.worker()
    if worker is None:
        detail = "the lmcache_rag plugin is not loaded in this process (VLLM_PLUGINS leaves it out?)"
        return Prepared(None, Unsupported(CannotBlend.NO_PLUGIN, detail))
    parts, reason = _tried(lambda: _parts(vllm_config, worker.model_runner, adapter, options, absent))
    # What comes next is done by all ranks together: who did without would keep the others waiting.
    if not compat_vllm.true_on_all_ranks(parts is not None) or parts is None:
        return Prepared(None, reason or Unsupported(CannotBlend.OTHER_RANK, "another rank cannot blend"))
    side, reason = _tried(lambda: _side(vllm_config, parts, options))
    if side is None:
        return Prepared(None, reason)
    return Prepared(side, None, SelfCheck.PASSED if options.self_check else SelfCheck.SKIPPED)


def _tried(work: Callable[[], T]) -> tuple[T | None, Unsupported | None]:
    try:
        return work(), None
    except _Cannot as known:
        return None, known.reason
    except Exception as problem:
        log.warning("Getting ready to blend failed", exc_info=True)
        detail = f"getting ready failed: {type(problem).__name__}: {problem}"
        return None, Unsupported(CannotBlend.ERROR, detail)


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
    if detail := link.register_rope(rotary.cos_sin_cache, rotary.head_size, rotary.is_neox_style):
        raise _Cannot(Unsupported(CannotBlend.LMCACHE_ROPE, detail))
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
    if options.self_check:
        if reason := self_checked(vllm_config, blendable, compat_vllm.true_on_all_ranks):
            raise _Cannot(reason)
    else:
        log.warning("Blends are not compared with a full prefill: lmcache_rag.self_check is off")
    compat_vllm.begin_before_the_step()
    compat_vllm.take_hidden_states()
    return WorkerSide(blendable, link, may_report=takes_reports(vllm_config), hot=hot, piece=options.step_tokens)


def self_checked(vllm_config: Any, model: CheckedModel, on_all_ranks: Callable[[bool], bool]) -> Unsupported | None:
    """Why a blend must not be trusted on this model and build; None where it equals a full prefill.

    Args:
        vllm_config: vLLM's configuration.
        model: Ready to blend.
        on_all_ranks: Whether something is true on all tensor-parallel ranks; each has to ask.
    """
    name = passed.name_of(vllm_config)
    if on_all_ranks(passed.is_known(name)):
        log.info("Self-check: passed at an earlier start of this model and build")
        return None
    begun, reason = time.perf_counter(), None
    try:
        config = vllm_config.model_config
        findings = examined(model, vocabulary=int(config.get_vocab_size()), longest=int(config.max_model_len))
        wrong = [finding for finding in findings if not finding.holds]
    except Exception as problem:
        log.exception("The self-check could not run")
        detail = f"the self-check at start could not run: {type(problem).__name__}: {problem}"
        reason = Unsupported(CannotBlend.SELF_CHECK_ERROR, detail)
    else:
        for finding in findings:
            log.debug("Self-check: %s", finding)
        if wrong:
            detail = f"the self-check at start failed: {'; '.join(map(str, wrong))}"
            reason = Unsupported(CannotBlend.SELF_CHECK, detail)
    if not on_all_ranks(reason is None) and reason is None:
        reason = Unsupported(CannotBlend.OTHER_RANK, "the self-check at start failed on another rank")
    if reason is not None:
        log.error("BLENDING IS OFF: %s. Prompts are computed in full.", reason)
        return reason
    log.info("Self-check: passed, a blend equals a full prefill (%.1f s)", time.perf_counter() - begun)
    passed.remember(name)
    return None
