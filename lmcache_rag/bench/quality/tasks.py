"""Generated questions in passages of a chosen size, and the styles of a prompt.

A cell such as ``6x512`` is a number of questions, each over 6 passages of exactly 512 tokens. They are real text,
the package's sample documents (most Russian sentences are made up), with one sentence planted in each:

    fact        a sentence that reads like its surroundings: who built what, when, what a town sells
    needle      a code, among passages with codes of the same kind
    two-hop     one passage names a town's mayor, another what that person collects
    reference   one passage refers to an entry of another one, which stands before it
    documents   a question about a real sentence of the sample documents (examples/data/quality.jsonl)
    russian     a number or a word, in Russian passages
    conversation    several questions about one town, each with passages of its own; see conversation.py

The passages of a question that do not hold its answer hold those of others. The same seed makes the same questions, in
every style.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from lmcache_rag.bench.quality.conversation import CONVERSATION, TURNS, make_conversations
from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.bench.quality.names import COLLECTED, GOODS, MONTHS, Names
from lmcache_rag.bench.quality.passages import Encode, PassageMaker, sample_data
from lmcache_rag.bench.quality.russian import HINT, RussianFacts
from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptFormat

TASKS = ("fact", "needle", "two-hop", "reference", "documents")  # by default
RUSSIAN = "russian"  # only reported: no gate depends on it
ALL_TASKS = (*TASKS, RUSSIAN)
_SPARE = 4  # passages of a cell beyond those of one prompt, at least

# Styles

TAGS_INSTRUCTION = (  # words of LMCache's rag-qa-quality workload
    "Answer the question using only the given passages. You may reason through the problem, but put only the concise "
    "final answer between <final_answer> and </final_answer>. Always emit both tags."
)
_TAGS_QUESTION = (
    "\n\nAnswer the question using only the passages above. End with exactly one concise answer in this form: "
    "<final_answer>answer</final_answer>.\n\nQuestion: {question}\nAnswer:"
)
_REASON = (
    "\nThink step by step, in at most four short sentences. Then write the answer in a last line that begins with "
    '"Answer:".'
)
_TAGGED = re.compile(r"<final_answer>\s*(.*?)\s*(</final_answer>|$)", re.IGNORECASE | re.DOTALL)
_LAST_LINE = re.compile(r"answer\W*:\W*([^\n]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Style:
    """How a prompt is worded.

    Attributes:
        name: Its name.
        max_tokens: Most tokens of an answer.
        short: Whether generated questions ask for a short answer.
    """

    name: str
    max_tokens: int = 48
    short: bool = True

    def format(self, base: PromptFormat) -> PromptFormat:
        """The prompt's texts in this style, made from the user's own."""
        if self.name == "after":
            instruction = base.instruction.replace("passages below", "passages above")
            return replace(base, instruction="", question=f"{base.question}\n\n{instruction}")
        if self.name == "around":
            return replace(base, context_head="\n\n", lead="Question: {question}\n\nPassages:\n\n")
        if self.name == "tags":
            return replace(base, system="", instruction=TAGS_INSTRUCTION, question=_TAGS_QUESTION)
        if self.name == "reason":
            return replace(base, question=base.question + _REASON)
        return base

    def answer(self, text: str) -> str:
        """The part of the model's text that counts as its answer; "" if it does not keep to the form."""
        if self.name == "tags":
            found = _TAGGED.findall(text)
            return found[-1][0] if found and found[-1][1] else ""
        if self.name == "reason":
            lines = _LAST_LINE.findall(text)
            return lines[-1] if lines and lines[-1] else text
        return text


STYLES = {
    style.name: style
    for style in (
        Style("plain"),
        Style("after"),
        Style("around"),
        Style("tags", max_tokens=128, short=False),
        Style("reason", max_tokens=192, short=False),
    )
}


