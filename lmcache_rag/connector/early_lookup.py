"""Look-ups that are sent before vLLM hashes a prompt, in the thread that receives requests.

vLLM hashes each block of a prompt before its scheduler gets the request, which takes 1 ms for 8,000 tokens and 7 for
31,000. LMCache's server can look the prompt up meanwhile. Such a look-up is only a message that was sent early: the
scheduler decides as ever whether the request is looked up, and in which namespace. It takes this look-up if it would
send the same, and aborts it if not.

The thread changes nothing of the scheduler's and waits for nothing of it. If it cannot tell at once that the scheduler
is going to look the request up, it sends nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector.authorization import checked, needs_key
from lmcache_rag.connector.request_state import RequestState
from lmcache_rag.protocol import INGEST_PRIORITY, ingests, pins, read_params

if TYPE_CHECKING:
    from lmcache_rag.connector.authorization import IngestKey
    from lmcache_rag.connector.gpu_chunks import PrefixCache
    from lmcache_rag.connector.lookup import SchedulerClient, SentLookup
    from lmcache_rag.connector.scheduler import BlendScheduler

log = logging.getLogger("lmcache_rag")

MOST = 4  # look-ups whose requests the scheduler has not got yet
# A thread of LMCache's client sends the message, and needs the GIL for that: hashing would keep it for up to 5 ms.
_HAND_OVER_S = 0.0002


class EarlyLookups:
    """Look-ups of requests that the scheduler has not got yet.

    `send` and `cancel` are called by the thread that receives requests, the others by the scheduler's.

    Args:
        scheduler: Which requests it looks up is read here.
        client: Sends the look-ups.
        chunk: Tokens of an LMCache chunk.
        prefix_cache: Knows the size of a block that vLLM hashes.
        ingest_key: What ingesting and forgetting need; None: nothing.
    """

    def __init__(
        self,
        scheduler: BlendScheduler,
        client: SchedulerClient,
        chunk: int,
        prefix_cache: PrefixCache,
        ingest_key: IngestKey | None = None,
    ) -> None:
        self._scheduler, self._client, self._chunk = scheduler, client, chunk
        self._prefix_cache, self._ingest_key = prefix_cache, ingest_key
        self._sent: dict[str, SentLookup] = {}
        self._lost: deque[SentLookup] = deque()  # their requests will not come

    # -- the thread that receives requests ----------------------------------------------------------------------------

    @staticmethod
    def yield_to_questions(request: Any) -> None:
        """Give a request that ingests, forgets or pins a low priority, before vLLM queues it.

        It is done here, for the requests of all clients: these do not know whether a server schedules by priority, and
        one that does not rejects requests that name one.

        Args:
            request: vLLM's EngineCoreRequest.
        """
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if needs_key(extra.get("kv_transfer_params")):
            request.priority = max(request.priority, INGEST_PRIORITY)

    def send(self, request: Any) -> None:
        """Look a request up, if the scheduler is going to. Never raises.

        Args:
            request: vLLM's EngineCoreRequest.
        """
        if len(self._sent) >= MOST:
            return
        try:
            sent = self._look_up(request)
        except Exception:  # the scheduler changed what was read, or the request is invalid: the scheduler decides
            log.debug("A look-up was not sent early", exc_info=True)
            return
        if sent is not None:
            self._sent[request.request_id] = sent
            time.sleep(_HAND_OVER_S)

    def cancel(self, request_id: str) -> None:
        """The scheduler will not get this request."""
        if (sent := self._sent.pop(request_id, None)) is not None:
            self._lost.append(sent)

    def _look_up(self, request: Any) -> SentLookup | None:
        scheduler, prompt = self._scheduler, request.prompt_token_ids
        if not scheduler.can_blend() or not self._can_hit(request):
            return None
        extra = request.sampling_params.extra_args or {}
        params, wrong = checked(
            extra.get("kv_transfer_params"), prompt, self._prefix_cache.block_size, self._ingest_key
        )
        options = scheduler.options
        asked, _ = read_params(params, options.policy, options.ratio, options.blend)
        if wrong or asked.forget or ingests(params) or pins(params) is not None or not asked.blend:
            return None
        state = RequestState(asked.policy, asked.budget, blend=True, always=asked.always, prompt=len(prompt))
        if not scheduler.window.has_place(len(prompt), time.perf_counter()):
            return None
        if not scheduler.gate.may_gain(params, state, busy=not scheduler.budget.idle):
            return None
        if scheduler.gpu_chunks and scheduler.gpu_chunks.may_be_enough(params, prompt):
            return None  # vLLM itself seems to have it: the scheduler does not ask LMCache then
        return self._client.look_up_early(request, params or {})

    def _can_hit(self, request: Any) -> bool:
        """As request_state.can_hit, before vLLM has made its own request. One with a LoRA adapter is left to that."""
        prompt, sampling = request.prompt_token_ids, request.sampling_params
        if sampling is None or prompt is None or len(prompt) <= self._chunk:
            return False
        if request.mm_features or request.prompt_embeds is not None or request.lora_request is not None:
            return False
        other = sampling.skip_reading_prefix_cache or getattr(request, "abort_immediately", False)
        return not other and not getattr(request, "resumable", False)

    # -- the scheduler's thread ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def taken(self, request_id: str) -> Iterator[SentLookup | None]:
        """A `with` block in which the scheduler takes a request's look-up, if one was sent; if not, it is aborted."""
        sent = self._sent.pop(request_id, None)
        try:
            yield sent
        finally:
            self.abort(sent)

    def abort_lost(self) -> None:
        """Abort look-ups whose requests did not come in time; called in every step."""
        before = time.perf_counter() - self._scheduler.options.lookup_deadline
        for request_id, sent in list(self._sent.items()) if self._sent else ():
            if sent.at < before:
                self.cancel(request_id)
        while self._lost:
            self.abort(self._lost.popleft())

    def abort(self, sent: SentLookup | None) -> None:
        """Abort a look-up that the scheduler has not taken; another one of this request can start after that.

        LMCache's server knows look-ups by their requests: while one is in flight, another would get its result.
        """
        if sent is not None and not sent.used:
            sent.used = True
            self._scheduler.window.aborted.add(sent.lookup, time.perf_counter(), 0.0)

    def __len__(self) -> int:
        return len(self._sent) + len(self._lost)
