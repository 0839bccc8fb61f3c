"""Generated questions in passages of a chosen size, and the styles of a prompt.

A cell such as ``6x512`` is a number of questions, each over 6 passages of exactly 512 tokens. They are real text,
the package's sample documents (Russian sentences are made up), with one sentence planted in each:

    fact        a sentence that reads like its surroundings: who built what, when, what a town sells
    needle      a code, among passages with codes of the same kind
    two-hop     one passage names a town's mayor, another what that person collects
    reference   one passage refers to an entry of another one, which stands before it
    documents   a question about a real sentence of the sample documents (examples/data/quality.jsonl)
    russian     a code, in Russian passages

The passages of a question that do not hold its answer hold those of others. The same seed makes the same questions, in
every style.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptFormat

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Encode = Callable[[str], Sequence[int]]

TASKS = ("fact", "needle", "two-hop", "reference", "documents")  # by default
ALL_TASKS = (*TASKS, "russian")
_SAMPLE_DATA = "lmcache_rag.demo.sample_data"
_SHORT = (" so", " and", " .", "\n", " -", ",", " ;", " (")  # one token each, after most texts
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
    """A size of the prompt, and its style."""

    chunks: int
    tokens: int
    style: str = "plain"

    @property
    def name(self) -> str:
        """For example "8x160" or "8x160:tags"."""
        size = f"{self.chunks}x{self.tokens}"
        return size if self.style == "plain" else f"{size}:{self.style}"


def parse_cells(text: str, style: str = "plain") -> list[Cell]:
    """Cells from a text such as "3x512,8x160:tags".

    Args:
        text: The cells, with commas between them.
        style: Style of those that name none.

    Raises:
        ConfigError: One has another form, or a style that does not exist.
    """
    cells = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        form = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)(?::(\w+))?", part)
        if not form or not 1 <= int(form[1]) <= 1000 or not 32 <= int(form[2]) <= 100_000:
            raise ConfigError(
                f"{part!r} is not a cell.",
                remedy="Write passages x tokens (32 and more), for example 8x160 or 8x160:tags.",
            )
        cells.append(Cell(int(form[1]), int(form[2]), get_style(form[3] or style).name))
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


def make_samples(
    cell: Cell, items: int, encode: Encode, *, tasks: Sequence[str] = TASKS, seed: int = 0
) -> list[Sample]:
    """The questions of a cell; each task in turn.

    Args:
        cell: Size and style.
        items: How many questions.
        encode: The prompt's own tokenizer, for passages of exactly that many tokens.
        tasks: Names from ALL_TASKS.
        seed: Makes other questions.

    Raises:
        ConfigError: The passages are too short for a task's sentences.
    """
    rng = random.Random(f"{seed}:{cell.chunks}x{cell.tokens}")  # noqa: S311 - a workload, not a secret
    names = _Names(rng)
    plans: list[_Plan] = []
    for index, task in zip(range(items), itertools.cycle(tasks)):
        plan = _plan(task, names, rng, index // len(tasks), room=cell.tokens, encode=encode)
        if len(plan.facts) <= cell.chunks:
            plans.append(plan)
    makers = {russian: _PassageMaker(encode, cell.tokens, rng, russian=russian) for russian in (False, True)}
    own = [[makers[plan.task == "russian"].passage(fact) for fact in plan.facts] for plan in plans]
    style = STYLES[cell.style]
    samples = []
    pools = {
        russian: _pool(own, plans, makers[russian], cell.chunks, russian=russian)
        for russian in {plan.task == "russian" for plan in plans}
    }
    for index, (plan, mine) in enumerate(zip(plans, own, strict=True)):
        others = [text for text in pools[plan.task == "russian"] if text not in mine]
        passages = rng.sample(others, cell.chunks - len(mine))
        places = [rng.randint(0, len(passages)) for _ in mine]
        for place, text in zip(sorted(places, reverse=True), reversed(mine) if plan.ordered else mine, strict=True):
            passages.insert(place, text)
        hint = (" Ответь только кодом." if plan.task == "russian" else " Answer in a few words.") if style.short else ""
        name = f"{plan.task}-{index}"
        samples.append(
            Sample(name, cell.name, plan.task, plan.question + hint, plan.answers, tuple(passages), cell.style)
        )
    return samples


def _pool(
    own: Sequence[Sequence[str]], plans: Sequence[_Plan], maker: _PassageMaker, chunks: int, *, russian: bool
) -> list[str]:
    """The passages of one language; plain ones are added where one prompt would need nearly all of them."""
    pool = [text for mine, plan in zip(own, plans, strict=True) if (plan.task == "russian") == russian for text in mine]
    return [*pool, *(maker.passage("") for _ in range(chunks + _SPARE - len(pool)))]


def _plan(task: str, names: _Names, rng: random.Random, number: int, *, room: int, encode: Encode) -> _Plan:
    if task == "documents":
        return _document_plan(number, room, encode)
    if task == "russian":
        town, code = names.russian_town(), str(rng.randint(10_000, 99_999))
        planted = f"Код доступа к архиву города {town}: {code}."
        return _Plan(task, (planted,), f"Какой код доступа к архиву города {town}?", (code,))
    town = names.town()
    if task == "needle":
        code = str(rng.randint(10_000, 99_999))
        planted = f"The access code of the {town} archive is {code}."
        return _Plan(task, (planted,), f"What is the access code of the {town} archive?", (code,))
    if task == "two-hop":
        person, thing = names.person(), rng.choice(_COLLECTED)
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
    goods, month = rng.choice(_GOODS), rng.choice(_MONTHS)
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
    text = _data().joinpath("quality.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(
        _Plan("documents", (f"{row['section']}: {row['evidence']}",), row["question"], tuple(row["answers"]))
        for row in rows
    )


# Passages


class _PassageMaker:
    """Passages of exactly so many tokens: consecutive sentences of real text, with one planted."""

    def __init__(self, encode: Encode, tokens: int, rng: random.Random, *, russian: bool) -> None:
        self._encode, self._tokens, self._rng = encode, tokens, rng
        self._sentences = _russian(rng) if russian else _english()

    def passage(self, planted: str) -> str:
        """A passage with this sentence in it; "": with none.

        Raises:
            ConfigError: The sentence alone is longer.
        """
        source = self._filler()
        parts: list[str] = []
        length = len(self._encode(planted))
        if length > self._tokens:
            raise ConfigError(
                f"A passage of {self._tokens} tokens does not hold {planted!r}.",
                remedy="Choose cells with longer passages.",
            )
        while length < self._tokens:
            parts.append(next(source))
            length += len(self._encode(" " + parts[-1]))
        place = self._rng.randint(0, max(0, len(parts) - 1))
        head, tail = " ".join([*parts[:place], planted]).strip(), parts[place:]
        if len(self._encode(head)) > self._tokens:  # joined texts may have more tokens than their parts
            head, tail = planted, parts
        return self._cut(head, " ".join(tail).split())

    def _filler(self) -> Iterator[str]:
        while True:
            first = self._rng.randrange(len(self._sentences))
            yield from self._sentences[first : first + self._rng.randint(3, 6)]

    def _cut(self, head: str, words: Sequence[str]) -> str:
        """The head with as many of the words as fit, made up to exactly so many tokens with short ones."""
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(" ".join([head, *words[:middle]]).strip())) <= self._tokens:
                low = middle
            else:
                high = middle - 1
        text = " ".join([head, *words[:low]]).strip()
        while (length := len(self._encode(text))) < self._tokens:
            text = next(text + end for end in _SHORT if len(self._encode(text + end)) == length + 1)
        return text


def _data() -> Traversable:
    return resources.files(_SAMPLE_DATA)


@cache
def _english() -> tuple[str, ...]:
    """Sentences of the sample documents, in their order."""
    found: list[str] = []
    for file in sorted(_data().joinpath("documents").iterdir(), key=lambda file: file.name):
        if file.name.endswith((".txt", ".md")) and not file.name.endswith("-ru.md"):
            found += _sentences(file.read_text(encoding="utf-8"))
    return tuple(found)


def _sentences(text: str) -> list[str]:
    lines = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith("#")]
    return [each for line in lines for each in re.split(r"(?<=[.!?])\s+", line) if 30 < len(each) < 400]


def _russian(rng: random.Random) -> tuple[str, ...]:
    own = _sentences(_data().joinpath("documents", "baikal-ru.md").read_text(encoding="utf-8"))
    made = [
        f"{rng.choice(_RU_WHEN)} {rng.choice(_RU_WHO)} {rng.choice(_RU_DID)} {rng.choice(_RU_WHAT)}, "
        f"{rng.choice(_RU_WHY)}."
        for _ in range(400)
    ]
    mixed = [*made, *own]
    rng.shuffle(mixed)
    return tuple(mixed)


# Names


class _Names:
    """Names that no model knows, each once."""

    def __init__(self, rng: random.Random) -> None:
        self._towns = [a + b for a in _TOWN_HEADS for b in _TOWN_TAILS]
        self._persons = [f"{a} {b}{c}" for a in _FIRST for b in _TOWN_HEADS[:20] for c in _LAST_TAILS]
        self._russian = [a + b for a in _RU_HEADS for b in _RU_TAILS]
        for names in (self._towns, self._persons, self._russian):
            rng.shuffle(names)
        self._next = itertools.count()

    def town(self) -> str:
        """A town."""
        return self._take(self._towns)

    def person(self) -> str:
        """A first and a last name."""
        return self._take(self._persons)

    def russian_town(self) -> str:
        """A town with a Russian name."""
        return self._take(self._russian)

    def _take(self, names: list[str]) -> str:
        if not names:
            raise ConfigError("There are not so many names.", remedy="Lower --items.")
        return names.pop()


_TOWN_HEADS = (
    *("Var", "Tor", "Bel", "Kes", "Mor", "Lin", "Hal", "Dru", "Fen", "Gar", "Ost", "Pel", "Rav", "Sel", "Ulm", "Wes"),
    *("Yar", "Zan", "Cor", "Ith", "Bram", "Clay", "Dun", "Elk", "Fal", "Grim", "Hazel", "Iron", "Jas", "Kirk", "Lam"),
    *("Marl", "Nor", "Orm", "Pine", "Quill", "Rush", "Stone", "Thorn", "Under", "Vine", "Whit"),
)
_TOWN_TAILS = (
    *(
        "holm",
        "mere",
        "wick",
        "stad",
        "burg",
        "ford",
        "dale",
        "moor",
        "gate",
        "ness",
        "field",
        "haven",
        "brook",
        "crest",
    ),
    *("bridge", "cliff", "fell", "ham", "ley", "mouth", "port", "shaw", "thwaite", "well"),
)
_FIRST = (
    *("Ada", "Bruno", "Clara", "Dmitri", "Elsa", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Marta"),
    *("Nils", "Olga", "Pavel", "Rosa", "Stefan", "Thea", "Viktor"),
)
_LAST_TAILS = ("sen", "ström", "mann", "ova", "etti", "ard")
_COLLECTED = (
    *("old maps", "glass buttons", "brass keys", "silver spoons", "sea shells", "wooden masks", "pocket watches"),
    *("rare stamps", "copper coins", "porcelain cups", "dried flowers", "music boxes", "chess sets", "oil lamps"),
)
_GOODS = (
    *("blue pottery", "smoked trout", "wool blankets", "walnut bread", "church bells", "goat cheese", "honey cakes"),
    *("straw hats", "bone china", "cider", "lace curtains", "salt mines", "violins", "red tiles"),
)
_MONTHS = ("January", "February", "April", "June", "August", "September", "October", "November", "December")
_RU_HEADS = (
    "Бело",
    "Черно",
    "Ново",
    "Старо",
    "Красно",
    "Верхо",
    "Нижне",
    "Горно",
    "Лесо",
    "Озёрно",
    "Камено",
    "Зелено",
)
_RU_TAILS = (
    "горск",
    "реченск",
    "полье",
    "морск",
    "град",
    "ярск",
    "бор",
    "дольск",
    "каменск",
    "городск",
    "вильск",
    "слав",
)
_RU_WHEN = ("В начале века", "Весной", "После войны", "Каждую осень", "В прошлом году", "Летом", "Давно", "Зимой")
_RU_WHO = ("жители города", "мастера", "рыбаки", "учителя местной школы", "строители", "купцы", "садовники", "инженеры")
_RU_DID = ("построили", "привезли", "показали гостям", "починили", "описали", "нашли", "украсили", "сохранили")
_RU_WHAT = ("старый мост", "каменную мельницу", "новую библиотеку", "паровую машину", "большие часы", "речную пристань")
_RU_WHY = (
    *("о чём потом писали в газете", "и это помнят до сих пор", "хотя денег почти не было", "как просил совет города"),
    *("чтобы дети могли учиться", "и с тех пор сюда приезжают гости", "что заняло почти три года"),
)