def get_style(name: str) -> Style:
    """The style of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in STYLES:
        raise ConfigError(f"There is no style {name!r}.", remedy=f"Choose one of: {', '.join(STYLES)}.")
    return STYLES[name]


# Cells


@dataclass(frozen=True)
class Cell:
    """A size of the prompt, its style, and its only task ("": those of the run)."""

    chunks: int
    tokens: int
    style: str = "plain"
    task: str = ""

    @property
    def name(self) -> str:
        """For example "8x160", "8x160:tags" or "8x160:russian"."""
        style = "" if self.style == "plain" else self.style
        return ":".join(filter(None, (f"{self.chunks}x{self.tokens}", self.task, style)))


def parse_cells(text: str, style: str = "plain") -> list[Cell]:
    """Cells from a text such as "3x512,8x160:tags,8x160:russian".

    Args:
        text: The cells, with commas between them.
        style: Style of those that name none.

    Raises:
        ConfigError: One has another form, or a style or task that does not exist.
    """
    cells = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        form = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)((?::[\w-]+){0,2})", part)
        if not form or not 1 <= int(form[1]) <= 1000 or not 32 <= int(form[2]) <= 100_000:
            raise ConfigError(
                f"{part!r} is not a cell.",
                remedy="Write passages x tokens (32 and more), for example 8x160, 8x160:tags or 8x160:russian.",
            )
        names = form[3].split(":")[1:]
        tasks = [name for name in names if name in (*ALL_TASKS, CONVERSATION)]
        styles = [name for name in names if name not in tasks]
        if len(tasks) > 1 or len(styles) > 1:
            raise ConfigError(f"{part!r} names two of a kind.", remedy="Name at most one style and one task.")
        if styles and styles[0] not in STYLES:
            raise ConfigError(
                f"There is no style or task {styles[0]!r}.",
                remedy=f"Choose one of: {', '.join((*STYLES, *ALL_TASKS, CONVERSATION))}.",
            )
        cells.append(Cell(int(form[1]), int(form[2]), get_style((styles or [style])[0]).name, "".join(tasks)))
    return list(dict.fromkeys(cells))


def parse_tasks(text: str) -> list[str]:
    """Names of tasks from a text with commas.

    Raises:
        ConfigError: There is no such task.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in ALL_TASKS:
            raise ConfigError(f"There is no task {name!r}.", remedy=f"Choose from: {', '.join(ALL_TASKS)}.")
    return list(dict.fromkeys(names)) or list(TASKS)


# Questions


@dataclass(frozen=True)
class _Plan:
    """A question before its passages exist: sentences to plant, each in a passage of its own.

    `ordered`: their passages must be in this order.
    """

    task: str
    facts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    ordered: bool = False

    @property
    def russian(self) -> bool:
        """Whether its passages are Russian."""
        return self.task == RUSSIAN


