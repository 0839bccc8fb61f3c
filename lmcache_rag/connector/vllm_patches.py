"""All functions of vLLM that are replaced while it runs, each with the version at which the patch can go.

Written for vLLM 0.25.1 to 0.33; the tests in tests/contracts check each patch against vLLM. vLLM is imported in
the functions: this module is loaded in each of vLLM's processes. Each `patch_*` function can be called twice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from lmcache_rag.connector.patching import Patch, patch_object, patch_once
from lmcache_rag.connector.vllm_internals import OwnMetadata
from lmcache_rag.protocol import NO_BLEND, accepted

log = logging.getLogger("lmcache_rag")

LOAD_MODEL = Patch(
    "vllm.v1.worker.gpu_worker:Worker.load_model",
    "Finds the worker of the process, and with it the model.",
    "a connector gets the model",
)
EXECUTE_MODEL = Patch(
    "vllm.v1.worker.gpu_worker:Worker.execute_model",
    "A blend begins while vLLM still prepares the inputs of its step, which takes 5 to 8 ms.",
    "a connector has a hook before a step's inputs are prepared",
)
FULL_GRAPH = Patch(
    "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.run_fullgraph",
    "A step of nothing but one token, which a blend computed already, replays no CUDA graph.",
    "a connector can supply a token's hidden states",
)
ATTENTION = Patch(
    "vllm.v1.attention.backend:AttentionImpl.forward",
    "Passes of a blend attend by positions of their own; vLLM's passes go through untouched.",
    "a connector can run the model with attention of its own",
)
UPDATE_FROM_OUTPUT = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "The connector gets its workers' metadata, the reuse statistics, before requests finish.",
    "worker metadata is delivered before requests finish",
)
CACHE_FULL_BLOCKS = Patch(
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks",
    "Blocks that vLLM caches before their KV is computed are not taken for resident chunks, and approximate ones, "
    "which no request can find, are not cached: vLLM uses them again before blocks that are cached.",
    "the prefix cache says which blocks are computed, and a request which of its blocks are cached",
)
PREPROCESS = Patch(
    "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    "A prompt is looked up while vLLM hashes its blocks, which takes 1 ms for 8,000 tokens, and 7 for 31,000.",
    "a connector has a hook before a request's blocks are hashed",
)
ADD_LORA = Patch(
    "vllm.v1.engine.core:EngineCore.add_lora",
    "A LoRA adapter is identified by its files when it is loaded, not when it is first asked for: they may change "
    "between the two. KV of one that is replaced in place is not stored any more.",
    "a connector is notified of adapters",
)
_STREAM_WHY = "The last chunk of a streamed answer carries `kv_transfer_params`."
COMPLETION_STREAM = Patch(
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator",
    _STREAM_WHY,
    "vLLM 0.33 is the oldest supported",
)
CHAT_STREAM = Patch(
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
    _STREAM_WHY,
    "vLLM 0.33 is the oldest supported",
)
DETOKENIZER = Patch(
    "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__",
    "An answer's text is decoded after the last 32 tokens of its prompt. vLLM decodes the whole prompt twice: 24 ms "
    "for 30,900 tokens, in the process that writes all streams. Where the text may depend on more, that way is taken.",
    "vLLM decodes only the end of a prompt",
)
_VALIDATION_UNTIL = "a connector can validate `kv_transfer_params` in the API server"
PROCESS_INPUTS = Patch(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "Every request's `kv_transfer_params` are validated before the engine gets them, also those of the offline `LLM`.",
    _VALIDATION_UNTIL,
)
ENDPOINTS = tuple(
    Patch(
        f"vllm.entrypoints.{target}",
        "Invalid `kv_transfer_params` are rejected with a status, also of a stream, before the prompt is rendered.",
        _VALIDATION_UNTIL,
    )
    for target in (
        "openai.completion.serving:OpenAIServingCompletion.create_completion",
        "openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",  # Anthropic's and Cohere's chats too
        "openai.chat_completion.batch_serving:OpenAIServingChatBatch.create_batch_chat_completion",
        "openai.responses.serving:OpenAIServingResponses.create_responses",
        "scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
    )
)
BEAM_SEARCH = Patch(
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
    "The requests of a beam search, one for each beam and token, are not blended.",
    "beam search hands `kv_transfer_params` on",
)
NOTIFY_REJECTED = Patch(
    "vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected",
    "The `kv_transfer_params` of a rejected request stay out of the engine, to which vLLM submits an aborted request.",
    "only connectors of disaggregated prefill are notified",
)


# -- worker ------------------------------------------------------------------------------------------------------------

_workers: dict[int, Any] = {}  # the worker of this process, by its process id: forked processes have their own
_hidden_states: list[Any] = []  # for the step under way, at most one; a worker's steps come one after another


def patch_load_model() -> None:
    """Have `worker` find the worker that loaded the model."""

    def wrap(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = load(self, *args, **kwargs)
            _workers[os.getpid()] = self
            return result

        return load_model

    patch_once(LOAD_MODEL, wrap)


def worker() -> Any:
    """The worker of this process, or None when none has loaded a model."""
    return _workers.get(os.getpid())


def patch_execute_model() -> None:
    """Call the connector before vLLM prepares the inputs of a step.

    start_load_kv comes 5 to 8 ms later, in which the GPU would have nothing to do. A connector takes part by having
    `begin_step(meta)`. It is not called where vLLM is going to write to blocks first.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    def wrap(execute: Callable[..., Any]) -> Callable[..., Any]:
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

        return execute_model

    patch_once(EXECUTE_MODEL, wrap)


