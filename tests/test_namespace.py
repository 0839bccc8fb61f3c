"""Which requests may share KV in LMCache."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_rag.connector.namespace import Namespaces, identity, renumbered
from lmcache_rag.protocol import PREFIX

CHUNK = 64


def ids(seed: int, count: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(5, 150_000) for _ in range(count)]


def test_prompts_share_kv_behind_the_same_prefix_only() -> None:
    spaces, chunk = Namespaces("model", CHUNK), ids(9, 200)
    # They differ behind their first LMCache chunk: a long system prompt whose end was changed.
    one, other = ids(1, 100), [*ids(1, 90), *ids(2, 10)]
    first = spaces.of([*one, *chunk], "", {PREFIX: 100})
    assert spaces.of([*one, *ids(3, 50), *chunk], "", {PREFIX: 100}) == first
    assert spaces.of([*other, *chunk], "", {PREFIX: 100}) != first
    assert len(first) <= 128
    assert not set(first) & set("@/\\\0"), "LMCache takes no such salt"


def test_tenants_and_models_share_nothing() -> None:
    prompt = [*ids(1, CHUNK), *ids(2, 100)]
    spaces = Namespaces("model", CHUNK)
    names = {spaces.of(prompt, tenant, {PREFIX: CHUNK}) for tenant in ("", "a", "b", "a\0b", "\udcff", "x" * 999)}
    names.add(Namespaces("another", CHUNK).of(prompt, "", {PREFIX: CHUNK}))
    assert len(names) == 7


def test_another_client_shares_the_kv_of_the_prefix_that_its_prompt_begins_with() -> None:
    spaces, prefix = Namespaces("model", CHUNK), ids(1, 2 * CHUNK)
    asked = [*prefix, *ids(2, 300)]
    alone = spaces.of(asked, "", None)
    assert alone == spaces.of([*prefix[:CHUNK], *ids(3, 300)], "", {}), "by the first LMCache chunk"
    named = spaces.of([*prefix, *ids(4, 200)], "", {PREFIX: len(prefix)})
    assert spaces.of(asked, "", None) == named != alone
    longer = spaces.of([*prefix, *ids(5, CHUNK)], "", {PREFIX: 3 * CHUNK})
    assert spaces.of(asked, "", None) == named, "it does not begin with the longer one"
    assert spaces.of([*prefix, *ids(5, 200)], "", None) == longer
    assert spaces.of(asked, "tenant", None) != named, "no tenant learns of another's prefixes"


@pytest.mark.parametrize("wrong", [0, -1, 10_000, True, "64", None, 6.4])
def test_a_prefix_that_cannot_be_is_taken_for_none(wrong: Any) -> None:
    spaces, prompt = Namespaces("model", CHUNK), ids(1, 300)
    assert spaces.of(prompt, "", {PREFIX: wrong}) == spaces.of(prompt, "", None)
    assert spaces.of(prompt[:10], "", None) != spaces.of(prompt, "", None)
    spaces.of([], "", None)


def test_prefixes_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, lengths in (("_NAMES", (100, 100, 100)), ("_LENGTHS", (100, 101, 102))):
        with monkeypatch.context() as patch:
            patch.setattr(f"lmcache_rag.connector.namespace.{limit}", 2)
            spaces = Namespaces("model", CHUNK)
            prefixes = [ids(n, length) for n, length in enumerate(lengths)]
            named = [spaces.of(prefix, "", {PREFIX: len(prefix)}) for prefix in prefixes]
            assert spaces.of(prefixes[0], "", None) != named[0]
            assert [spaces.of(prefix, "", None) for prefix in prefixes[1:]] == named[1:]


def test_tokens_have_other_numbers_in_each_namespace() -> None:
    tokens = [0, 1, 2**18, 151_000, 1, 0]
    one, other = renumbered(tokens, "one"), renumbered(tokens, "other")
    assert one == renumbered(tokens, "one")
    assert one[0] == one[5] and one[1] == one[4] and len(set(one)) == 4, "which are equal stays so"
    assert not set(one) & set(other)
    assert all(0 <= number < 2**32 for number in one + other), "LMCache hashes 32 bits of each"
    assert renumbered([], "one") == []
    # LMCache puts hashes of pictures among the tokens.
    assert renumbered([-1, 2**40 + 3], "one") == renumbered([2**32 - 1, 3], "one")
    assert renumbered([2**63 + 3], "one") == renumbered([3], "one")
    assert renumbered((0, 1), "one") == renumbered([0, 1], "one")
    assert renumbered([], "one") == []


class Config:
    _commit_hash: str | None = None

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def to_dict(self) -> dict[str, Any]:
        return {"_name_or_path": "anything", "rope_theta": 1e4, "torch_dtype": torch.bfloat16} | self._facts


def config(folder: Path, *, commit: str | None = None, cache: str = "auto", hf: Any = None, **model: Any) -> Any:
    hf = hf or Config()
    hf._commit_hash = commit
    facts = {"model": str(folder), "dtype": torch.bfloat16, "quantization": None, "revision": None, "hf_config": hf}
    return SimpleNamespace(
        model_config=SimpleNamespace(**facts | model), cache_config=SimpleNamespace(cache_dtype=cache)
    )


def test_what_a_model_is(tmp_path: Path) -> None:
    def weights(folder: str, middle: bytes) -> Path:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(bytes(200_000) + middle + bytes(200_000))
        (tmp_path / folder / "README.md").write_text(folder)
        return tmp_path / folder

    here = weights("here", b"1")
    same = identity(config(here))
    assert identity(config(weights("a copy elsewhere", b"1"))) == same
    others = [
        config(weights("trained further", b"2")),
        config(here, commit="abc"),
        config(here, revision="v2"),
        config(here, dtype=torch.float16),
        config(here, quantization="fp8"),
        config(here, cache="fp8"),
        config(here, hf=Config(rope_theta=5e5)),
        config(Path("some-org/some-model")),
        config(Path("some-org/some-model"), commit="abc"),
    ]
    assert len({same, *(identity(other) for other in others)}) == 10


def test_a_model_that_cannot_be_told_shares_with_nobody(caplog: pytest.LogCaptureFixture) -> None:
    odd = SimpleNamespace(model_config=SimpleNamespace(hf_config=Config(labels={1: "a", "1": "b"})), cache_config=None)
    assert identity(odd) != identity(odd)
    assert "no KV of an earlier start is used" in caplog.text


def test_numbers_that_are_no_tokens_do_not_end_the_scheduler() -> None:
    wide = [2**40 + 5, -1, 7]
    assert all(0 <= number < 2**32 for number in renumbered(wide, "one"))
    Namespaces("model", CHUNK).of(wide * 40, "", None)
