"""The faults of LMCache and vLLM in docs/upstream.md are there still: where one is gone, its guard can go too."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "upstream.md"
LACKING = not all(map(importlib.util.find_spec, ("vllm", "lmcache")))
pytestmark = pytest.mark.skipif(LACKING, reason="needs vLLM and LMCache")


def examples() -> list[tuple[str, str]]:
    """Each Python example, with the heading it stands under."""
    sections = [part.partition("\n") for part in re.split(r"^#+ ", DOCUMENT.read_text(), flags=re.MULTILINE)]
    found = [
        (title, code) for title, _, text in sections for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]
    assert len(found) == DOCUMENT.read_text().count("```python") > 5
    return found


@pytest.mark.parametrize(("title", "code"), examples(), ids=[title[:40] for title, _ in examples()])
def test_a_fault_is_there_still(title: str, code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith("fault"), f"fixed, so its guard can go: {title}"
