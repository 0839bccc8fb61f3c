"""The check at start, on a real model's layers over a paged cache: what is right passes, what is wrong does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checked_kit import BLOCK, BLOCKS, CheckedModel
from models import tiny_model

from lmcache_rag.connector import self_check
from lmcache_rag.connector.attention import PagedAttention
from lmcache_rag.connector.model_runner import GpuCopy
from lmcache_rag.connector.self_check import Finding, Prompt, compare_with_prefill
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.protocol import CannotBlend

VOCABULARY = 2000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every small step take far longer where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> HFModel:
    return HFModel.wrap(tiny_model("llama", "yarn", vocab_size=VOCABULARY), None)


def check(model: CheckedModel, longest: int = 512) -> dict[str, Finding]:
    return {finding.name: finding for finding in compare_with_prefill(model, vocabulary=VOCABULARY, longest=longest)}


def wrong(model: CheckedModel) -> set[str]:
    return {name for name, finding in check(model).items() if not finding.holds}


ALL = {
    "KV moved by a table",
    "attention sums of the selection",
    "hidden states of a blend",
    "hidden states of its last token",
    "logits of a blend",
    "logits of its last token",
}


@pytest.mark.parametrize(("layout", "most"), [("NHD", 8192), ("packed", 64)])
def test_a_blend_that_is_right_passes(model: HFModel, layout: str, most: int) -> None:
    found = check(CheckedModel(model, layout=layout, max_tokens=most))
    assert set(found) == ALL
    assert all(finding.holds for finding in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_fault(dtype: torch.dtype) -> None:
    weights = tiny_model("llama", num_hidden_layers=8, vocab_size=VOCABULARY).to(dtype)
    checked = CheckedModel(HFModel.wrap(weights, None))
    checked.caches = [(keys.to(dtype), values.to(dtype)) for keys, values in checked.caches]
    found = check(checked)
    assert all(finding.holds for finding in found.values())
    assert found["logits of a blend"].difference > 1e-4, "there is rounding"


def table(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are moved by the angles of another base."""
    model.theta = 0.5


