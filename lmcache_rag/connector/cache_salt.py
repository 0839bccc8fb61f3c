"""The cache_salt of a request, and token ids that are renumbered in each salt's namespace.

Prompts may share KV if they are of one tenant and LoRA adapter, begin with the same prefix, and run on one and the same
model. LMCache's key of a chunk holds the model's name, the tenant and all tokens before the chunk. A blend, though,
looks chunks up by their own tokens, without those before them, and a model's name does not identify its weights. So
each request gets a namespace, whose name takes the place of the tenant's salt in LMCache's key (`CacheSalts`).

Token ids are mapped to 32-bit ids that are secret and differ between namespaces (`Renumbering`). The reason:

LMCache's index takes ``h = sum(t[i] * B ** (63 - i)) mod 2 ** 64``, with a published B, for the text of a chunk and
compares nothing else. With plain token ids an attacker can compute, by lattice reduction in less than a second, a chunk
of mostly chosen text that has the h of another client's chunk, and have its KV served instead of that one's. Adding a
constant to all ids keeps such a collision. So the index gets T(t) instead of t, with a secret T:

T is a Feistel network of six rounds over the two 16-bit halves of an id. The round functions are tables of 65,536
16-bit numbers, drawn by SHAKE-256 from the secret, one set for each server. A namespace adds six 16-bit keys,
HMAC-SHA-256 of its name under the secret, which are xored with the tables' inputs. A new namespace thus costs one
HMAC and no new table.

- T is a permutation of the 32-bit numbers, for any tables: two tokens never share a number, and ids beyond
  the vocabulary need no special case.
- Two chunks collide if ``sum(c[v] * T(v)) = 0 mod 2 ** 64`` over the tokens v in which they differ, where c[v] is the
  sum of B's powers at the places of v in one chunk, less that in the other. To build such a pair one has to know T's
  numbers, and these go to LMCache's index, and from there neither to clients nor to logs. To anyone without the secret
  the tables are random, and six rounds with random tables are the construction of Luby and Rackoff with two to spare:
  a pair that was chosen beforehand collides with a probability of about 2 ** -64, and each guess costs the ingestion of
  a chunk.
- Two namespaces share the tables but not the keys, which change what is looked up in every round, so that their
  permutations are not related in a simple way: even a collision found by chance does not hold in another namespace.
- What an attacker can observe: an entry of LMCache's index evicts another with the same low 20 bits of h. By ingesting
  many thousands of chunks one can learn the low 20 bits of T, for these bits of h depend on no others; the other 44
  bits of h remain unknown.
- What remains: two chunks of the same tokens, in which c[v] is 0 for every v, collide under any numbering. There are
  such pairs only among chunks of which nearly all places hold the same two or three tokens (two tokens at n places:
  2 ** n patterns for 64 bits), and both then consist of those tokens: no text of meaning can be replaced.

The index with which `lmcache-rag serve` replaces LMCache's compares a keyed hash of all tokens, and has neither
of the last two weaknesses. The numbers protect an LMCache that was started without it, and KV in a second tier.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmcache_rag.connector.secret import find_secret
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import ingests, named_prefix

_LENGTHS, _NAMES = 16, 256  # of named prefixes that are remembered for a tenant
_TENANTS, _ALL_NAMES = 4096, 16384

_ROUNDS = 6
_SIZE = 1 << 16


class CacheSalts:
    """Gives each request its cache_salt, which names its namespace.

    A client of ours names the length of its prefix, which applies to that request alone. Other clients' prompts name
    none: they belong to the longest prefix that they begin with of those that an ingestion request named, or else to
    their first tokens: `prefix_tokens`, or the first LMCache chunk, which holds the beginning of the system prompt.
    Only whole LMCache chunks are remembered as a prefix: a shorter one, which prompts of several applications begin
    with, would mix these. The least recently used prefix is forgotten, for each tenant separately: no tenant can have
    another's prefixes forgotten. Used by one thread.

    Args:
        model: Identity of the model, see lmcache_rag.connector.identity.
        chunk: Tokens of an LMCache chunk.
        prefix_tokens: First tokens of a prompt that stand for its prefix where no request has named it; 0: one chunk.
        key: Secret of this server and those that share KV with it: salts cannot be guessed without it.

    Raises:
        ConfigError: prefix_tokens is not a multiple of the chunk.
    """

    def __init__(self, model: str, chunk: int, *, prefix_tokens: int = 0, key: bytes = b"") -> None:
        if prefix_tokens < 0 or prefix_tokens % chunk:
            raise ConfigError(
                f"lmcache_rag.prefix_tokens is {prefix_tokens}, not a multiple of LMCache's chunk of {chunk} tokens.",
                remedy=f"For example {max(prefix_tokens // chunk, 1) * chunk}.",
            )
        self._model, self._chunk, self._key = model, chunk, key
        self._lengths = (prefix_tokens, chunk)
        # By tenant, then by (length, namespace); the latest used last.
        self._named: OrderedDict[str, OrderedDict[tuple[int, str], None]] = OrderedDict()

    def of(self, prompt: Sequence[int], tenant: str, params: Mapping[str, Any] | None, *, adapter: str = "") -> str:
        """The cache_salt of a request, 40 hex digits.

        Args:
            prompt: Its token ids.
            tenant: The cache_salt that its client sent.
            params: Its kv_transfer_params.
            adapter: Identity of its LoRA adapter; "" for the model itself.
        """
        tenant = _owner(tenant, adapter)
        length, name = self._find(prompt, tenant, params)
        named = named_prefix(params, len(prompt))
        if named and ingests(params) and length % self._chunk == 0:
            self._remember(tenant, (length, name))
        elif (length, name) in self._named.get(tenant, ()):
            self._use(tenant, (length, name))
        return name

    def peek(self, prompt: Sequence[int], tenant: str, params: Mapping[str, Any] | None) -> str:
        """As `of`, of a request without an adapter; nothing is remembered. Other threads may call it.

        Raises:
            RuntimeError: `of` was called meanwhile, and the salt is not known.
        """
        return self._find(prompt, _owner(tenant), params)[1]

    def _find(self, prompt: Sequence[int], tenant: str, params: Mapping[str, Any] | None) -> tuple[int, str]:
        """The prefix that a prompt belongs to: its length, and the name of its namespace."""
        tokens = len(prompt)
        if length := named_prefix(params, tokens):
            return length, self._names(prompt, tenant, [length])[0]
        if known := self._named.get(tenant):
            lengths = sorted({length for length, _ in known if length <= tokens})
            for length, name in reversed(list(zip(lengths, self._names(prompt, tenant, lengths), strict=True))):
                if (length, name) in known:
                    return length, name
        length = next((length for length in self._lengths if 0 < length <= tokens), self._chunk)
        return length, self._names(prompt, tenant, [length])[0]

    def _names(self, prompt: Sequence[int], tenant: str, lengths: Sequence[int]) -> list[str]:
        """Names of a prompt's prefixes of these lengths, in ascending order; each token is hashed once."""
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


