"""What is wrapped in vLLM's own processes: its worker, its scheduler."""

from __future__ import annotations

import functools
import os
from typing import Any

from lmcache_rag.connector.compat_vllm.last_token import offer_hidden_state

_workers: dict[int, Any] = {}  # the worker of this process, by its process id: forked processes have their own


def remember_workers() -> None:
    """Wrap Worker.load_model so that `worker` finds the worker that loaded the model. Safe to call twice."""
    from vllm.v1.worker.gpu_worker import Worker

    load = Worker.load_model
    if getattr(load, "_lmcache_rag", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        _workers[os.getpid()] = self
        return result

    load_model._lmcache_rag = True  # type: ignore[attr-defined]
    Worker.load_model = load_model


def worker() -> Any:
    """The worker of this process, or None when none has loaded a model."""
    return _workers.get(os.getpid())


def in_multi_connector() -> bool:
    """Whether this worker's connector is vLLM's MultiConnector, and ours one of several inside it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    return has_kv_transfer_group() and isinstance(get_kv_transfer_group(), MultiConnector)


def deliver_worker_meta_first() -> None:
    """Wrap Scheduler.update_from_output: the connector gets what its workers measured before requests are finished.

    vLLM hands it over after that, so that a request whose only step was its blend would be answered without it. A
    connector takes part by having `take_worker_meta(meta)`. Safe to call twice.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    update = Scheduler.update_from_output
    if getattr(update, "_lmcache_rag", False):
        return

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        take = getattr(getattr(self, "connector", None), "take_worker_meta", None)
        if take is not None:
            output = getattr(model_runner_output, "kv_connector_output", None)
            meta = getattr(output, "kv_connector_worker_meta", None)
            if meta is not None:
                take(meta)
        return update(self, scheduler_output, model_runner_output)

    update_from_output._lmcache_rag = True  # type: ignore[attr-defined]
    Scheduler.update_from_output = update_from_output


def begin_before_the_step() -> None:
    """Wrap Worker.execute_model: the connector may begin before vLLM has prepared its step's inputs.

    start_load_kv comes behind that, 5 to 8 ms later, in which the GPU would have nothing to do. A connector takes part
    by having `begin_step(meta)`. Not where vLLM is going to write to blocks first. Safe to call twice.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.v1.worker.gpu_worker import Worker

    execute = Worker.execute_model
    if getattr(execute, "_lmcache_rag", False):
        return

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        meta = getattr(scheduler_output, "kv_connector_metadata", None)
        writes = ("new_block_ids_to_zero", "kv_cache_block_copies")
        if (
            meta is not None
            and has_kv_transfer_group()
            and not any(getattr(scheduler_output, name, None) for name in writes)
        ):
            begin = getattr(get_kv_transfer_group(), "begin_step", None)
            if begin is not None:
                begin(meta)
        try:
            return execute(self, scheduler_output)
        finally:
            offer_hidden_state(None)

    execute_model._lmcache_rag = True  # type: ignore[attr-defined]
    Worker.execute_model = execute_model
