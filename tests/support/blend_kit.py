"""A prompt with chunks whose KV is known, for blends on a paged cache."""

from __future__ import annotations

import random

import torch
from paged_kit import PagedModel

from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.engines.base import ChunkSpan, QueryPrompt
from lmcache_rag.engines.hf_blend import shift_keys, shift_tables
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.engines.kv_files import ChunkKV

PREFIX = 32


class Case:
    """A prompt of a prefix, chunks and gaps, with the chunks' KV computed behind the prefix.

    The KV of the chunks in `missed`, by their number, is not found.
    """

    def __init__(
        self,
        model: HFModel,
        lengths: list[int],
        gaps: list[int],
        suffix: int,
        seed: int,
        missed: frozenset[int] = frozenset(),
    ) -> None:
        rng = random.Random(seed)
        self.ids = [rng.randrange(5, 49000) for _ in range(PREFIX)]
        spans = []
        for length, gap in zip(lengths, gaps, strict=True):
            self.ids += [rng.randrange(5, 49000) for _ in range(gap)]
            spans.append((len(self.ids), len(self.ids) + length))
            self.ids += [rng.randrange(5, 49000) for _ in range(length)]
        self.ids += [rng.randrange(5, 49000) for _ in range(suffix)]
        self.prompt = QueryPrompt(
            tuple(self.ids), PREFIX, tuple(ChunkSpan(a, b, str(a)) for a, b in spans), spans[-1][1], "f"
        )
        self.kv: list[ChunkKV] = []
        for start, end in [(PREFIX, PREFIX), *spans]:
            cache = model.buffer(PREFIX + end - start)
            ids = torch.tensor(self.ids[:PREFIX] + self.ids[start:end])
            model.forward(ids[None], torch.arange(len(ids)), cache)
            keys = torch.stack([layer.keys[0] for layer in cache.layers])
            values = torch.stack([layer.values[0] for layer in cache.layers])
            first = 0 if start == end else PREFIX
            self.kv.append(ChunkKV(keys[:, :, first:].clone(), values[:, :, first:].clone()))

        found = zip(self.prompt.chunks, self.kv[1:], strict=True)
        self.hits = [hit for number, hit in enumerate(found) if number not in missed]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the chunks stand whose KV is found, those that are not exact."""
        return [(s.start, s.end) for s, _ in self.hits if s.start != PREFIX]

    @property
    def exact(self) -> int:
        """First position that is not exact."""
        return next((s.end for s, _ in self.hits if s.start == PREFIX), PREFIX)

    def place(self, model: HFModel, paged: PagedModel, sequence: PagedSequence) -> None:
        """What LMCache does: write the KV, keys turned."""
        for span, kv in [(None, self.kv[0]), *self.hits]:
            start = span.start if span else 0
            places = torch.arange(start, start + kv.tokens)
            was = torch.arange(kv.tokens) + (PREFIX if span else 0)
            cos, sin = shift_tables(model.rotary, was, places)
            for layer in range(model.layers):
                keys = torch.empty_like(kv.keys[layer])
                shift_keys(kv.keys[layer], cos, sin, out=keys, interleaved=model.interleaved)
                paged.write(sequence, layer, start, keys, kv.values[layer])
