"""Functions of vLLM that are replaced while it runs; tests/test_connector_contract*.py check each against vLLM.

Written for vLLM 0.25.1 and 0.33. vLLM is imported in the functions: this is loaded in each of vLLM's processes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from lmcache_rag.connector.vllm_internals import OwnMetadata
from lmcache_rag.protocol import NO_BLEND, accepted

log = logging.getLogger("lmcache_rag")


# -- worker ------------------------------------------------------------------------------------------------------------


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


def patch_attention(implementation: type) -> None:
    """Let this attention implementation answer a pass of ours (OwnMetadata) through it; anything else is untouched."""
    if getattr(implementation.forward, "_lmcache_rag", False):  # type: ignore[attr-defined]
        return
    forward = implementation.forward  # type: ignore[attr-defined]

    def patched(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attn_metadata, OwnMetadata):
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        out = kwargs["output"] if "output" in kwargs else args[0]
        attn_metadata.attention(layer, query, key, value, out)
        return out

    patched._lmcache_rag = True  # type: ignore[attr-defined]
    implementation.forward = patched  # type: ignore[attr-defined]


def watch_filed_blocks(pool: Any, filed: Callable[[int], None]) -> None:
    """Tell of each block, by its id, that vLLM files under a hash. It does so before the block's KV is computed."""
    file = pool.cache_full_blocks
    signature = inspect.signature(file)

    def cache_full_blocks(*args: Any, **kwargs: Any) -> None:
        file(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for block in given["blocks"][given["num_cached_blocks"] : given["num_full_blocks"]]:
            filed(block.block_id)

    pool.cache_full_blocks = cache_full_blocks


# -- last token --------------------------------------------------------------------------------------------------------


# A prompt's last token computed by a blend: vLLM's own pass over it is left out. A pass over one token takes as long as
# reading all weights. A step that has nothing else to do but that token, which the blend before it computed with its
# last piece, needs none.
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


# -- streams and texts of answers --------------------------------------------------------------------------------------


API_SERVER = "vllm.entrypoints.serve.utils.api_utils"  # a module that API servers load before plugins
_BYTE = re.compile("<0x..>")  # a token for a byte, in tokenizers that fall back to them
PRIMED = 32  # tokens of the prompt behind which an answer's text begins


def tell_in_streams() -> None:
    """Have streams of completions and of chats carry kv_transfer_params in the chunk that ends them.

    vLLM 0.33 does that by itself; before, it was said in whole answers only. Safe to call twice. Does nothing in a
    process that is no API server, where these modules would cost their import.
    """
    if API_SERVER not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for owner, name, chunk in (
        (OpenAIServingCompletion, "completion_stream_generator", CompletionStreamResponse),
        (OpenAIServingChat, "chat_completion_stream_generator", ChatCompletionStreamResponse),
    ):
        stream = getattr(owner, name)
        if "kv_transfer_params" not in chunk.model_fields and not getattr(stream, "_lmcache_rag", False):
            setattr(owner, name, _telling(stream))


def _telling(stream: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """A stream of server-sent events that says the kv_transfer_params of the results it is made from."""
    signature = inspect.signature(stream)
    if "result_generator" not in signature.parameters:
        raise AttributeError(f"{stream.__qualname__} has no result_generator")

    @functools.wraps(stream)
    async def telling(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        params: Any = None

        async def listening(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
            nonlocal params
            async for result in results:
                output = result[1] if isinstance(result, tuple) else result
                params = getattr(output, "kv_transfer_params", None)
                yield result

        given = signature.bind(*args, **kwargs)
        given.arguments["result_generator"] = listening(given.arguments["result_generator"])
        # Closed with ours: a client that leaves ends its request.
        async with contextlib.aclosing(stream(*given.args, **given.kwargs)) as events:  # type: ignore[type-var]
            async for event in events:
                yield _with_params(event, params) if params else event

    telling._lmcache_rag = True  # type: ignore[attr-defined]
    return telling


def _with_params(event: str, params: Any) -> str:
    """A server-sent event; kv_transfer_params are added to the one that ends a choice."""
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return event
    return f"data: {json.dumps(chunk | {'kv_transfer_params': params}, ensure_ascii=False, separators=(',', ':'))}\n\n"


def begin_texts_quickly() -> None:
    """Wrap FastIncrementalDetokenizer: an answer's text begins behind the last tokens of its prompt, not behind all.

    vLLM gives the whole prompt to tokenizers' DecodeStream, which decodes all of it twice when the first token comes:
    24 ms for 30,900 tokens (tokenizers 0.23), in the process and the thread that also serve everybody else's streams.
    What a token adds to a text hangs on the few tokens before it; where it may hang on more, vLLM's way stays.
    Safe to call twice. Does nothing in a process that makes no texts, where the module would cost its import.
    """
    if API_SERVER not in sys.modules and "vllm.v1.engine.detokenizer" not in sys.modules:
        return
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    begin = FastIncrementalDetokenizer.__init__
    if getattr(begin, "_lmcache_rag", False):
        return

    @functools.wraps(begin)
    def begin_quickly(self: Any, tokenizer: Any, request: Any) -> None:
        prompt = request.prompt_token_ids
        if prompt is not None and len(prompt) > PRIMED:
            last = prompt[-PRIMED:]
            if _stands_alone(tokenizer._tokenizer, last, skip_special=request.sampling_params.skip_special_tokens):
                request = copy.copy(request)
                request.prompt_token_ids = last
        begin(self, tokenizer, request)

    begin_quickly._lmcache_rag = True  # type: ignore[attr-defined]
    FastIncrementalDetokenizer.__init__ = begin_quickly


def _stands_alone(tokenizer: Any, tokens: list[int], *, skip_special: bool) -> bool:
    """Whether what comes behind these tokens reads the same whatever stood before them."""
    if tokenizer.decode(tokens, skip_special_tokens=skip_special).endswith("\N{REPLACEMENT CHARACTER}"):
        return False  # in the middle of a character
    # Spaces at a beginning may be dropped, and a row of bytes is read as a whole: a word must stand before them.
    return any(
        not _BYTE.fullmatch(tokenizer.id_to_token(token) or "<0x00>")
        and tokenizer.decode([token], skip_special_tokens=skip_special).strip()
        for token in tokens
    )


# -- requests are checked ----------------------------------------------------------------------------------------------


# Every request's kv_transfer_params are checked in the API server, before the engine sees them. Patches, for vLLM
# 0.25.1 to 0.33:
#
# - InputProcessor.process_inputs, through which every request enters the engine, also of the offline `LLM`. What it
#   raises ends in status 400, in a stream in an event.
# - What answers each endpoint that takes kv_transfer_params: there a stream gets a status, too, and nothing is rendered
#   for what is refused. Beam search hands none to its requests, so it is checked there only.
# - BeamSearchOnlineMixin.beam_search: its requests, one for each beam and token, are not blended.
# - AsyncLLM.notify_kv_transfer_request_rejected: nothing is handed on. It submits an aborted request with the
#   kv_transfer_params of a refused one, for connectors of disaggregated prefill.

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
