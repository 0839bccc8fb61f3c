"""One question on its way through another's model: what is added to the request, what came back."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_rag.engines.base import BlendOptions, Completion

from ..blender import counts

if TYPE_CHECKING:
    from lmcache_rag.engines.vllm_wire import Gathered

    from ..blender import Blender, Prompted

KEY = "lmcache_rag"  # under which statistics stand in metadata and events


@dataclass
class Call:
    """State of one question. It belongs to one call of the model and is never shared.

    Attributes:
        blender: Made the prompt.
        prompted: The prompt.
        blend: How KV is reused.
        body: What is added to the request's body.
        done: The answer, once it is there; None for one that came out of LangChain's cache.
    """

    blender: Blender
    prompted: Prompted
    blend: BlendOptions
    body: Mapping[str, Any] = field(default_factory=dict)
    done: Completion | None = None
    _gathered: Gathered | None = None
    _streamed: bool = False
    _stops: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    def request(self, given: dict[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments of create() with ours added; the clock starts.

        LangChain lets the `extra_body` of a call replace the constructor's (`own`): here all of them are merged. A
        parameter of KV transfer that the program sets itself stays as it is.
        """
        theirs = {**(own or {}), **(given.get("extra_body") or {})}
        params = {**self.body.get("kv_transfer_params", {}), **(theirs.get("kv_transfer_params") or {})}
        if "prompt_token_ids" in (ours := self.body.get("kv_transfer_params", {})):
            params["prompt_token_ids"] = ours["prompt_token_ids"]
        self._gathered, self._streamed = self.blender.gather(), bool(given.get("stream"))
        self._stops = bool(given.get("stop"))
        self.done = None
        return given | {"extra_body": {**theirs, **self.body, "kv_transfer_params": params}}

    def take(self, part: Any) -> None:
        """A raw part of the answer."""
        if self._gathered is not None and not isinstance(part, str):
            self._gathered.take(part)

    def finish(self) -> Completion | None:
        """The answer with its statistics; None where no request was made.

        Raises:
            EngineUnavailableError: The server broke off.
        """
        with self._lock:
            if self.done is None and self._gathered is not None:
                self.done = self.blender.finished(
                    self._gathered, self.prompted, streamed=self._streamed, blend=self.blend, stops=self._stops
                )
            return self.done

    @property
    def metadata(self) -> dict[str, Any]:
        """The statistics, for response_metadata and generation_info; empty where there are none."""
        return {KEY: facts(self.done)} if self.done is not None else {}

    @property
    def told(self) -> dict[str, Any]:
        """The statistics as flat metadata of a run; empty where there are none."""
        return {f"{KEY}_{name}": value for name, value in counts(self.done.stats).items()} if self.done else {}

    @property
    def params(self) -> dict[str, Any]:
        """What is known before the answer, for traces and for the key of LangChain's cache."""
        blend, prompt = self.blend, self.prompted.prompt
        return {
            f"{KEY}_blend": blend.enabled,
            f"{KEY}_policy": blend.policy,
            f"{KEY}_ratio": blend.ratio,
            f"{KEY}_chunks": len(prompt.chunks),
            f"{KEY}_prompt_tokens": len(prompt),
        }


def facts(done: Completion) -> dict[str, Any]:
    """Statistics and warnings of an answer as plain values."""
    return {**counts(done.stats), "warnings": list(done.warnings)}
