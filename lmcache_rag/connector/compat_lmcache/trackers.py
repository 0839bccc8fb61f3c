"""What LMCache's connector knows of a request, where a request must not decide it."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any


def plain_tracker(request: Any) -> Any:
    """A tracker of a request of which nothing is read but its tokens; LMCache's own could not be made."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestTracker

    return LMCacheMPRequestTracker(
        SimpleNamespace(
            request_id=request.request_id,
            cache_salt=None,
            sampling_params=None,
            all_token_ids=request.all_token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            mm_features=[],
        )
    )


def to_be_loaded(trackers: Iterable[Any]) -> list[Any]:
    """Trackers of requests whose load is asked for in this step."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    return [tracker for tracker in trackers if tracker.state == LMCacheMPRequestState.WAITING_FOR_LOAD]


def empty_step(again: Iterable[Any]) -> Any:
    """Metadata of a step in which nothing is stored or loaded; the loads of these trackers are asked for in the next.

    The workers see to stores under way before anything else: a preempted request's blocks may be among the step's.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPConnectorMetadata, LMCacheMPRequestState

    for tracker in again:
        tracker.state = LMCacheMPRequestState.WAITING_FOR_LOAD
    metadata = LMCacheMPConnectorMetadata()
    metadata.need_flush_before_forward = True
    return metadata
