"""The page of `plan` in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_kit import lines_of_readable_page
from typer.testing import CliRunner

from lmcache_rag.cli.app import app

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("chunks", "gigabytes"), [(3000, 20), (3000, 0.1), (40, 900)])
def test_all_texts_of_the_curve_can_be_read(tmp_path: Path, chunks: int, gigabytes: float) -> None:
    path = tmp_path / "page.html"
    words = f"plan --layers 32 --kv-heads 8 --head-size 128 --questions 1500 --chunks {chunks} --l1-gb {gigabytes}"
    result = CliRunner().invoke(app, [*words.split(), "--tier", "disk:1000:8", "--report", str(path)])
    assert result.exit_code == 0, result.output
    assert lines_of_readable_page(path) == 3
