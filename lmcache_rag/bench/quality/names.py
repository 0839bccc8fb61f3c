"""Names that no model knows, each once, and other words for English facts."""

from __future__ import annotations

import random

from lmcache_rag.errors import ConfigError


class Names:
    """Names of towns and persons.

    Args:
        rng: Decides their order.
    """

    def __init__(self, rng: random.Random) -> None:
        self._towns = [a + b for a in _TOWN_HEADS for b in _TOWN_TAILS]
        self._persons = [f"{a} {b}{c}" for a in _FIRST for b in _TOWN_HEADS[:20] for c in _LAST_TAILS]
        for names in (self._towns, self._persons):
            rng.shuffle(names)

    def town(self) -> str:
        """A town."""
        return take(self._towns)

    def person(self) -> str:
        """A first and a last name."""
        return take(self._persons)


def take(names: list[str]) -> str:
    """The next name.

    Raises:
        ConfigError: All are taken.
    """
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
COLLECTED = (
    *("old maps", "glass buttons", "brass keys", "silver spoons", "sea shells", "wooden masks", "pocket watches"),
    *("rare stamps", "copper coins", "porcelain cups", "dried flowers", "music boxes", "chess sets", "oil lamps"),
)
GOODS = (
    *("blue pottery", "smoked trout", "wool blankets", "walnut bread", "church bells", "goat cheese", "honey cakes"),
    *("straw hats", "bone china", "cider", "lace curtains", "salt mines", "violins", "red tiles"),
)
MONTHS = ("January", "February", "April", "June", "August", "September", "October", "November", "December")
