"""The prompts with which chunks are ingested: prefix ⧺ neutral passages ⧺ chunk."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_rag.engines.base import EngineInfo, IngestPrompt, kv_key
from lmcache_rag.errors import PromptError
from lmcache_rag.neutral import NEUTRAL_PASSAGES, neutral_ids

if TYPE_CHECKING:
    from lmcache_rag.tokenizer import SafeTokenizer

_CACHED_CHUNKS = 8192


class ChunkPrompts:
    """Makes the ingest prompts of one prefix, and the keys of their KV. Thread-safe.

    Args:
        parts: The model's tokenizer.
        info: The engine's facts.
        prefix_ids: The prefix.
        tenant: KV of different tenants is never shared.
        neutral: Token ids of the neutral passages; None: the usual ones.
    """

    def __init__(
        self,
        parts: SafeTokenizer,
        info: EngineInfo,
        prefix_ids: Sequence[int],
        *,
        tenant: str = "",
        neutral: Sequence[int] | None = None,
    ) -> None:
        self._parts, self.info, self.tenant = parts, info, tenant
        self.prefix_ids = tuple(prefix_ids)
        self.neutral_ids = self._make_neutral() if neutral is None else tuple(neutral)
        self.fingerprint = info.fingerprint(self.prefix_ids, tenant, self.neutral_ids)
        self._lock = threading.Lock()
        self._chunks: OrderedDict[str, tuple[str, array[int]]] = OrderedDict()

    def _make_neutral(self) -> tuple[int, ...]:
        return neutral_ids(NEUTRAL_PASSAGES, self._parts.text, self.info.kv_block, self.info.context_length)

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk; special tokens in it are plain text. The latest are cached."""
        return tuple(self.chunk(text)[1])

    def chunk(self, text: str) -> tuple[str, array[int]]:
        """Key of a chunk's KV, and its token ids."""
        with self._lock:
            if found := self._chunks.get(text):
                self._chunks.move_to_end(text)
                return found
        ids = array("I", self._parts.text(text))
        entry = (kv_key(self.fingerprint, ids), ids)
        with self._lock:
            self._chunks[text] = entry
            while len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        return entry

    def ingest(self, chunk: str) -> IngestPrompt:
        """Prefix ⧺ neutral passages ⧺ chunk."""
        key, ids = self.chunk(chunk)
        if not ids:
            raise PromptError("A chunk has no tokens.", remedy="Leave out empty chunks.")
        return IngestPrompt(
            (*self.prefix_ids, *self.neutral_ids, *ids),
            len(self.prefix_ids),
            key,
            self.fingerprint,
            len(self.neutral_ids),
            self.tenant,
        )
