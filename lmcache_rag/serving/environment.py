"""Whether what is installed here can serve and blend: vLLM and LMCache, and LMCache's CUDA code for this PyTorch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

INSTALL = 'pip install "lmcache-rag[gpu]"'
FITTING = "vllm==0.32.0"  # pins torch 2.13, which LMCache 0.5.6's wheel is compiled for
IMPORT_S = 180
# In a process of its own: an extension that does not fit can do worse than raise.
_SAYS = "lmcache-rag: "  # others may write to stdout too
_CODE = f"""
def say(*words):
    print("\\n{_SAYS}", *words, sep="", flush=True)
try:
    import torch
    say(torch.version.cuda and torch.__version__)
    if torch.version.cuda:
        import lmcache.cuda_ops
        say("loaded")
except Exception as problem:
    say(type(problem).__name__, ": ", str(problem).replace("\\n", " "))
"""


@dataclass(frozen=True)
class CUDACode:
    """LMCache's compiled extension, without which its server loads no KV for a blend, and only its log says so.

    Attributes:
        state: "failed" when it cannot be loaded; "skipped" where there is nothing to try.
        result: What was found.
        remedy: What to do about it; empty when all is well.
    """

    state: Literal["ok", "failed", "skipped"]
    result: str
    remedy: str = ""


def missing() -> list[str]:
    """Which of vLLM and LMCache cannot be found here."""
    names = {"vllm": "vLLM", "lmcache": "LMCache"}
    return [spoken for module, spoken in names.items() if importlib.util.find_spec(module) is None]


def version(name: str) -> str:
    """Of an installed package; "" where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cuda_code(python: str = sys.executable) -> CUDACode:
    """Load LMCache's extension, as its server does. Takes seconds: PyTorch is imported.

    A wheel of LMCache is compiled for one version of PyTorch, and its metadata does not say which.

    Args:
        python: Interpreter of the environment.
    """
    if not version("lmcache"):
        return CUDACode("skipped", "needs LMCache", INSTALL)
    try:
        done = subprocess.run([python, "-c", _CODE], capture_output=True, text=True, timeout=IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return CUDACode("failed", f"was not loaded within {IMPORT_S} s", "Is the disk very slow? Try again.")
    said = [line.removeprefix(_SAYS) for line in done.stdout.splitlines() if line.startswith(_SAYS)]
    if said[:1] == ["None"]:
        return CUDACode("skipped", "PyTorch is built without CUDA")
    torch, problem, *_ = *said, "", ""
    if problem == "loaded":
        return CUDACode("ok", f"fits PyTorch {torch}")
    if done.returncode:
        problem = f"Python ended with status {done.returncode}"
    if not problem or not torch:
        words = f"PyTorch cannot be imported: {torch or problem}"
        return CUDACode("failed", words, f"{INSTALL} --force-reinstall")
    return CUDACode("failed", f"does not fit PyTorch {torch}, so nothing is blended: {problem}", _remedy(torch))


def _remedy(torch: str) -> str:
    lmcache = f"lmcache=={version('lmcache')}"
    return (
        f'pip install "{FITTING}", whose PyTorch lmcache==0.5.6 is compiled for. Or compile it for PyTorch {torch}: '
        "pip install ninja setuptools_scm grpcio-tools==1.78.0, then (this needs nvcc) "
        f"pip install --no-build-isolation --no-binary lmcache --no-deps --force-reinstall {lmcache}"
    )
