"""Every request's kv_transfer_params are checked in the API server, before the engine sees them.

Patches, for vLLM 0.25.1 to 0.33:

- InputProcessor.process_inputs, through which every request enters the engine, also of the offline `LLM`. What it
  raises ends in status 400, in a stream in an event.
- What answers each endpoint that takes kv_transfer_params: there a stream gets a status, too, and nothing is rendered
  for what is refused. Beam search hands none to its requests, so it is checked there only.
- BeamSearchOnlineMixin.beam_search: its requests, one for each beam and token, are not blended.
- AsyncLLM.notify_kv_transfer_request_rejected: nothing is handed on. It submits an aborted request with the
  kv_transfer_params of a refused one, for connectors of disaggregated prefill.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from lmcache_rag.connector.compat_vllm.streams import API_SERVER
from lmcache_rag.protocol import NO_BLEND, accepted

PARAMS = "kv_transfer_params"
_VLLM_KEYS = ("prompt_token_ids",)  # vLLM's own: its chat takes the prompt from it, and hands it on to nothing
ENDPOINTS = (
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "create_completion"),
    # Of it are Anthropic's messages and Cohere's chats as well.
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    ("vllm.entrypoints.openai.chat_completion.batch_serving", "OpenAIServingChatBatch", "create_batch_chat_completion"),
    ("vllm.entrypoints.openai.responses.serving", "OpenAIServingResponses", "create_responses"),
    ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens"),
)
_ENGINES = ("vllm.v1.engine.async_llm", "vllm.v1.engine.llm_engine")  # one of them is there where requests come in

Make = Callable[[Any], Any]  # vllm_config -> a RequestValidation, or None


def validate_requests(make: Make) -> None:
    """Have requests checked. Safe to call twice. Does nothing in a process that takes none.

    Args:
        make: Makes the RequestValidation of an engine from its configuration; None: its requests are not checked.
    """
    serves = API_SERVER in sys.modules
    if not serves and not any(name in sys.modules for name in _ENGINES):
        return
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(InputProcessor, "process_inputs", functools.partial(_checking_inputs, make=make))
    if not serves:
        return
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.async_llm import AsyncLLM

    _wrap(AsyncLLM, "notify_kv_transfer_request_rejected", _notifying_nothing)
    _wrap(BeamSearchOnlineMixin, "beam_search", _unblended_beams)
    for module, owner, name in ENDPOINTS:
        _wrap(getattr(importlib.import_module(module), owner), name, functools.partial(_checking, make=make))


def _wrap(owner: type, name: str, wrapper: Callable[[Any], Any]) -> None:
    stock = getattr(owner, name)
    if not getattr(stock, "_lmcache_rag", False):
        wrapped: Any = functools.wraps(stock)(wrapper(stock))
        wrapped._lmcache_rag = True
        setattr(owner, name, wrapped)


def _validation(inputs: Any, make: Make) -> Any:
    """The RequestValidation of an InputProcessor's engine."""
    try:
        return inputs._lmcache_rag_validation
    except AttributeError:
        inputs._lmcache_rag_validation = made = make(inputs.vllm_config)
        return made


def _checking_inputs(process: Callable[..., Any], *, make: Make) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        sampling = request.sampling_params
        extra = sampling.extra_args if sampling is not None else None
        if not extra or extra.get(PARAMS) is None:
            return request
        validation = _validation(self, make)
        if validation is None:
            return request
        from vllm.exceptions import VLLMValidationError

        prompt, embeds = request.prompt_token_ids, request.prompt_embeds
        tokens = len(prompt) if prompt is not None else len(embeds) if embeds is not None else 0
        if refusal := validation.refusal(extra[PARAMS]):
            raise VLLMValidationError(refusal.message, parameter=PARAMS)
        request.sampling_params = copy.copy(sampling)  # it may be the caller's own
        request.sampling_params.extra_args = {**extra, PARAMS: validation.for_engine(extra[PARAMS], prompt, tokens)}
        return request

    return process_inputs


def _checking(create: Callable[..., Any], *, make: Make) -> Callable[..., Any]:
    async def checking(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        params = getattr(request, PARAMS, None)
        if params is not None and (validation := _validation(self.engine_client.input_processor, make)):
            beams = bool(getattr(request, "use_beam_search", False))
            if refusal := validation.refusal(params, _prompt_tokens(request), beams=beams):
                status = HTTPStatus(refusal.status)
                kind = {} if status == HTTPStatus.BAD_REQUEST else {"err_type": status.phrase, "status_code": status}
                return self.create_error_response(refusal.message, param=PARAMS, **kind)
            own = {key: params[key] for key in _VLLM_KEYS if key in params}
            request.kv_transfer_params = {**accepted(params), **own} or None
        return await create(self, request, *args, **kwargs)

    return checking


def _prompt_tokens(request: Any) -> int | None:
    """Tokens of the shortest prompt, if they came as numbers."""
    prompt = getattr(request, "prompt", None) or getattr(request, "token_ids", None)
    if not isinstance(prompt, list):
        return None
    if all(isinstance(part, list) for part in prompt):
        return min(map(len, prompt))
    return None if isinstance(prompt[0], str | list) else len(prompt)


def _notifying_nothing(notify: Callable[..., Any]) -> Callable[..., Any]:
    async def notify_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        return

    return notify_nothing


def _unblended_beams(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    def unblended(self: Any, *args: Any, **kwargs: Any) -> Any:
        serving = copy.copy(self)
        serving.engine_client = _WithoutBlending(self.engine_client)
        return beam_search(serving, *args, **kwargs)

    return unblended


class _WithoutBlending:
    """An engine client whose requests are computed exactly, from vLLM's prefix cache where it has them."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        sampling_params.extra_args = {**(sampling_params.extra_args or {}), PARAMS: dict(NO_BLEND)}
        return self._client.generate(prompt, sampling_params, *args, **kwargs)
