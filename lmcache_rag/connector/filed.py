"""Blocks whose KV is not there yet, though vLLM's prefix cache says so.

vLLM files a block under its hash when it schedules the block's tokens; the step's forward pass computes them. For vLLM
that is early enough: whoever shares the block reads it in that pass at the earliest. A blend may run before the pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol


class Pool(Protocol):
    """What is used of vLLM's BlockPool."""

    def get_cached_block(self, block_hash: Any, group_ids: list[int]) -> list[Any] | None:
        """The block filed under this hash."""
        ...


class FiledBlocks:
    """What was filed in the present step.

    Args:
        pool: The pool.
        block: Tokens in a block.
    """

    def __init__(self, pool: Pool, block: int) -> None:
        self._pool, self._block = pool, block
        self._filed: set[int] = set()

    def add(self, block_id: int) -> None:
        """A block was filed."""
        self._filed.add(block_id)

    def step_ends(self) -> None:
        """What was filed is computed before anything that the next step asks for."""
        self._filed.clear()

    def computed(self, block_hash: Any) -> Any:
        """The block under that hash whose KV is there; None when there is none."""
        return next(self.all_computed((block_hash,)), None)

    def all_computed(self, hashes: Iterable[Any]) -> Iterator[Any]:
        """`computed` of each, until there is none: thousands of them stand between a prompt and its first token."""
        get, filed, group = self._pool.get_cached_block, self._filed, [0]
        for block_hash in hashes:
            blocks = get(block_hash, group)
            if not blocks or blocks[0].block_id in filed:
                return
            yield blocks[0]

    def hold(self, hashes: Sequence[Any], tokens: int) -> bool:
        """Whether some of a request's first tokens, which vLLM found in its cache, are only being computed."""
        if not self._filed:
            return False
        found = (self._pool.get_cached_block(own, [0]) for own in hashes[: tokens // self._block])
        return any(blocks[0].block_id in self._filed for blocks in found if blocks)