def make_samples(
    cell: Cell, items: int, encode: Encode, *, tasks: Sequence[str] = TASKS, seed: int = 0, turns: int = TURNS
) -> list[Sample]:
    """The questions of a cell; each task takes its turn.

    Args:
        cell: Size and style; its own task comes before `tasks`.
        items: How many questions, or conversations.
        encode: The prompt's own tokenizer, for passages of exactly that many tokens.
        tasks: Names from ALL_TASKS.
        seed: Makes other questions.
        turns: Questions of a conversation.

    Raises:
        ConfigError: The passages are too short for a task's sentences.
    """
    style = STYLES[cell.style]
    rng = random.Random(f"{seed}:{cell.chunks}x{cell.tokens}")  # noqa: S311 - a workload, not a secret
    names, facts = Names(rng), RussianFacts(random.Random(f"{seed}:russian"))  # noqa: S311
    if cell.task == CONVERSATION:
        maker = PassageMaker(encode, cell.tokens, rng, russian=False)
        hint = _hint(style, russian=False)
        found = make_conversations(cell.chunks, items, turns, maker, names, rng)
        return [replace(s, cell=cell.name, style=cell.style, question=s.question + hint) for s in found]
    tasks = (cell.task,) if cell.task else tasks
    plans: list[_Plan] = []
    for index, task in zip(range(items), itertools.cycle(tasks)):
        plan = _plan(task, names, facts, rng, index // len(tasks), room=cell.tokens, encode=encode)
        if len(plan.facts) <= cell.chunks:
            plans.append(plan)
    languages = {plan.russian for plan in plans}
    by_language = {russian: PassageMaker(encode, cell.tokens, rng, russian=russian) for russian in sorted(languages)}
    own = [[by_language[plan.russian].passage(fact) for fact in plan.facts] for plan in plans]
    samples = []
    pools = {russian: _pool(own, plans, maker, cell.chunks, russian=russian) for russian, maker in by_language.items()}
    for index, (plan, mine) in enumerate(zip(plans, own, strict=True)):
        others = [text for text in pools[plan.russian] if text not in mine]
        passages = rng.sample(others, cell.chunks - len(mine))
        places = [rng.randint(0, len(passages)) for _ in mine]
        for place, text in zip(sorted(places, reverse=True), reversed(mine) if plan.ordered else mine, strict=True):
            passages.insert(place, text)
        question = plan.question + _hint(style, russian=plan.russian)
        name = f"{plan.task}-{index}"
        sample = Sample(name, cell.name, plan.task, question, plan.answers, tuple(passages), cell.style)
        samples.append(replace(sample, gated=plan.task != RUSSIAN))
    return samples


def _hint(style: Style, *, russian: bool) -> str:
    """Asks for a short answer, after a question."""
    return "" if not style.short else HINT if russian else " Answer in a few words."


def _pool(
    own: Sequence[Sequence[str]], plans: Sequence[_Plan], maker: PassageMaker, chunks: int, *, russian: bool
) -> list[str]:
    """The passages of one language; plain ones are added where one prompt would need nearly all of them."""
    pool = [text for mine, plan in zip(own, plans, strict=True) if plan.russian == russian for text in mine]
    return maker.filled(pool, chunks + _SPARE)


def _plan(
    task: str, names: Names, russian: RussianFacts, rng: random.Random, number: int, *, room: int, encode: Encode
) -> _Plan:
    if task == "documents":
        return _document_plan(number, room, encode)
    if task == RUSSIAN:
        fact = russian.fact()
        return _Plan(task, (fact.sentence,), fact.question, fact.answers)
    town = names.town()
    if task == "needle":
        code = str(rng.randint(10_000, 99_999))
        planted = f"The access code of the {town} archive is {code}."
        return _Plan(task, (planted,), f"What is the access code of the {town} archive?", (code,))
    if task == "two-hop":
        person, thing = names.person(), rng.choice(COLLECTED)
        planted, other = f"The mayor of {town} is {person}.", f"In the evenings {person} collects {thing}."
        return _Plan(task, (planted, other), f"What does the mayor of {town} collect?", (thing,))
    if task == "reference":
        shelf, first, second = str(rng.randint(100, 999)), rng.randint(1000, 4999), rng.randint(5000, 9999)
        planted = f"Entry {first}: the parcel for {town} is on shelf {shelf}."
        other = names.town()
        refers = f"Entry {second}: the parcel for {other} is on the same shelf as the parcel of entry {first}."
        return _Plan(task, (planted, refers), f"On which shelf is the parcel for {other}?", (shelf,), ordered=True)
    kind = number % 4
    person, year = names.person(), str(rng.randint(1612, 1987))
    goods, month = rng.choice(GOODS), rng.choice(MONTHS)
    planted, question, answer = (
        (f"The lighthouse of {town} was designed by {person}.", f"Who designed the lighthouse of {town}?", person),
        (f"The old mill of {town} was built in the year {year}.", f"When was the old mill of {town} built?", year),
        (f"The town of {town} is known for its {goods}.", f"For what is the town of {town} known?", goods),
        (f"The fair of {town} is held in {month}.", f"In which month is the fair of {town} held?", month),
    )[kind]
    return _Plan(task, (planted,), question, (answer,))


def _document_plan(number: int, room: int, encode: Encode) -> _Plan:
    questions = [plan for plan in _documents() if len(encode(plan.facts[0])) <= room - 4]
    if not questions:
        raise ConfigError(
            f"Passages of {room} tokens are too short for the sample documents.", remedy="Leave out the task documents."
        )
    return questions[number % len(questions)]


@cache
def _documents() -> tuple[_Plan, ...]:
    text = sample_data().joinpath("quality.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(
        _Plan("documents", (f"{row['section']}: {row['evidence']}",), row["question"], tuple(row["answers"]))
        for row in rows
    )
