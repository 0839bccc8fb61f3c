"""Conversations: several questions about one town, each with passages of its own, and how an arm does at each turn.

Only the first question names the town, so the later ones need the earlier turns. These follow the passages, and hold
the right answers, so that all arms read the same tokens. From turn to turn half of the passages that do not answer
the question stay, in another order; the others are new.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.bench.quality.names import GOODS, MONTHS, Names
from lmcache_rag.bench.quality.passages import PassageMaker
from lmcache_rag.bench.quality.scores import hit
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.bench.quality.results import Record

CONVERSATION = "conversation"
TURNS = 6  # of a conversation, by default
_TASK = "turn {}"

_KINDS = 8


def _facts(names: Names, rng: random.Random) -> list[tuple[str, str, str]]:
    """(sentence, question, answer) of each kind, in random order; {town} stands for the town."""
    metres, books = rng.randint(41, 399), rng.randint(1100, 9900)
    year, month, goods = rng.randint(1612, 1987), rng.choice(MONTHS), rng.choice(GOODS)
    designer, mayor, code = names.person(), names.person(), rng.randint(10_000, 99_999)
    found = [
        (f"The lighthouse of {{town}} was designed by {designer}.", "who designed the lighthouse of {town}?", designer),
        (f"The mayor of {{town}} is {mayor}.", "who is the mayor of {town}?", mayor),
        (f"The old mill of {{town}} was built in the year {year}.", "when was the old mill of {town} built?", year),
        (f"The town of {{town}} is known for its {goods}.", "for what is {town} known?", goods),
        (f"The fair of {{town}} is held in {month}.", "in which month is the fair of {town} held?", month),
        (
            f"The access code of the archive of {{town}} is {code}.",
            "what is the access code of the archive of {town}?",
            code,
        ),
        (f"The bridge of {{town}} is {metres} metres long.", "how many metres long is the bridge of {town}?", metres),
        (f"The library of {{town}} holds {books} books.", "how many books does the library of {town} hold?", books),
    ]
    rng.shuffle(found)
    return [(sentence, question, str(answer)) for sentence, question, answer in found]


def make_conversations(
    chunks: int, items: int, turns: int, maker: PassageMaker, names: Names, rng: random.Random
) -> list[Sample]:
    """The questions of `items` conversations, one conversation after the other.

    Args:
        chunks: Passages of a question.
        items: How many conversations.
        turns: Questions of each.
        maker: Makes the passages.
        names: For the facts.
        rng: Decides facts, passages and their order.

    Raises:
        ConfigError: There are too many turns, or the passages are too short.
    """
    if not 1 <= turns <= _KINDS:
        raise ConfigError(f"A conversation of {turns} turns cannot be made.", remedy=f"Choose 1 to {_KINDS} turns.")
    talks = []
    for _ in range(items):
        town, facts = names.town(), _facts(names, rng)[:turns]
        talks.append(
            [(maker.passage(s.format(town=town)), _question(q, town, i), a) for i, (s, q, a) in enumerate(facts)]
        )
    pool = [passage for talk in talks for passage, _, _ in talk]
    pool = maker.filled(pool, 2 * chunks + turns)
    samples = []
    for index, talk in enumerate(talks):
        answering = {passage for passage, _, _ in talk}  # shown from their own turn on
        shown: list[str] = []
        history: list[str] = []
        for turn, (passage, question, answer) in enumerate(talk, 1):
            before = [text for text in shown if text != passage]
            kept = rng.sample(before, min(len(before), (chunks - 1) // 2))
            fresh = [text for text in pool if text not in answering and text not in before]
            shown = [*kept, *rng.sample(fresh, chunks - 1 - len(kept))]
            rng.shuffle(shown)
            shown.insert(rng.randint(0, len(shown)), passage)
            name = f"{CONVERSATION}-{index}-{turn}"
            task = _TASK.format(turn)
            samples.append(Sample(name, "", task, question, (answer,), tuple(shown), history=tuple(history)))
            history += [question, answer]
    return samples


def _question(question: str, town: str, earlier: int) -> str:
    if earlier:
        return "And " + question.format(town="that town")
    return question[0].upper() + question.format(town=town)[1:]


# Turn by turn


@dataclass(frozen=True)
class Turn:
    """One arm at one turn of a cell's conversations.

    Attributes:
        cell: The cell.
        turn: The turn's number.
        questions: How many questions were asked.
        prompt_tokens: Mean length of the prompts.
        arm: The arm.
        hit: Share of answers that contain the right one.
        ttft_ms: Median time to the first token; None where none was taken.
    """

    cell: str
    turn: int
    questions: int
    prompt_tokens: float
    arm: str
    hit: float
    ttft_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def by_turn(records: Sequence[Record]) -> list[Turn]:
    """How each arm does at each turn; empty without conversations."""
    found = []
    cells = dict.fromkeys(record.cell for record in records if CONVERSATION in record.cell.split(":")[1:])
    for cell in cells:
        own = [record for record in records if record.cell == cell]
        for task in sorted({record.task for record in own}, key=lambda task: int(task.split()[1])):
            asked = [record for record in own if record.task == task]
            for arm in dict.fromkeys(arm for record in asked for arm in record.arms):
                answers = [(record, record.arms[arm]) for record in asked if arm in record.arms]
                times = [answer["ttft_ms"] for _, answer in answers if answer["ttft_ms"] is not None]
                found.append(
                    Turn(
                        cell,
                        int(task.split()[1]),
                        len(answers),
                        statistics.fmean(record.prompt_tokens for record, _ in answers),
                        arm,
                        statistics.fmean(hit(answer["parsed"], record.gold) for record, answer in answers),
                        statistics.median(times) if times else None,
                    )
                )
    return found
