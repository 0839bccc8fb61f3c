"""bench quality reads the files of LMCache's rag-qa-quality workload as LMCache does, and scores as it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lmcache.cli.commands.bench.engine_bench.quality.dataset")

from lmcache.cli.commands.bench.engine_bench.quality import prompts, scoring
from lmcache.cli.commands.bench.engine_bench.quality.dataset import load_samples

from lmcache_rag.bench.quality.data import read_samples
from lmcache_rag.bench.quality.scores import f1
from lmcache_rag.bench.quality.tasks import TAGS_INSTRUCTION, get_style
from lmcache_rag.prompt import PromptFormat

RECORDS = [
    {"id": "a", "question": "Q?", "answer": "x", "answer_aliases": ["y"], "paragraphs": [{"title": "T", "text": "B"}]},
    {"_id": "b", "question": "Q?", "answer": ["x", "z"], "context": [["T", ["One. ", "Two."]], ["U", ["Three."]]]},
    {"question": "Q?", "answer": "x", "context": {"title": ["T"], "sentences": [["One. ", "Two."]]}},
    {"query": "Q?", "answers": [["x"], "y"], "ctxs": [{"title": "T", "text": "B"}, "plain"]},
    {"user_input": "Q?", "reference": "x", "retrieved_contexts": ["p", "q"]},
    {"question": "Q?", "answer": "x", "contexts": ["p"], "extra": {"answer_aliases": ["w"]}},
]


def test_files_are_read_as_lmcache_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(RECORDS))
    theirs = load_samples(str(path))
    ours = read_samples(path)
    assert [(s.question, list(s.passages), list(s.answers)) for s in ours] == [
        (s.question, s.documents, s.answers) for s in theirs
    ]
    assert [s.sample_id for s in ours] == [s.sample_id for s in theirs]


@pytest.mark.parametrize("text", ["The Eiffel Tower!", "rome", "", "a b c", "It is in Rome, the city."])
def test_answers_are_scored_as_lmcache_scores_them(text: str) -> None:
    for gold in (["Rome"], ["the Eiffel tower", "c b"], ["city of Rome"]):
        assert f1(text, gold) == pytest.approx(scoring.best_f1(text, gold))


@pytest.mark.parametrize(
    "text",
    [
        "<final_answer>x</final_answer>",
        "<FINAL_ANSWER> x",
        "no",
        "<final_answer>a</final_answer> <final_answer>b</final_answer>",
    ],
)
def test_tags_are_read_as_lmcache_reads_them(text: str) -> None:
    assert get_style("tags").answer(text) == scoring.extract_final_answer(text)


def test_the_style_has_lmcaches_words() -> None:
    form = get_style("tags").format(PromptFormat())
    assert form.question == prompts.QA_QUESTION_TEMPLATE
    assert prompts.QA_SYSTEM_PROMPT.startswith(TAGS_INSTRUCTION)
