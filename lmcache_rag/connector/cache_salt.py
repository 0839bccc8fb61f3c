"""What may share KV: prompts of one tenant and adapter that begin with the same prefix, on one and the same model.

LMCache's key of a chunk holds the model's name, the tenant and all tokens before it. A blend looks chunks up by their
own tokens, though, whatever stood before them, and a name says little of the weights. So each request gets a namespace,
which goes into LMCache's key in the place of the tenant's salt.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_rag.connector.renumbering import as_numbers, renumbered
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import ingests, named_prefix

__all__ = ["Namespaces", "renumbered"]

_LENGTHS, _NAMES = 16, 256  # of named prefixes that are remembered for a tenant
_TENANTS, _ALL_NAMES = 4096, 16384


class Namespaces:
    """Gives each request its namespace.

    A client of ours names the length of its prefix, which counts for that request itself. Other clients' prompts say
    nothing of it: they belong to the longest prefix that they begin with of those that an ingestion request named, or
    else to their first tokens: `prefix_tokens`, or the first LMCache chunk, which holds the beginning of the system
    prompt. Only whole LMCache chunks are remembered as a prefix: a shorter one, which prompts of several applications
    begin with, would mix these. What was not used for longest is forgotten, of each tenant apart: none can have
    another's prefixes forgotten. Used by one thread.

    Args:
        model: What tells the model from any other, see lmcache_rag.connector.identity.
        chunk: Tokens of an LMCache chunk.
        prefix_tokens: First tokens of a prompt that tell its prefix where no request has named it; 0: one chunk.
        key: Secret of this server and those that share KV with it: names cannot be guessed without it.

    Raises:
        ConfigError: prefix_tokens is no multiple of the chunk.
    """

    def __init__(self, model: str, chunk: int, *, prefix_tokens: int = 0, key: bytes = b"") -> None:
        if prefix_tokens < 0 or prefix_tokens % chunk:
            raise ConfigError(
                f"lmcache_rag.prefix_tokens is {prefix_tokens}, no multiple of LMCache's chunk of {chunk} tokens.",
                remedy=f"For example {max(prefix_tokens // chunk, 1) * chunk}.",
            )
        self._model, self._chunk, self._key = model, chunk, key
        self._lengths = (prefix_tokens, chunk)
        # By tenant, then by (length, namespace); the latest used last.
        self._named: OrderedDict[str, OrderedDict[tuple[int, str], None]] = OrderedDict()

    def of(self, prompt: Sequence[int], tenant: str, params: Mapping[str, Any] | None, *, adapter: str = "") -> str:
        """The namespace of a request, 40 hex digits.

        Args:
            prompt: Its token ids.
            tenant: Its cache_salt.
            params: Its kv_transfer_params.
            adapter: What tells its LoRA adapter from any other; "" for the model itself.
        """
        tokens = len(prompt)
        whose = f"{len(adapter)}\0{adapter}{tenant}".encode("utf-8", "surrogatepass")
        tenant = hashlib.sha256(whose).hexdigest()  # a salt may be as long as its client likes
        if given := named_prefix(params, tokens):
            (name,) = self._names(prompt, tenant, [given])
            if ingests(params) and given % self._chunk == 0:
                self._remember(tenant, (given, name))
            elif (given, name) in self._named.get(tenant, ()):
                self._use(tenant, (given, name))
            return name
        if known := self._named.get(tenant):
            lengths = sorted({length for length, _ in known if length <= tokens})
            for length, name in reversed(list(zip(lengths, self._names(prompt, tenant, lengths), strict=True))):
                if (length, name) in known:
                    self._use(tenant, (length, name))
                    return name
        length = next((length for length in self._lengths if 0 < length <= tokens), self._chunk)
        return self._names(prompt, tenant, [length])[0]

    def _names(self, prompt: Sequence[int], tenant: str, lengths: Sequence[int]) -> list[str]:
        """What prefixes of a prompt are called, of these lengths in ascending order; each token is hashed once."""
        numbers = as_numbers(prompt[: max(lengths, default=0)])
        digest = hmac.new(self._key, f"{self._model}\0{tenant}\0".encode(), "sha256")
        names, begin = [], 0
        for length in lengths:
            digest.update(numbers[begin:length].tobytes())
            names.append(digest.copy().hexdigest()[:40])
            begin = length
        return names

    def _remember(self, tenant: str, prefix: tuple[int, str]) -> None:
        known = self._named.setdefault(tenant, OrderedDict())
        known[prefix] = None
        self._use(tenant, prefix)
        while len({length for length, _ in known}) > _LENGTHS or len(known) > _NAMES:
            known.popitem(last=False)
        if len(self._named) > _TENANTS:
            self._named.popitem(last=False)
        if sum(map(len, self._named.values())) > _ALL_NAMES:
            max(self._named.values(), key=len).popitem(last=False)

    def _use(self, tenant: str, prefix: tuple[int, str]) -> None:
        self._named.move_to_end(tenant)
        self._named[tenant].move_to_end(prefix)
