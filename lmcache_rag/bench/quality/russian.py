"""Facts and plain sentences in Russian, for generated questions. An answer is a number or one word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_rag.bench.quality.names import take

HINT = " Ответь одним словом или числом."


@dataclass(frozen=True)
class RussianFact:
    """A sentence, and the question that it answers."""

    sentence: str
    question: str
    answers: tuple[str, ...]


class RussianFacts:
    """Facts about towns that do not exist, each about another town; the kinds take turns.

    Args:
        rng: Decides towns, numbers and words.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._towns = [a + b for a in _TOWN_HEADS for b in _TOWN_TAILS if a + b not in _REAL]
        rng.shuffle(self._towns)
        self._kind = 0

    def fact(self) -> RussianFact:
        """The next fact.

        Raises:
            ConfigError: There are no more towns.
        """
        rng, town = self._rng, take(self._towns)
        # The towns are masculine and end in a hard consonant, so this is the genitive; numbers that end in 0 or 5
        # take the genitive plural; surnames and goods are in the nominative, as in the answer.
        of = f"{town}а"
        year, code = str(rng.randint(1612, 1987)), str(rng.randint(10_000, 99_999))
        length, books = str(5 * rng.randint(21, 99)), str(5 * rng.randint(210, 1990))
        surname, goods = rng.choice(_SURNAMES), rng.choice(_GOODS)
        sentence, question, answer = (
            (f"Код доступа к архиву {of} — {code}.", f"Какой код доступа к архиву {of}?", code),
            (f"Старую мельницу {of} построили в {year} году.", f"В каком году построили старую мельницу {of}?", year),
            (
                f"Проект городской ратуши {of} составил архитектор {surname}.",
                f"Какова фамилия архитектора, который составил проект городской ратуши {of}?",
                surname,
            ),
            (f"Длина моста {of} — {length} метров.", f"Сколько метров составляет длина моста {of}?", length),
            (f"Главный товар ярмарки {of} — {goods}.", f"Каков главный товар ярмарки {of}?", goods),
            (f"В библиотеке {of} хранится {books} книг.", f"Сколько книг хранится в библиотеке {of}?", books),
        )[self._kind % 6]
        self._kind += 1
        return RussianFact(sentence, question, tuple(dict.fromkeys((answer, answer.replace("ё", "е")))))


def plain_sentences(rng: random.Random, own: Sequence[str]) -> tuple[str, ...]:
    """Sentences without any fact of RussianFacts, in random order.

    Args:
        rng: Decides what they say.
        own: More sentences to mix in.
    """
    made = [
        f"{rng.choice(_WHEN)} {rng.choice(_WHO)} {rng.choice(_DID)}{rng.choice(_MORE)}."
        for _ in range(400 - len(_STANDING))
    ]
    mixed = [*made, *_STANDING, *own]
    rng.shuffle(mixed)
    return tuple(mixed)


_TOWN_HEADS = (
    *("Бело", "Черно", "Ново", "Старо", "Красно", "Верхне", "Нижне", "Горно", "Лесо", "Озёрно", "Каменно", "Зелено"),
    *("Светло", "Тихо", "Ясно", "Средне", "Больше", "Мало", "Добро", "Звёздно", "Сосно", "Липо", "Речно", "Южно"),
)
_TOWN_TAILS = (
    *("горск", "реченск", "морск", "град", "ярск", "бор", "дольск", "каменск", "вильск", "озёрск"),
    *("борск", "заводск", "луцк", "мирск", "польск"),
)
_REAL = (
    *("Белогорск", "Беломорск", "Белоград", "Белоозёрск", "Белоярск", "Черногорск", "Черноморск", "Красногорск"),
    *("Красноярск", "Красноград", "Красноборск", "Краснозаводск", "Зеленогорск", "Зеленоград", "Зеленоборск"),
    *("Светлогорск", "Светлоград", "Сосногорск", "Лесогорск", "Ясногорск", "Новоград", "Старогорск", "Лесозаводск"),
    *("Нижнекаменск", "Верхнеярск", "Новозаводск", "Новогорск", "Каменногорск", "Новодольск"),
)
_SURNAMES = (
    *("Ветров", "Лугинин", "Соболев", "Кречетов", "Орешин", "Заречный", "Полозов", "Гончаров", "Вешняков", "Рябинин"),
    *("Суханов", "Тихомиров", "Ермилов", "Чащин", "Ладогин", "Берестов"),
)
_GOODS = (
    *("мёд", "лён", "фарфор", "сыр", "керамика", "кружево", "янтарь", "хрусталь", "шерсть", "воск", "чай", "соль"),
)
_WHEN = ("В начале века", "Прошлой весной", "После войны", "Однажды летом", "В прошлом году", "Ближе к осени")
_WHO = (
    *("жители посёлка", "местные мастера", "рыбаки", "учителя школы", "строители", "купцы", "садовники", "инженеры"),
    *("молодые художники", "соседи"),
)
_DID = (
    *("починили пристань", "посадили яблоневый сад", "открыли музей ремёсел", "записали старинные песни"),
    *("напечатали подробную карту края", "устроили выставку рисунков", "украсили главную площадь", "очистили пруд"),
    *("выкопали новый колодец", "собрали деньги на школу", "провели большой праздник", "поставили скамейки у реки"),
)
_MORE = (
    *(", о чём потом писала газета", ", и это помнят до сих пор", ", хотя денег почти не было", ""),
    *(", как просил городской совет", ", и на это ушло почти три недели", ", а потом долго об этом рассказывали"),
)
_STANDING = (
    "Дорога к реке проходит мимо старого парка.",
    "По утрам над лугом долго стоит туман.",
    "Зимой лёд на озере такой прочный, что по нему ездят машины.",
    "На холме растёт дуб, под которым любят отдыхать путники.",
    "В школе есть небольшой театр, где дети играют сказки.",
    "Весной вода поднимается и закрывает нижнюю тропинку.",
    "Поезд останавливается здесь два раза в день.",
    "На рынке продают рыбу, овощи и свежий хлеб.",
    "В лесу много грибов, особенно после тёплых дождей.",
    "Дома здесь деревянные, с резными окнами.",
    "Летом приезжают студенты и рисуют берег реки.",
    "Вечером на площади играет небольшой оркестр.",
    "Старожилы говорят, что раньше река была шире.",
    "Почта открыта каждый день, кроме воскресенья.",
    "За оврагом начинаются поля, где сеют рожь и овёс.",
    "В музее показывают инструменты, посуду и одежду прошлых лет.",
)
