"""Methods that a wrapper has from what it wraps."""

from __future__ import annotations

from typing import Any


def asked(name: str) -> Any:
    """A method that calls the one of the same name on `inner`, arguments and answer untouched."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, f"{name} of the vector store."
    return method


def asked_async(name: str) -> Any:
    """The same for an async method."""

    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self.inner, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, f"{name} of the vector store."
    return method