def copies(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk KV is not copied to its places."""
    monkeypatch.setattr(GpuCopy, "run", lambda *given: None)


def mask(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blend's rows see what is after them: a causal mask that is aligned with the end of the sequence."""

    def begin(self: Any) -> None:
        self.positions, self.visible = torch.full_like(self.positions, self.end - 1), None

    monkeypatch.setattr(PagedAttention, "__post_init__", begin)


def positions(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blend computes each token one position too early."""
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, at, slots, attention: forward(ids, (at - 1).clamp(min=0), slots, attention)
    )


def writes(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blend's KV is written to other blocks, where nobody looks for it."""
    forward = model.forward
    last = BLOCKS * BLOCK - 1
    monkeypatch.setattr(
        model, "forward", lambda ids, at, slots, attention: forward(ids, at, slots * 0 + last, attention)
    )


def sums(model: CheckedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention that the selection adds up is no number."""
    monkeypatch.setattr(PagedAttention, "add_mass", lambda self, q, k, scale, lse, mass, **more: mass.fill_(torch.nan))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (table, {"KV moved by a table"}),
        (copies, {"KV moved by a table"}),
        (mask, ALL - {"KV moved by a table", "attention sums of the selection"}),
        (positions, ALL - {"KV moved by a table", "attention sums of the selection"}),
        (writes, ALL - {"KV moved by a table", "attention sums of the selection"}),
        (sums, {"attention sums of the selection"}),
    ],
)
def test_what_is_wrong_is_found(
    model: HFModel, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], found: set[str]
) -> None:
    checked = CheckedModel(model)
    fault(checked, monkeypatch)
    assert wrong(checked) >= found


def test_what_is_no_number_does_not_hold() -> None:
    assert Finding("x", 0.1, 0.1).holds
    assert not Finding("x", 0.11, 0.1).holds
    assert not Finding("x", float("nan"), 0.1).holds


def test_the_bound_is_four_times_what_chunkings_differ() -> None:
    size = torch.ones(2, 8)
    noise, four, five = (size + apart for apart in (0.01, 0.039, 0.041))

    def holds(got: torch.Tensor) -> bool:
        return self_check._compared("x", [size, noise, size, torch.cat([got, got[-1:]])])[0].holds

    assert [holds(got) for got in (noise, four, five)] == [True, True, False]


def test_only_used_blocks_are_touched_and_cleared(model: HFModel) -> None:
    checked = CheckedModel(model)
    check(checked)
    for caches in checked.caches:
        for one in caches:
            assert one[0].isnan().all(), "vLLM's null block"
            cleared = (one == 0).flatten(1).all(1)
            assert cleared.any()
            assert one[~cleared].isnan().all()


def test_blocks_are_cleared_after_an_error_too(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = CheckedModel(model)
    monkeypatch.setattr(checked, "copies", lambda longest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(checked)
    assert not (checked.caches[0][0] == self_check._STALE).any()


@pytest.mark.parametrize("longest", [170, 300])
def test_a_short_context_gets_a_short_prompt(longest: int) -> None:
    prompt = Prompt.of(vocabulary=100, block=16, longest=longest)
    assert len(prompt.ids) <= longest
    assert all((end - start) % 16 == 0 for start, end in prompt.spans)
    assert set(prompt.ids) <= set(range(100))
    assert prompt == Prompt.of(vocabulary=100, block=16, longest=longest), "each rank draws the same"


def test_where_it_does_not_fit_there_is_an_error(model: HFModel) -> None:
    with pytest.raises(ValueError, match="too short"):
        check(CheckedModel(model), longest=100)
    with pytest.raises(ValueError, match="too small"):
        check(CheckedModel(model, blocks=12))


# -- at start -----------------------------------------------------------------------------------------------------


CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(
        get_vocab_size=lambda: VOCABULARY, max_model_len=512, enforce_eager=True, model="/no/folder", hf_config=None
    ),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    cache_config=SimpleNamespace(block_size=BLOCK),
    compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=object())}),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path))
    return tmp_path / "self-check"


def start(model: Any, votes: Callable[[bool], bool] = bool) -> Any:
    return self_check.run_self_check(CONFIG, model, votes)


def test_it_runs_once_for_a_model_and_build(model: HFModel, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcache_rag")
    checked = CheckedModel(model)
    assert start(checked) is None
    assert "a blend equals a full prefill" in caplog.text
    ran = len(checked.passes)
    assert start(checked) is None
    assert len(checked.passes) == ran, "it is remembered"
    (file,) = cache.iterdir()
    for damage in (b"", b"\xff\xfe", b"another"):
        file.write_bytes(damage)
        assert start(checked) is None
        assert len(checked.passes) > ran, "a damaged file costs a check"
        ran = len(checked.passes)
    checked.theta = 0.5
    assert start(checked) is None, "what passed is not run again"


def test_a_wrong_table_switches_blending_off(model: HFModel, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    checked = CheckedModel(model)
    checked.theta = 0.5
    reason = start(checked)
    assert reason.code == CannotBlend.SELF_CHECK
    assert "KV moved by a table differ by" in reason.detail
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("BLENDING IS OFF: the self-check at start failed")
    assert not cache.exists(), "a start that failed is checked again"


def test_an_error_in_the_check_switches_blending_off(
    model: HFModel, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reason = start(CheckedModel(model, blocks=12))
    assert reason.code == CannotBlend.SELF_CHECK_ERROR
    assert "could not run: ValueError: a KV cache of 12 blocks" in reason.detail
    assert "BLENDING IS OFF" in caplog.text
    assert not cache.exists()


def test_ranks_skip_the_check_together_or_not_at_all(model: HFModel, cache: Path) -> None:
    checked = CheckedModel(model)
    assert start(checked) is None
    ran = len(checked.passes)
    votes: list[bool] = []

    def another_has_not(fine: bool) -> bool:
        votes.append(fine)
        return fine and len(votes) > 1

    assert start(checked, another_has_not) is None
    assert votes == [True, True]
    assert len(checked.passes) > ran


def test_a_rank_that_passed_follows_one_that_failed(model: HFModel, cache: Path) -> None:
    reason = start(CheckedModel(model), lambda fine: False)
    assert reason.code == CannotBlend.OTHER_RANK
    assert not cache.exists()


def test_an_unwritable_folder_costs_one_check_only(
    model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "file"))
    assert start(CheckedModel(model)) is None


def test_old_files_are_removed(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(self_check, "_MOST_PASSED", 3)
    for number in range(6):
        self_check.remember_passed(f"check{number}")
        os.utime(cache / f"check{number}", (number, number))
    assert [self_check.has_passed(f"check{number}") for number in range(6)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(self_check, "identity", lambda config: "other weights"),
        lambda patch: patch.setattr(self_check, "_installed_version", lambda package: "9.9"),
        lambda patch: patch.setattr(self_check, "_code_digest", lambda: "other code"),
        lambda patch: patch.setattr(CONFIG.parallel_config, "tensor_parallel_size", 2),
        lambda patch: patch.setattr(torch.version, "cuda", "99.0"),
    ],
)
def test_another_model_or_build_is_checked(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    name = self_check.check_name(CONFIG)
    assert name == self_check.check_name(CONFIG) != ""
    change(monkeypatch)
    assert self_check.check_name(CONFIG) != name


def test_what_cannot_be_named_is_not_remembered(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert self_check.check_name(SimpleNamespace()) == ""
    assert "at each start" in caplog.text
    self_check.remember_passed("")
    assert not self_check.has_passed("")
    assert not cache.exists()


def test_changed_policies_and_kernels_are_rechecked(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(self_check.Path, "read_bytes", lambda file: read.append(file.name) or b"")
    self_check._code_digest()
    assert {"policies.py", "blend_pass.py", "kernels.py"} <= set(read)
