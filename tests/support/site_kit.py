"""The documentation as a site, built in an environment of its own, as `make docs` builds it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 900.0  # against hanging


class Site:
    """The site and what builds it.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv, self.html = folder, folder / "venv", folder / "site"
        done = subprocess.run(
            ["make", "docs", f"DOCS_VENV={self.venv}", f"SITE={self.html}"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def pages(self) -> list[Path]:
        """All of its pages."""
        return sorted(self.html.rglob("*.html"))

    def copy(self) -> Path:
        """A new copy of all that the site is built from."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns("node_modules", "build", "__pycache__", "*.jsonl")
        for name in ("docs", "examples", "benchmarks", ".ci"):
            shutil.copytree(ROOT / name, copy / name, ignore=None if name == "docs" else ignored)
        for file in [*ROOT.glob("*.md"), *ROOT.glob("*.yml")]:
            shutil.copy(file, copy)
        return copy

    def build(self, copy: Path) -> subprocess.CompletedProcess[str]:
        """Build a changed copy."""
        command = [str(self.venv / "bin" / "mkdocs"), "build", "--strict", "--site-dir", str(copy / "site")]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S, check=False)