def _owner(tenant: str, adapter: str = "") -> str:
    """A tenant and its adapter in one short name: a salt may be as long as its client likes."""
    owner = f"{len(adapter)}\0{adapter}{tenant}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(owner).hexdigest()


class Renumbering:
    """The permutation T of the module's docstring, for one secret.

    Args:
        secret: Any bytes; those who know them know T.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        stream = hashlib.shake_256(b"lmcache_rag tables\0" + secret).digest(_ROUNDS * _SIZE * 2)
        self._tables = np.frombuffer(stream, dtype="<u2").astype(np.uint16).reshape(_ROUNDS, _SIZE)

    def numbers(self, token_ids: Sequence[int], namespace: str) -> Any:
        """The numbers of tokens as an array of uint32."""
        ids = as_numbers(token_ids)
        name = b"lmcache_rag numbers\0" + namespace.encode("utf-8", "surrogatepass")
        keys = np.frombuffer(hmac.digest(self._secret, name, "sha256"), dtype="<u2")[:_ROUNDS].astype(np.uint16)
        left, right = (ids >> np.uint32(16)).astype(np.uint16), ids.astype(np.uint16)
        for table, key in zip(self._tables, keys, strict=True):
            left, right = right, left ^ table.take(right ^ key)
        return (left.astype(np.uint32) << np.uint32(16)) | right

    def renumbered(self, token_ids: Sequence[int], namespace: str) -> list[int]:
        """The numbers of tokens as a list."""
        numbers: list[int] = self.numbers(token_ids, namespace).tolist()
        return numbers


_process: list[Renumbering] = []  # that of this process, once it is made


def use_secret(secret: bytes) -> None:
    """Have `renumbered` use this secret from now on, in this process."""
    _process[:] = [Renumbering(secret)]


def renumbering() -> Renumbering:
    """The renumbering of this process; by the secret in the environment unless `use_secret` was called."""
    if not _process:
        use_secret(find_secret())
    return _process[0]


def renumbered(token_ids: Sequence[int], namespace: str) -> list[int]:
    """The numbers of tokens in a namespace, by this process's secret."""
    return renumbering().renumbered(token_ids, namespace)


def as_numbers(token_ids: Sequence[int]) -> Any:
    """Token ids as an array of uint32. Larger numbers (hashes of images may be) are cut to 32 bits, not rejected."""
    if isinstance(token_ids, array):
        return np.asarray(token_ids).astype(np.uint32)
    try:
        numbers = np.asarray(array("Q", token_ids))  # a third of the time that NumPy takes to read a list
    except (OverflowError, TypeError):
        numbers = np.asarray([int(token) & 0xFFFFFFFF for token in token_ids], dtype=np.uint32)
    return numbers.astype(np.uint32)
