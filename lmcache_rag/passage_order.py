"""The order of passages in a prompt: as they were retrieved, or one in which prompts begin alike more often.

A server that cannot blend still keeps the KV of prompts that begin alike (vLLM's prefix cache), for models with
recurrent layers too. Retrieved in another order, the same passages share nothing. `auto` changes the order only for
models with recurrent layers, which can share nothing else. The stable order begins with the passages of the longest
beginning that was asked before, and then has the others by how often they are used. Answers are those of a full
prefill of that order. `benchmarks/passage_order.py` compares it with others.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from lmcache_rag._utils import one_of

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine

log = logging.getLogger("lmcache_rag")

OrderMode: TypeAlias = Literal["auto", "retrieved", "stable"]
Order: TypeAlias = Literal["retrieved", "stable"]

_PASSAGES = 50_000  # of the orders that were asked, the latest: about 20 MB
_USES = 20_000  # passages whose uses are counted, the latest
_NUMBER = re.compile(r"\W*(?:[^\W\d]+\W+)?(\d{1,4})\b")
_VISITS = 4096  # passages that one search looks at


def order_of(name: str) -> OrderMode:
    """The mode of that name.

    Raises:
        ConfigError: There is none.
    """
    mode: OrderMode = one_of(OrderMode, "order", name)
    return mode


def numbered(texts: Sequence[str], ranks: Sequence[int]) -> bool:
    """Whether each passage begins with its own rank, as "[2] ..." or "Source 2: ...": a program numbered them."""
    numbers = [found and int(found[1]) for found in map(_NUMBER.match, texts)]
    return bool(texts) and numbers == list(ranks)


def rounded(uses: int) -> int:
    """Rounded down to a power of two, so that the order by use seldom changes."""
    return 1 << (uses.bit_length() - 1) if uses > 0 else 0


@dataclass(eq=False)
class _Node:
    """A passage of an order that was asked, after those on the way from the root."""

    parent: _Node | None = None
    key: str = ""
    uses: int = 0
    children: dict[str, _Node] = field(default_factory=dict)


class SeenOrders:
    """Orders of passages that were asked, as a tree of their beginnings. Thread-safe, and bounded.

    Args:
        passages: Most passages of all orders together; the least recently asked are forgotten first.
    """

    def __init__(self, passages: int = _PASSAGES) -> None:
        self._limit = passages
        self._lock = threading.Lock()
        self._root = _Node()
        self._latest: OrderedDict[int, _Node] = OrderedDict()
        self._uses: OrderedDict[str, int] = OrderedDict()

    def arrange(self, keys: Sequence[str], *, rest: Callable[[list[str]], list[str]] | None = None) -> list[int]:
        """Indices of these passages in the stable order, which is remembered.

        Args:
            keys: A name for each passage, the same in every prompt. One may occur more than once.
            rest: Orders the passages after those with which an earlier prompt began; None: most used first.
        """
        places: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        with self._lock:
            for key in places:
                self._uses[key] = self._uses.pop(key, 0) + 1
            while len(self._uses) > _USES:
                self._uses.popitem(last=False)
            first = self._longest(set(places))
            left = [key for key in places if key not in set(first)]
            order = [*first, *(rest or self._by_use)(left)]
            self._remember(order)
        return [index for key in order for index in places[key]]

    def _by_use(self, keys: list[str]) -> list[str]:
        return sorted(keys, key=lambda key: (-rounded(self._uses[key]), key))

    def _longest(self, wanted: set[str]) -> list[str]:
        """The longest beginning of an earlier order that has only these passages; of several, the most used one."""
        best, depth_of_best, visits = self._root, 0, 0
        stack = [(self._root, 0)]
        while stack and visits < _VISITS:
            node, depth = stack.pop()
            visits += 1
            if (depth, node.uses) > (depth_of_best, best.uses) and depth:
                best, depth_of_best = node, depth
            few, many = sorted((wanted, node.children.keys()), key=len)
            found = [node.children[key] for key in few if key in many]
            stack += [(one, depth + 1) for one in sorted(found, key=lambda one: (one.uses, one.key))]
        path = []
        while best.parent is not None:
            path.append(best.key)
            best = best.parent
        return path[::-1]

    def _remember(self, order: Sequence[str]) -> None:
        node, way = self._root, []
        for key in order:
            if (child := node.children.get(key)) is None:
                child = node.children[key] = _Node(node, key)
            node = child
            node.uses += 1
            way.append(node)
        for node in reversed(way):  # a parent is later than its children, so that these go first
            self._latest[id(node)] = node
            self._latest.move_to_end(id(node))
        while len(self._latest) > self._limit:
            _, gone = self._latest.popitem(last=False)
            if gone.parent is not None:
                gone.parent.children.pop(gone.key, None)


# -- of an engine -----------------------------------------------------------------------------------------------------


class PassageOrder:
    """Puts the passages of an engine's prompts into order. Thread-safe.

    Args:
        engine: What answers the prompts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self.seen = SeenOrders()
        self._warned: set[str] = set()

    def arrange(self, keys: Sequence[str], mode: OrderMode, *, numbered: bool = False) -> tuple[list[int], Order]:
        """Indices of passages in the order of the prompt, and which order that is.

        Args:
            keys: The names of the passages' KV, as retrieved.
            mode: "auto" is "stable" for a model with recurrent layers, which no engine can blend, where the engine
                keeps KV of prompts that begin alike.
            numbered: Whether the prompt numbers its passages. Their order then stays, or the numbers would be those of
                other passages than the program shows.
        """
        engine = self._engine()
        stable = mode == "stable"
        if mode == "auto" and engine is not None and (info := engine.info).recurrent and info.caches_prefixes:
            stable = True
            if not numbered:
                self._warn(
                    f"Passages for {info.model} are put into a stable order, so that prompts begin alike and share KV. "
                    "order=retrieved keeps the order of the retriever."
                )
        if stable and numbered:
            self._warn("The prompt numbers its passages, so their order stays that of the retriever.")
        if not stable or numbered or len(keys) < 2:
            return list(range(len(keys))), "retrieved"
        return self.seen.arrange(keys), "stable"

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning("%s", sentence)


_guard = threading.Lock()
_orders: weakref.WeakKeyDictionary[Engine, PassageOrder] = weakref.WeakKeyDictionary()


def passage_order(engine: Engine) -> PassageOrder:
    """The order of this engine's prompts, of all clients in this process."""
    with _guard:
        found = _orders.get(engine)
        if found is None:
            found = _orders[engine] = PassageOrder(engine)
        return found


def _after_fork() -> None:
    """Forget all: another thread of the parent may have held a lock."""
    global _guard, _orders
    _guard, _orders = threading.Lock(), weakref.WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
