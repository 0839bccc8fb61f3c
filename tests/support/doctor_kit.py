"""A machine that has a GPU, as far as the checks of `doctor` can see."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

CONFIG = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has a GPU, as far as the checks can see: nvidia-smi, vLLM, LMCache. Returns nvidia-smi."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65.06, 81559, 12000, 9.0'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name, number in (("vllm", "0.25.1"), ("lmcache", "0.5.6")):
        folder = tmp_path / "site" / f"{name}-{number}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    folder = tmp_path / "site" / "plugin-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\nlmcache_rag = somewhere:register\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return program
