"""What KV depends on beside tokens: weights, LoRA adapters, and the form that vLLM keeps KV in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_rag import protocol
from lmcache_rag.connector.identity import Adapters, facts, identity, sample


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
        model_config=SimpleNamespace(**facts | model),
        cache_config=SimpleNamespace(cache_dtype=cache, block_size=16),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        attention_config=SimpleNamespace(backend=None),
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


def test_what_is_published_tells_what_differs(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 9000)

    def differ(*changed: Any, secret: bytes = b"1" * 32, chunk: int = 64, prefix: int = 0) -> set[str]:
        base = facts(config(tmp_path / "one"), 64, b"1" * 32)
        other = facts(*(changed or (config(tmp_path / "one"),)), chunk, secret, prefix)
        assert {*base, "lmcache"} == {*protocol.SERVER_FACTS}
        return {name for name in base if base[name] != other[name]}

    assert differ() == set()
    assert differ(config(tmp_path / "other")) == {"weights"}
    assert differ(config(tmp_path / "one", dtype=torch.float16)) == {"config"}
    assert differ(config(tmp_path / "one", commit="abc")) == {"weights"}
    wider = config(tmp_path / "one")
    wider.parallel_config.tensor_parallel_size = 2
    assert differ(wider) == {"layout"}
    assert differ(secret=b"2" * 32) == differ(secret=b"") == {"secret"}
    assert differ(chunk=128) == {"chunk", "prefix_tokens"}
    assert differ(prefix=128) == {"prefix_tokens"}


def test_the_published_digest_does_not_show_the_secret(tmp_path: Path) -> None:
    import hashlib

    secret = b"1" * 32
    shown = facts(config(tmp_path), 64, secret)["secret"]
    assert len(shown) == 16
    assert shown not in (secret.hex()[:16], hashlib.sha256(secret).hexdigest()[:16])
    odd = SimpleNamespace(model_config=None, cache_config=None)
    assert set(facts(odd, 64, secret)) >= {"chunk", "secret", "lmcache_rag"}, "never raises"


def test_an_unidentified_model_shares_no_kv(caplog: pytest.LogCaptureFixture) -> None:
    odd = SimpleNamespace(model_config=SimpleNamespace(hf_config=Config(labels={1: "a", "1": "b"})), cache_config=None)
    assert identity(odd) != identity(odd)
    assert "KV of earlier runs is not reused" in caplog.text


def test_calculated_scales_are_those_of_one_run(tmp_path: Path) -> None:
    """vLLM 0.25 calculates scales of FP8 KV from whatever it sees first."""
    one = config(tmp_path, cache="fp8")
    assert identity(one) == identity(one)
    one.cache_config.calculate_kv_scales = True
    assert identity(one) != identity(one)


FORMS: dict[str, Callable[[Any], None]] = {
    "tensor parallelism": lambda one: setattr(one.parallel_config, "tensor_parallel_size", 2),
    "pipeline parallelism": lambda one: setattr(one.parallel_config, "pipeline_parallel_size", 2),
    "block": lambda one: setattr(one.cache_config, "block_size", 32),
    "backend": lambda one: setattr(one.attention_config, "backend", "FLASHINFER"),
    "random weights": lambda one: setattr(one.load_config, "load_format", "dummy"),
}


@pytest.mark.parametrize("form", FORMS)
def test_kv_of_another_form_is_other_kv(form: str, tmp_path: Path) -> None:
    """Fault B6: LMCache's second tier keeps bytes, and not the order in which they lie."""
    one = config(tmp_path)
    before = identity(one, 64)
    FORMS[form](one)
    assert identity(one, 64) != before


def test_another_vllm_layout_or_chunk_is_other_kv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = config(tmp_path)
    found = {identity(one, 64), identity(one, 256)}
    for version in ("0.25.1", "0.31.0", "0.31.0+cpu"):  # not that of a vLLM that is installed
        fake = ModuleType("vllm")
        fake.__version__ = version  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "vllm", fake)
            found.add(identity(one, 64))
            assert identity(one, 64) == identity(one, 64)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "HND")
    found.add(identity(one, 64))
    assert len(found) == 6


def safetensors(file: Path, tensors: int, nbytes: int, changed: int | None = None) -> Path:
    """A file in the format of safetensors; one tensor may be all ones."""
    names = {f"layer.{n}": {"dtype": "U8", "shape": [nbytes], "data_offsets": [n * nbytes, (n + 1) * nbytes]}
             for n in range(tensors)}  # fmt: skip
    header = json.dumps({"__metadata__": {"format": "pt"}, **names}).encode()
    body = b"".join((b"\1" if n == changed else b"\0") * nbytes for n in range(tensors))
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return file


