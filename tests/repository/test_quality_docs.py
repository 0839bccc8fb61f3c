"""The converters in docs/quality.md make files that `bench quality` reads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.bench.quality.data import read_samples

DOCUMENT = Path(__file__).parents[2] / "docs" / "quality.md"
PARAGRAPHS = [{"title": "A", "paragraph_text": "Text A."}, {"title": "B", "paragraph_text": "Text B."}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "MuSiQue": [
        {"id": "2hop__1", "question": "Where?", "answer": "Rome", "answer_aliases": ["Roma"], "paragraphs": PARAGRAPHS}
    ],
    "HotpotQA": [
        {"_id": "5a", "question": "Where?", "answer": "Rome", "context": [["A", ["Text ", "A."]], ["B", ["Text B."]]]}
    ],
    "LongBench": [
        {
            "_id": "9c",
            "input": "Where?",
            "answers": ["Rome", "Roma"],
            "context": "Passage 1:\nA\nText A.\n\nPassage 2:\nB\nText B.",
            "dataset": "hotpotqa",
        }
    ],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_converter_makes_a_file_that_is_read(name: str, tmp_path: Path) -> None:
    found = re.search(rf"^{name} \(.*?```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    source = tmp_path / "source"
    lines = [json.dumps(row) for row in ROWS[name]]
    source.write_text(json.dumps(ROWS[name]) if name == "HotpotQA" else "\n".join(lines))
    done = subprocess.run([sys.executable, "-c", found[1], source], check=True, capture_output=True, text=True)
    (tmp_path / "made.jsonl").write_text(done.stdout)
    [sample] = read_samples(tmp_path / "made.jsonl")
    assert (sample.question, sample.answers[0]) == ("Where?", "Rome")
    assert sample.passages == ("A\nText A.", "B\nText B.")
    assert sample.sample_id == str(ROWS[name][0].get("id") or ROWS[name][0]["_id"])
