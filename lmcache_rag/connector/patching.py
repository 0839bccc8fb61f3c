"""How functions of vLLM and LMCache are replaced while they run: each replacement is a Patch.

A Patch records what is replaced, why, and when it can go. docs/inside-a-server.md lists all of them;
tests/connector/test_patching.py compares the list with the code. Neither vLLM nor LMCache is imported before
a patch is applied.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_MARK = "_lmcache_rag"  # attribute of a function that replaces another


@dataclass(frozen=True)
class Patch:
    """A function or an attribute of vLLM or LMCache that is replaced while it runs.

    Attributes:
        target: "module:Class.name", or "module:name" of a function of the module.
        why: What the replacement is for, in one sentence.
        until: The version at which the patch can go, or what that version has to offer.
    """

    target: str
    why: str
    until: str

    @property
    def qualified_name(self) -> str:
        """Class and name, as in the documentation."""
        return self.target.partition(":")[2]

    @property
    def name(self) -> str:
        """Name of the attribute that is replaced."""
        return self.target.rpartition(".")[2].rpartition(":")[2]

    def owner(self) -> Any:
        """Import the class, or the module, that has the attribute.

        Raises:
            ImportError: There is no such module or class.
        """
        name, _, path = self.target.partition(":")
        module = importlib.import_module(name)
        owner, _, _ = path.rpartition(".")
        if not owner:
            return module
        if not hasattr(module, owner):
            raise ImportError(f"{name} has no {owner}")
        return getattr(module, owner)


def patch_once(patch: Patch, wrap: Callable[[Any], Any], owner: Any = None) -> None:
    """Replace a function in a class; does nothing where it has been replaced before.

    Args:
        patch: The patch.
        wrap: Makes the replacement from vLLM's or LMCache's own function.
        owner: The class; default: that of the patch's target.

    Raises:
        ImportError: There is no such module or class.
        AttributeError: There is no such function.
    """
    owner = patch.owner() if owner is None else owner
    stock = getattr(owner, patch.name)
    if getattr(stock, _MARK, False):
        return
    wrapped: Any = functools.wraps(stock)(wrap(stock))
    setattr(wrapped, _MARK, True)
    setattr(owner, patch.name, wrapped)


def patch_object(patch: Patch, owner: Any, replacement: Any) -> None:
    """Replace an attribute of one object. Another thread may call the replacement at once."""
    setattr(owner, patch.name, replacement)


def patch_methods(owner: Any, methods: dict[str, Any]) -> None:
    """Replace methods and properties of one object, by a subclass of its class.

    Args:
        owner: The object.
        methods: The replacements by name; each has a Patch.
    """
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), methods)


@contextlib.contextmanager
def patched(patch: Patch, owner: Any, replacement: Any) -> Iterator[None]:
    """Replace an attribute of an object, or of a module, within a `with` block."""
    stock = getattr(owner, patch.name)
    setattr(owner, patch.name, replacement)
    try:
        yield
    finally:
        setattr(owner, patch.name, stock)
