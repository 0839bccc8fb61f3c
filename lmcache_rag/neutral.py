"""Neutral passages: text that stands before a chunk while its KV is computed, where a query has other passages.

KV that is computed right after the prefix fits badly into a prompt of many passages, since it is that of a first
passage. After a few other passages it fits better; see docs/results/neutral-h200.md. They read like passages of a
corpus, all in them is made up, and they are in no query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

NEUTRAL_TOKENS: Final = 512  # of these passages before a chunk, rounded up to whole KV blocks

NEUTRAL_PASSAGES: Final = (
    "Ellwater is a market town on the river Tarn, with 4,312 inhabitants at the last count. Its stone bridge was built "
    "in 1783 by Josef Lindqvist and widened in 1921. The town is known for its wool, which was sold as far as the "
    "coast. The archive in the old school keeps the letters of the guild under the number 27416.",
    "The grey heron is a bird of shallow water that feeds on fish and frogs. It stands still for up to twenty minutes "
    "and strikes within a tenth of a second. Adults weigh between 1.0 and 2.1 kilograms. The nests are built of sticks "
    "in high trees, often many of them close together, and are used for several years.",
    "Bronze is an alloy of copper with about 12 percent of tin. It melts at around 950 degrees Celsius, is harder than "
    "copper, and is easily cast. Bells, statues and bearings are made of it. In the period that is named after it, "
    "tools and weapons of bronze were traded over long distances.",
    "Maria Oberlin (1846-1919) was a physician and a member of the council of Sandvik. She studied in Basel, opened a "
    "clinic for children in 1881, and wrote two books on the care of the sick. Her brother Anton designed the "
    "lighthouse of the harbour. She collected old maps, which are now in the museum.",
    "A lock raises or lowers boats between two levels of a canal. The gates are closed, water runs in or out through "
    "valves, and after about ten minutes the boat can leave. The oldest chamber locks in Europe date from the 14th "
    "century. A long flight of locks can take a whole morning to pass.",
    "The committee meets on the first Tuesday of each month at 9 o'clock. Applications must be received by the end of "
    "the month before. Article 12 says that members who miss three meetings lose their vote until the next election. "
    "The secretary keeps the minutes, and sends a copy to every member within a week.",
    "Rye bread needs a sour dough that has been kept warm for a day. For two loaves take 800 grams of flour, 20 grams "
    "of salt and half a litre of water. The loaves rise for three hours and are baked for 50 minutes, first at 250 "
    "degrees and then at 190. It tastes best on the day after.",
    "The comet was first seen by Ivo Marek in the night of 3 March 1867, low in the west. It moved through the "
    "constellation of the Lion within nine days, and its tail was as long as ten full moons. According to later "
    "calculations it returns every 412 years. No photograph of it exists.",
)


def neutral_ids(
    passages: Sequence[str], encode: Callable[[str], Sequence[int]], block: int, context: int
) -> tuple[int, ...]:
    """Token ids of neutral passages, an empty line after each: NEUTRAL_TOKENS in all, in whole blocks.

    The first passage is cut, or the passages are repeated: an empty line stands right before the chunk. None where a
    quarter of the context is less than a block.

    Args:
        passages: The passages; none: nothing stands before a chunk.
        encode: Tokenises text.
        block: Tokens of a KV block.
        context: Most tokens of a sequence.
    """
    most = min(-(-NEUTRAL_TOKENS // block) * block, context // 4 // block * block)
    once = [token for text in passages for token in (*encode(text), *encode("\n\n"))]
    if not once or not most:
        return ()
    ids = once * -(-most // len(once))
    return tuple(ids[len(ids) - most :])