@pytest.mark.parametrize("changed", [0, 1, 150, 298, 299])
def test_a_change_of_any_single_tensor_is_seen(tmp_path: Path, changed: int) -> None:
    """Fault B7: the beginning and the middle of each file were read, and a fine-tune may change neither."""
    before = sample(safetensors(tmp_path / "model.safetensors", 300, 10_000))
    assert sample(safetensors(tmp_path / "model.safetensors", 300, 10_000, changed)) != before


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "broken.safetensors"])
def test_a_change_of_a_tenth_of_any_file_is_seen(tmp_path: Path, name: str) -> None:
    file, size = tmp_path / name, 3_000_000
    found = set()
    for tenth in range(10):
        body = bytearray(size)
        body[tenth * size // 10 : (tenth + 1) * size // 10] = b"\1" * (size // 10)
        file.write_bytes(b"\0" * 100 + body)
        found.add(sample(tmp_path))
        assert sample(file) == sample(file)
    assert len(found) == 10


def test_a_model_in_a_single_file_is_sampled(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(100_000))
    before = identity(config(file))
    file.write_bytes(bytes(99_999) + b"1")
    assert identity(config(file)) != before


def test_the_sample_of_many_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(100):
        safetensors(tmp_path / f"model-{n}.safetensors", 50, 4000)
    read, pread = [0, 0], os.pread

    def counting(handle: int, count: int, at: int) -> bytes:
        found = pread(handle, count, at)
        read[0] += 1
        read[1] += len(found)
        return found

    monkeypatch.setattr("os.pread", counting)
    sample(tmp_path)
    assert read[0] <= 100 * (32 + 3)
    assert read[1] <= 100 * (65536 + 32 * 1024 + 2 * 65536)


def adapter(folder: Path, body: bytes, name: str = "a", number: int = 1) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(body)
    return SimpleNamespace(lora_name=name, lora_path=str(folder), lora_int_id=number)


def test_adapters_are_told_apart(tmp_path: Path) -> None:
    """Fault B1: a prompt that adapter A had answered was answered for B from A's KV."""
    known = Adapters()
    one = adapter(tmp_path / "a", bytes(9000))
    other = adapter(tmp_path / "b", bytes(8999) + b"1")
    found = {
        "",
        known.of(one),
        known.of(other),
        known.of(adapter(tmp_path / "a", bytes(9000), "another name")),
        known.of(adapter(tmp_path / "a", bytes(9000), number=2)),
    }
    assert known.of(None) == ""
    assert len(found) == 5


def test_an_adapter_is_identified_by_its_weights(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", bytes(9000))
    before = Adapters().of(one)
    assert Adapters().of(one) == before
    adapter(tmp_path / "a", bytes(8999) + b"1")
    assert Adapters().of(one) != before


def test_a_changing_adapter_shares_with_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known, one = Adapters(), adapter(tmp_path / "a", bytes(9000))
    before = known.of(one)
    adapter(tmp_path / "a", bytes(8999) + b"1")
    assert not Adapters().changed(None)
    after = known.of(one)
    assert after not in (before, Adapters().of(one))
    assert known.changed(one)
    assert known.of(one) not in (before, after), "vLLM may load the new weights at any time"
    assert known.changed(one)
    assert caplog.text.count("LoRA adapter 'a'") == 1
    assert not known.changed(adapter(tmp_path / "b", bytes(8999) + b"1"))


def test_an_adapter_loaded_again_under_its_name(tmp_path: Path) -> None:
    """Unloaded, trained further and loaded from the same path: vLLM gives it a new number, and keeps its old blocks."""
    known, one = Adapters(), adapter(tmp_path / "a", bytes(9000))
    known.of(one)
    assert not known.changed(adapter(tmp_path / "b", bytes(9000), number=2))
    again = SimpleNamespace(lora_name="a", lora_path=one.lora_path, lora_int_id=3)
    assert not known.changed(again)
    adapter(tmp_path / "a", bytes(8999) + b"1")
    assert known.changed(SimpleNamespace(lora_name="a", lora_path=one.lora_path, lora_int_id=4))
    assert known.changed(one)
    assert known.changed(again)


def test_where_vllms_blocks_know_the_name_alone(tmp_path: Path) -> None:
    """vLLM 0.25 finds blocks of an adapter for another of its name, and would store them as the other's."""
    one, two = adapter(tmp_path / "a", bytes(9000)), adapter(tmp_path / "b", bytes(8999) + b"1")
    for by_path in (True, False):
        known = Adapters(by_path=by_path)
        known.of(one)
        assert known.changed(two) is not by_path
        assert not known.changed(adapter(tmp_path / "b", bytes(8999) + b"1", "another name"))


def test_an_adapter_replaced_in_place(tmp_path: Path) -> None:
    """vLLM runs requests that came with the earlier path on the new weights."""
    known, one = Adapters(), adapter(tmp_path / "a", bytes(9000))
    known.on_loaded(one)
    before = known.of(one)
    known.on_loaded(adapter(tmp_path / "other", bytes(9000), "other", number=2))
    assert known.of(one) == before
    known.on_loaded(two := adapter(tmp_path / "b", bytes(8999) + b"1"))
    assert known.changed(one)
    assert not known.changed(two)
    assert known.of(two) not in (before, known.of(one))


def test_files_that_change_after_the_load_are_seen(tmp_path: Path) -> None:
    known, one = Adapters(), adapter(tmp_path / "a", bytes(9000))
    known.on_loaded(one)
    adapter(tmp_path / "a", bytes(8999) + b"1")
    assert known.changed(one), "vLLM has the weights of before"


def test_an_unreadable_adapter_shares_with_no_process() -> None:
    one = SimpleNamespace(lora_name="a", lora_path="some-org/no-such-adapter", lora_int_id=1)
    known = Adapters()
    assert known.of(one) == known.of(one)
    assert known.of(one) != Adapters().of(one)