def offer_hidden_state(hidden: Any) -> None:
    """Set the hidden state of the one token that the worker's step computes; it is dropped when the step ends.

    Args:
        hidden: [1, width]; None: there is none.
    """
    _hidden_states[:] = [] if hidden is None else [hidden]


def patch_run_fullgraph() -> None:
    """Return the offered hidden state instead of replaying the CUDA graph of a step.

    A pass over one token takes as long as reading all weights. A step that computes only a prompt's last
    token, which the blend has already computed with its last piece, needs no pass. vLLM runs one token as such a graph
    in its default settings; in others (eager, the older model runner) it computes the token once more. Does nothing if
    vLLM has no such class.
    """

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_fullgraph(self: Any, desc: Any) -> Any:
            states = getattr(self, "hidden_states", None)
            if not _hidden_states or states is None or self.use_aux_hidden_state_outputs:
                return run(self, desc)
            log.debug("The only token of this step was computed by its blend")
            states[:1].copy_(_hidden_states.pop())
            return states[: desc.num_tokens]

        return run_fullgraph

    with contextlib.suppress(ImportError):
        patch_once(FULL_GRAPH, wrap)


def patch_attention(implementation: type) -> None:
    """Have an attention implementation pass our metadata (OwnMetadata) to its own `attention`.

    Args:
        implementation: A subclass of vLLM's AttentionImpl.
    """

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def patched_forward(
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

        return patched_forward

    patch_once(ATTENTION, wrap, implementation)


# -- scheduler ---------------------------------------------------------------------------------------------------------


def patch_update_from_output() -> None:
    """Deliver the workers' metadata to the connector before requests finish.

    vLLM delivers it after that, so that a request whose only step was its blend would be answered without its
    statistics. A connector takes part by having `take_worker_meta(meta)`.
    """

    def wrap(update: Callable[..., Any]) -> Callable[..., Any]:
        def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
            take = getattr(getattr(self, "connector", None), "take_worker_meta", None)
            if take is not None:
                output = getattr(model_runner_output, "kv_connector_output", None)
                meta = getattr(output, "kv_connector_worker_meta", None)
                if meta is not None:
                    take(meta)
            return update(self, scheduler_output, model_runner_output)

        return update_from_output

    patch_once(UPDATE_FROM_OUTPUT, wrap)


def patch_preprocess_add_request() -> None:
    """Look a request up as soon as the engine's process has received it, before vLLM hashes its blocks.

    vLLM does that in the thread that receives requests. A connector takes part by having `early_lookups`, see
    lmcache_rag.connector.early_lookup.
    """

    def wrap(preprocess: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            early = getattr(self.scheduler.get_kv_connector(), "early_lookups", None)
            if early is not None:
                early.yield_to_questions(request)
            if early is None or request.request_id in self.scheduler.requests:
                return preprocess(self, request)
            early.send(request)
            try:
                return preprocess(self, request)
            except BaseException:
                early.cancel(request.request_id)
                raise

        return preprocess_add_request

    patch_once(PREPROCESS, wrap)


def patch_add_lora() -> None:
    """Notify the connector of each LoRA adapter that vLLM loads on request of a client or at start.

    A connector takes part by having `on_adapter_loaded(lora_request)`.
    """

    def wrap(add: Callable[..., Any]) -> Callable[..., Any]:
        def add_lora(self: Any, lora_request: Any) -> Any:
            added = add(self, lora_request)
            loaded = getattr(self.scheduler.get_kv_connector(), "on_adapter_loaded", None)
            if loaded is not None:
                loaded(lora_request)
            return added

        return add_lora

    patch_once(ADD_LORA, wrap)


def patch_cache_full_blocks(
    pool: Any, on_cached: Callable[[int], None], exact_tokens: Callable[[str], int | None]
) -> None:
    """Report each block that vLLM's block pool caches under a hash, which it does before the block's KV is computed.

    Approximate blocks are not cached: it costs a microsecond for each before the request's step, and vLLM would keep
    them in place of blocks that requests can find. A preempted request computes their tokens again, exactly.

    Args:
        pool: vLLM's BlockPool.
        on_cached: Called with the id of each block.
        exact_tokens: Of a request's first tokens, how many have exact KV; None: all.
    """
    cache = pool.cache_full_blocks
    signature = inspect.signature(cache)

    def cache_full_blocks(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        first = arguments["num_cached_blocks"]
        exact = exact_tokens(arguments["request"].request_id)
        if exact is not None:
            arguments["num_full_blocks"] = end = min(arguments["num_full_blocks"], exact // arguments["block_size"])
            if arguments.get("block_mask") is not None:
                arguments["block_mask"] = arguments["block_mask"][: max(end - first, 0)]
        cache(*bound.args, **bound.kwargs)
        for block in arguments["blocks"][first : arguments["num_full_blocks"]]:
            on_cached(block.block_id)

    patch_object(CACHE_FULL_BLOCKS, pool, cache_full_blocks)


# -- streams and texts of answers --------------------------------------------------------------------------------------

API_SERVER = "vllm.entrypoints.serve.utils.api_utils"  # a module that API servers load before plugins
PRIMED = 32  # tokens of the prompt after which the text of an answer is decoded
_BYTE = re.compile("<0x..>")  # a token for a byte, in tokenizers that fall back to them


def patch_stream_kv_params() -> None:
    """Have streams of completions and of chats carry kv_transfer_params in the chunk that ends them.

    vLLM 0.33 does that by itself; older versions return them in whole answers only. Does nothing in a process that is
    no API server, where importing these modules would only cost time.
    """
    if API_SERVER not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    for patch, chunk in ((COMPLETION_STREAM, CompletionStreamResponse), (CHAT_STREAM, ChatCompletionStreamResponse)):
        if "kv_transfer_params" not in chunk.model_fields:
            patch_once(patch, _with_kv_params)


def _with_kv_params(stream: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """A stream of server-sent events that carries the kv_transfer_params of the results it is made from."""
    signature = inspect.signature(stream)
    if "result_generator" not in signature.parameters:
        raise AttributeError(f"{stream.__qualname__} has no result_generator")

    async def with_kv_params(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        params: Any = None

        async def observed(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
            nonlocal params
            async for result in results:
                output = result[1] if isinstance(result, tuple) else result
                params = getattr(output, "kv_transfer_params", None)
                yield result

        bound = signature.bind(*args, **kwargs)
        bound.arguments["result_generator"] = observed(bound.arguments["result_generator"])
        # Closed with our generator, so that a client that disconnects ends its request.
        async with contextlib.aclosing(stream(*bound.args, **bound.kwargs)) as events:  # type: ignore[type-var]
            async for event in events:
                yield _with_params(event, params) if params else event

    return with_kv_params


def _with_params(event: str, params: Any) -> str:
    """A server-sent event; kv_transfer_params are added to the one that ends a choice."""
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return event
    return f"data: {json.dumps(chunk | {'kv_transfer_params': params}, ensure_ascii=False, separators=(',', ':'))}\n\n"


def patch_detokenizer_start() -> None:
    """Start the text of an answer after the last tokens of its prompt, not after all of them.

    vLLM gives the whole prompt to tokenizers' DecodeStream, which decodes all of it twice when the first token comes:
    24 ms for 30,900 tokens (tokenizers 0.23), in the process and the thread that also serve all other streams. What a
    token adds to a text depends on the few tokens before it; where it may depend on more, vLLM's way is kept. Does
    nothing in a process that makes no texts, where importing the module would only cost time.
    """
    if API_SERVER not in sys.modules and "vllm.v1.engine.detokenizer" not in sys.modules:
        return

    def wrap(start: Callable[..., None]) -> Callable[..., None]:
        def start_at_end_of_prompt(self: Any, tokenizer: Any, request: Any) -> None:
            prompt = request.prompt_token_ids
            if prompt is not None and len(prompt) > PRIMED:
                last = prompt[-PRIMED:]
                if _stands_alone(tokenizer._tokenizer, last, skip_special=request.sampling_params.skip_special_tokens):
                    request = copy.copy(request)
                    request.prompt_token_ids = last
            start(self, tokenizer, request)

        return start_at_end_of_prompt

    patch_once(DETOKENIZER, wrap)


def _stands_alone(tokenizer: Any, tokens: list[int], *, skip_special: bool) -> bool:
    """Whether the text after these tokens does not depend on the tokens before them."""
    if tokenizer.decode(tokens, skip_special_tokens=skip_special).endswith("\N{REPLACEMENT CHARACTER}"):
        return False  # in the middle of a character
    # Spaces at a beginning may be dropped, and a row of bytes is read as a whole: a word must stand before them.
    return any(
        not _BYTE.fullmatch(tokenizer.id_to_token(token) or "<0x00>")
        and tokenizer.decode([token], skip_special_tokens=skip_special).strip()
        for token in tokens
    )


# -- request validation ------------------------------------------------------------------------------------------------

PARAMS = "kv_transfer_params"
_VLLM_KEYS = ("prompt_token_ids",)  # vLLM's own key: its chat reads the prompt from it, and does not pass it on
_ENGINES = ("vllm.v1.engine.async_llm", "vllm.v1.engine.llm_engine")  # one of them is loaded where requests come in

Make = Callable[[Any], Any]  # vllm_config -> a RequestValidation, or None


def patch_request_validation(make: Make) -> None:
    """Validate the kv_transfer_params of every request in the API server, before the engine gets them.

    Every request enters the engine by InputProcessor.process_inputs. What it raises ends in status 400, in a stream in
    an event. So the methods of the endpoints validate as well: there a stream gets a status, too, and nothing is
    rendered for what is rejected. Beam search passes no kv_transfer_params to its requests: they are validated there
    only. Does nothing in a process that takes no requests.

    Args:
        make: Makes the RequestValidation of an engine from its configuration; None: its requests are not validated.
    """
    serves = API_SERVER in sys.modules
    if not serves and not any(name in sys.modules for name in _ENGINES):
        return
    patch_once(PROCESS_INPUTS, functools.partial(_validating_inputs, make=make))
    if not serves:
        return
    patch_once(NOTIFY_REJECTED, _notifying_nothing)
    patch_once(BEAM_SEARCH, _unblended_beams)
    for endpoint in ENDPOINTS:
        patch_once(endpoint, functools.partial(_validating, make=make))


def _validation(inputs: Any, make: Make) -> Any:
    """The RequestValidation of an InputProcessor's engine."""
    try:
        return inputs._lmcache_rag_validation
    except AttributeError:
        inputs._lmcache_rag_validation = made = make(inputs.vllm_config)
        return made


def _validating_inputs(process: Callable[..., Any], *, make: Make) -> Callable[..., Any]:
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


def _validating(create: Callable[..., Any], *, make: Make) -> Callable[..., Any]:
    async def validating(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
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

    return validating


def _prompt_tokens(request: Any) -> int | None:
    """Number of tokens of the shortest prompt; None where it is not given as token ids."""
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
