"""What of a request's kv_transfer_params reaches the engine: the API server's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_rag.connector.authorization import SIGNATURE, IngestKey, Refusal, needs_key
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.protocol import accepted, complaints, joined

_INVALID = 400
_SHOWN = 8  # complaints in one message


@dataclass(frozen=True)
class RequestValidation:
    """Checks kv_transfer_params of requests to one engine.

    Attributes:
        longest: Tokens of the longest prompt that the engine takes.
        block: Tokens of a block of its prefix cache.
        key: The ingest key; None: whoever reaches the server may ingest and forget.
    """

    longest: int
    block: int
    key: IngestKey | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> RequestValidation | None:
        """Of an engine with this configuration; None for one without a KV connector.

        Raises:
            ConfigError: The file of the ingest key cannot be used.
        """
        transfer = vllm_config.kv_transfer_config
        if transfer is None:
            return None
        options = ConnectorOptions.read(transfer.get_from_extra_config)
        block = vllm_config.cache_config.block_size
        return cls(
            int(vllm_config.model_config.max_model_len),
            block if isinstance(block, int) else 1,
            IngestKey.read(options.ingest_key_file),
        )

    def refusal(self, params: Any, tokens: int | None = None, *, beams: bool = False) -> Refusal | None:
        """Why a request is refused; None: it is not.

        Args:
            params: Its kv_transfer_params.
            tokens: Length of its prompt; None: not known yet.
            beams: Whether it asks for beam search.
        """
        wrong = complaints(params, self.longest if tokens is None else min(tokens, self.longest))
        if beams and (key := needs_key(params)):
            wrong.append(f"{key} cannot be combined with use_beam_search")
        if wrong:
            return Refusal(_INVALID, f"kv_transfer_params: {joined(wrong[:_SHOWN])}")
        return self.key.refusal(params) if self.key else None

    def for_engine(self, params: Any, prompt: Sequence[int] | None, tokens: int) -> dict[str, Any]:
        """What the engine gets of kv_transfer_params that are not refused.

        Signed for the scheduler where they need the ingest key.

        Args:
            params: A request's kv_transfer_params.
            prompt: Its token ids; None: it has none.
            tokens: Length of its prompt.
        """
        kept = accepted(params, tokens, self.block)
        if self.key and needs_key(kept):
            kept[SIGNATURE] = self.key.signature(kept, prompt)
        return kept
