"""Packages of npm's registry that tests use: pinned, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import platformdirs

LIMIT_S = 600.0  # against hanging


def packed(name: str, version: str, sha256: str) -> tarfile.TarFile:
    """A package's files, below package/."""
    kept = platformdirs.user_cache_path("lmcache-rag-ci", appauthor=False) / f"{name}-{version}.tgz"
    if not (kept.is_file() and hashlib.sha256(kept.read_bytes()).hexdigest() == sha256):
        with tempfile.TemporaryDirectory() as folder:
            run("npm", "pack", "--silent", f"{name}@{version}", folder=Path(folder))
            (file,) = Path(folder).glob("*.tgz")
            content = file.read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256, f"not the {name} that was pinned"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(content)
    return tarfile.open(fileobj=io.BytesIO(kept.read_bytes()))


def run(*command: str, folder: Path) -> str:
    """Run npm or node; their output. They are not skipped where they are missing: the test fails."""
    assert shutil.which(command[0]), (
        f"there is no {command[0]}: install Node.js 20 or later (Debian: apt-get install npm)"
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
