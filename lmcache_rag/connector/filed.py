"""Blocks whose KV is not there yet, though vLLM's prefix cache says so.

vLLM files a block under its hash when it schedules the block's tokens; the step's forward pass computes them. For vLLM
that is early enough: whoever shares the block reads it in that pass at the earliest. A blend may run before the pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol


class Pool(Protocol):
    """What is used of vLLM's BlockPool."""

    def key(self, block_hash: Any) -> Any:
        """What a block with that hash is filed under."""
        ...

    def get(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The block filed under each key; None where there is none."""
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

    def computed(self, keys: Iterable[Any]) -> list[int]:
        """Ids of the blocks under these keys, as far as there are any and their KV is there."""
        filed, found = self._filed, []
        for block in self._pool.get(keys):
            if block is None or block.block_id in filed:
                break
            found.append(block.block_id)
        return found

    def hold(self, hashes: Sequence[Any], tokens: int) -> bool:
        """Whether some of a request's first tokens, which vLLM found in its cache, are only being computed."""
        if not self._filed:
            return False
        found = self._pool.get(map(self._pool.key, hashes[: tokens // self._block]))
        return any(block.block_id in self._filed for block in found if block is not None)
