"""bench quality: questions from files, generated questions, and the styles of a prompt."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.bench.quality.arms import DEFAULT, Arm, parse_arms
from lmcache_rag.bench.quality.data import Sample, read_samples
from lmcache_rag.bench.quality.tasks import ALL_TASKS, STYLES, Cell, get_style, make_samples, parse_cells, parse_tasks
from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptBuilder, PromptFormat, SafeTokenizer

DATA = Path(__file__).parents[2] / "examples" / "data"


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Files


def test_our_own_form_is_read(tmp_path: Path) -> None:
    first = {"question": "Who?", "answers": ["Ada", "Ada L."], "passages": ["One.", "Two.", "One."], "task": "names"}
    path = write(tmp_path / "mine.jsonl", first, {"question": "When?", "answer": "1815"})
    one, two = read_samples(path)
    assert (one.question, one.answers, one.passages) == ("Who?", ("Ada", "Ada L."), ("One.", "Two."))
    assert (one.cell, one.task, one.sample_id) == ("mine", "names", "0")
    assert (two.answers, two.passages, two.task, two.sample_id) == (("1815",), (), "mine", "1")
    assert len(read_samples(path, limit=1)) == 1
    assert read_samples(path, "tags")[0].cell == "mine:tags"


def test_forms_of_lmcaches_workload_are_read(tmp_path: Path) -> None:
    musique = {
        "id": "2hop__1",
        "question": "Where?",
        "answer": "Rome",
        "answer_aliases": ["Roma"],
        "paragraphs": [{"title": "A", "paragraph_text": "Text A."}, {"title": "B", "paragraph_text": "Text B."}],
    }
    hotpot = {"_id": "h", "question": "Q?", "answer": "yes", "context": [["T", ["One. ", "Two."]], ["U", ["Three."]]]}
    parquet = {"question": "Q?", "answer": "no", "context": {"title": ["T"], "sentences": [["One. ", "Two."]]}}
    ragas = {"user_input": "Q?", "reference": "r", "retrieved_contexts": ["x", "y"]}
    read = read_samples(write(tmp_path / "a.jsonl", musique, hotpot, parquet, ragas))
    assert [sample.passages for sample in read] == [
        ("A\nText A.", "B\nText B."),
        ("T\nOne. Two.", "U\nThree."),
        ("T\nOne. Two.",),
        ("x", "y"),
    ]
    assert read[0].answers == ("Rome", "Roma")
    assert [sample.sample_id for sample in read] == ["2hop__1", "h", "2", "3"]
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps([musique, hotpot]))
    assert [sample.question for sample in read_samples(whole)] == ["Where?", "Q?"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "Q?"}\n', "line 1 has no answer"),
        ('\n{"answers": ["a"]}\n', "line 2 has no question"),
        ("[1]\n", "line 1 is not an object"),
        ("{\n", "cannot be read"),
        ("", "holds no questions"),
        ('{"question": "Q?", "answers": ["a"], "context": "One long text."}\n', "line 1: its passages are one text"),
        ('{"question": "Q?", "answers": ["a"], "passages": "One long text."}\n', "line 1: its passages are one text"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)) as problem:
        read_samples(path)
    assert "passages" in problem.value.remedy


def test_parquet_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Parquet") as problem:
        read_samples(tmp_path / "x.parquet")
    assert "docs/quality.md" in problem.value.remedy


def test_equal_names_in_a_file_are_told_apart(tmp_path: Path) -> None:
    same = {"id": "a", "question": "Q?", "answers": ["x"]}
    assert [s.sample_id for s in read_samples(write(tmp_path / "a.jsonl", same, same))] == ["a", "a#2"]


def test_shipped_questions_are_answered_by_their_files() -> None:
    rows = [json.loads(line) for line in (DATA / "quality.jsonl").read_text().splitlines()]
    assert len(rows) >= 40
    for row in rows:
        text = " ".join((DATA / "documents" / row["document"]).read_text().split())
        assert row["evidence"] in text
        passage = f"{row['section']}: {row['evidence']}"
        assert any(answer.lower() in passage.lower() for answer in row["answers"]), row["id"]
    assert [sample.question for sample in read_samples(DATA / "quality.jsonl")] == [row["question"] for row in rows]


# Generated questions


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Any:
    return SafeTokenizer.of(tokenizer).text


@pytest.mark.parametrize(("chunks", "tokens"), [(3, 512), (8, 160), (20, 64), (1, 96)])
def test_passages_have_exactly_so_many_tokens(encode: Any, chunks: int, tokens: int) -> None:
    samples = make_samples(Cell(chunks, tokens), 12, encode, tasks=ALL_TASKS)
    assert {len(sample.passages) for sample in samples} == {chunks}
    assert {len(encode(text)) for sample in samples for text in sample.passages} == {tokens}
    assert all(len(set(sample.passages)) == chunks for sample in samples)


def test_every_question_is_answered_by_its_passages(encode: Any) -> None:
    samples = make_samples(Cell(6, 128), 36, encode, tasks=ALL_TASKS)
    assert {sample.task for sample in samples} == set(ALL_TASKS)
    for sample in samples:
        assert any(answer in text for answer in sample.answers for text in sample.passages), sample
    assert len({sample.sample_id for sample in samples}) == 36


def test_two_hops_need_two_passages(encode: Any) -> None:
    for sample in make_samples(Cell(6, 128), 20, encode, tasks=["two-hop", "reference"]):
        subject = re.findall(r"(?:mayor of|parcel for) (\w+)", sample.question)[0]
        naming = next(text for text in sample.passages if f"mayor of {subject}" in text or f"for {subject} is" in text)
        assert sample.answers[0] not in naming


def test_a_referent_stands_before_its_reference(encode: Any) -> None:
    for sample in make_samples(Cell(6, 128), 20, encode, tasks=["reference"]):
        referring = next(
            i for i, t in enumerate(sample.passages) if f"for {sample.question.split()[7].strip('?')}" in t
        )
        entry = re.search(r"the parcel of entry (\d+)", sample.passages[referring])
        assert entry is not None
        assert f"Entry {entry[1]}: " in " ".join(sample.passages[:referring])


def test_questions_are_the_same_again_in_every_style(encode: Any) -> None:
    cell = Cell(4, 96)
    first = make_samples(cell, 10, encode)
    assert first == make_samples(cell, 10, encode)
    assert first != make_samples(cell, 10, encode, seed=1)
    tagged = make_samples(Cell(4, 96, "tags"), 10, encode)
    assert [s.passages for s in tagged] == [s.passages for s in first]
    assert {s.cell for s in tagged} == {"4x96:tags"}
    assert not any("few words" in s.question for s in tagged)  # the style asks for its own form


def test_passages_too_short_for_a_task_are_refused(encode: Any) -> None:
    with pytest.raises(ConfigError, match="does not hold") as problem:
        make_samples(Cell(4, 20), 12, encode, tasks=["reference"])
    assert "longer passages" in problem.value.remedy


def test_cells_and_tasks_are_read_from_the_options() -> None:
    cells = parse_cells("6x512, 8x160:tags,6x512")
    assert cells == [Cell(6, 512), Cell(8, 160, "tags")]
    assert [cell.name for cell in cells] == ["6x512", "8x160:tags"]
    assert parse_cells("2x64,3x64:after", "around") == [Cell(2, 64, "around"), Cell(3, 64, "after")]
    tasks = parse_cells("8x160:russian,8x160:conversation:after,8x160:two-hop", "tags")
    assert [(cell.task, cell.style) for cell in tasks] == [
        ("russian", "tags"),
        ("conversation", "after"),
        ("two-hop", "tags"),
    ]
    assert [cell.name for cell in tasks] == ["8x160:russian:tags", "8x160:conversation:after", "8x160:two-hop:tags"]
    assert parse_tasks("needle,russian") == ["needle", "russian"]
    assert "russian" not in parse_tasks("")
    for wrong in ("6", "6x8", "0x64", "6x512:none", "6x512:tags:after", "6x512:fact:needle"):
        with pytest.raises(ConfigError):
            parse_cells(wrong)
    with pytest.raises(ConfigError, match="no task"):
        parse_tasks("facts")


def test_a_cell_with_a_task_has_that_task_only(encode: Any) -> None:
    samples = make_samples(Cell(3, 64, task="needle"), 4, encode)
    assert {(sample.task, sample.cell, sample.gated) for sample in samples} == {("needle", "3x64:needle", True)}


def test_russian_answers_are_a_number_or_one_word(encode: Any) -> None:
    samples = make_samples(Cell(3, 160, task="russian"), 240, encode)
    assert len(samples) == 240
    assert len({re.sub(r"[А-ЯЁ]\w+", "", sample.question) for sample in samples}) >= 6
    assert not any(sample.gated for sample in samples)  # only reported
    for sample in samples[:24]:
        assert all(re.fullmatch(r"\d+|[А-Яа-яё]+", answer) for answer in sample.answers)
        town = re.findall(r"(\w+)\?", sample.question)[0]
        [own] = [text for text in sample.passages if town in text]
        assert sample.answers[0] in own
        assert not re.search(r"[a-z]{2}", "".join(sample.passages))


# Conversations


@pytest.fixture(scope="module")
def talk(encode: Any) -> list[Sample]:
    samples = make_samples(Cell(5, 96, task="conversation"), 3, encode)
    assert [sample.task for sample in samples] == [f"turn {number}" for number in range(1, 7)] * 3
    return samples[6:12]


def test_only_the_first_question_names_the_town(talk: list[Sample]) -> None:
    town = next(word for word in re.findall(r"[A-Z]\w+", talk[0].question)[::-1] if word not in ("Answer", "In"))
    assert not any(town in sample.question for sample in talk[1:])
    assert all("that town" in sample.question for sample in talk[1:])
    for sample in talk:
        assert any(town in text and sample.answers[0] in text for text in sample.passages)


def test_half_the_passages_of_a_turn_stay(talk: list[Sample]) -> None:
    for before, after in itertools.pairwise(talk):
        assert len(set(before.passages) & set(after.passages)) == 2
        assert before.passages != after.passages
    assert all(len(set(sample.passages)) == 5 for sample in talk)


def test_each_turn_follows_the_earlier_ones(talk: list[Sample]) -> None:
    history: tuple[str, ...] = ()
    for sample in talk:
        assert sample.history == history
        history += (sample.question.removesuffix(" Answer in a few words."), sample.answers[0])


def test_conversations_are_as_long_as_asked(encode: Any) -> None:
    cell = Cell(1, 64, task="conversation")
    assert len(make_samples(cell, 2, encode, turns=8)) == 16
    with pytest.raises(ConfigError, match="9 turns"):
        make_samples(cell, 1, encode, turns=9)


# Styles


def test_a_style_keeps_what_counts_of_an_answer() -> None:
    tags, reason = get_style("tags"), get_style("reason")
    assert tags.answer("so <final_answer> x </final_answer> <final_answer>Rome</final_answer> end") == "Rome"
    assert tags.answer("Rome") == tags.answer("<final_answer>Rome") == ""
    assert reason.answer("It is far.\nAnswer: Rome\n") == "Rome"
    assert reason.answer("Rome, I think") == "Rome, I think"
    assert get_style("plain").answer("Rome") == "Rome"


def test_a_style_places_question_and_instruction(smollm2_engine: Any) -> None:
    texts = {}
    for name, style in STYLES.items():
        builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info, format=style.format(PromptFormat()))
        prompt = builder.query(["First passage.", "Second passage."], "Why is that?")
        texts[name] = smollm2_engine.tokenizer.decode(prompt.token_ids)
        start = prompt.chunks[0].start
        assert (start == prompt.prefix_tokens) == (name != "around")
        assert builder.ingest("First passage.").token_ids[: len(builder.prefix_ids)] == builder.prefix_ids
        assert builder.messages(["First passage."], "Why is that?")[-1]["content"].count("Why is that?") == (
            2 if name == "around" else 1
        )
    order = {
        name: [text.index(w) for w in ("First passage", "say so")] for name, text in texts.items() if name != "tags"
    }
    assert order["plain"] == sorted(order["plain"], reverse=True)
    assert order["after"] == sorted(order["after"])
    assert texts["around"].index("Why is that?") < order["around"][0] < texts["around"].rindex("Why is that?")
    assert "<final_answer>" in texts["tags"]
    assert "step by step" in texts["reason"]


# Arms


def test_arms_are_read_from_the_command_line() -> None:
    arms = parse_arms("none,query:0.15,hkvd:1,query:tokens=400,auto,head:auto,prefix,none,all")
    assert arms[0] == Arm("full")
    by_name = {arm.name: arm for arm in arms}
    assert len(by_name) == len(arms) == 9
    assert by_name["query:0.15"].options() == BlendOptions("query", 0.15)
    assert by_name["hkvd:1"].options() == BlendOptions("hkvd", 1.0)
    assert by_name["none"].options() == BlendOptions("none", 0.0)
    assert by_name["query:tokens=400"].ratio == {"tokens": 400}
    assert (by_name["auto"].policy, by_name["auto"].ratio, by_name["head:auto"].policy) == ("query", "auto", "head")
    assert not by_name["full"].options().enabled
    assert not by_name["prefix"].options().enabled


def test_every_default_arm_can_be_requested() -> None:
    arms = parse_arms(DEFAULT)
    assert arms[0].name == "full"
    assert {"prefix", "auto", "none", "all", "query:0.15"} < {arm.name for arm in arms}
    for arm in arms:
        arm.options()


@pytest.mark.parametrize("wrong", ["query", "query:2", "query:x", "unknown:0.1", "query:tokens=", "0.15"])
def test_a_wrong_arm_is_refused_with_a_remedy(wrong: str) -> None:
    with pytest.raises(ConfigError) as problem:
        parse_arms(wrong)
    assert problem.value.remedy
