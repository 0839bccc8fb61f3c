"""Folders that are made once and are never seen half-made: weights prepared from a package."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("lmcache_rag")

MANIFEST = "lmcache-rag.json"
ENVIRONMENT = "LMCACHE_RAG_CACHE"


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

    The build goes on in a folder beside the target, which takes its place in one step: a kill at any moment leaves
    either nothing or everything. Several processes at once build it once.

    Args:
        target: The folder to make.
        build: Writes the files into the folder that it is given.
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
    """Build beside the target and put it in place. The lock is held, so every other such folder is a killed run's."""
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
    """Put a file on the disk, so that a power cut cannot leave a whole folder of empty files."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
