"""How contracts with vLLM and LMCache are checked."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK, CHUNK = 16, 64


def missing() -> bool:
    """Whether vLLM or LMCache is not installed."""
    return importlib.util.find_spec("vllm") is None or importlib.util.find_spec("lmcache") is None


def vllm_folder() -> Path:
    """Where vLLM's sources are."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def takes(function: Callable[..., Any], *names: str) -> None:
    """The function has these parameters, and no others that must be given."""
    parameters = inspect.signature(function).parameters
    for name in names:
        assert name in parameters, f"{function.__qualname__} has no {name}"
    must = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert set(must) <= {*names, "self"}, f"{function.__qualname__} asks for {must}"


def source(module: str, owner: str, name: str) -> ast.FunctionDef:
    """A method as it stands in vLLM's source, of modules that cannot be imported here."""
    tree = ast.parse((vllm_folder() / module).read_text())
    holder = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner)
    return next(n for n in holder.body if isinstance(n, ast.FunctionDef) and n.name == name)


def sets(owner: type, *names: str) -> None:
    """The constructor of a class sets these attributes."""
    text = inspect.getsource(owner)
    for name in names:
        assert f"self.{name} =" in text or f"self.{name}:" in text or hasattr(owner, name), f"{owner.__name__}.{name}"


def request(name: str, tokens: list[int], hasher: Any, params: dict[str, Any] | None = None) -> Any:
    """A request as vLLM's scheduler has it."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=64, extra_args={"kv_transfer_params": params} if params else None)
    return Request(name, tokens, sampling, None, block_hasher=hasher)
