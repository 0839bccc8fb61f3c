"""Our module in LMCache's server: an exact prefix is looked for no further than it can reach."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contract_kit import CHUNK
from lmcache_server_kit import LMCacheServer, key, made_servers

from lmcache_rag.connector.lmcache_server import modules

pytestmark = [pytest.mark.filterwarnings("ignore")]

Make = Callable[..., LMCacheServer]
FIRST = modules._FIRST


@pytest.fixture
def make() -> Iterator[Make]:
    with made_servers() as made:
        yield made


def text(chunks: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1 << 32) for _ in range(chunks * CHUNK)]


def submitted(server: LMCacheServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys LMCache looks for, in each request to its storage."""
    found: list[int] = []
    submit = server.storage.submit_prefetch_task

    def counted(spec: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(spec.key_groups) * spec.group_size)
        return submit(spec, *args, **kwargs)

    monkeypatch.setattr(server.storage, "submit_prefetch_task", counted)
    return found


@pytest.mark.parametrize("held", [0, 1, 2, FIRST - 1, FIRST, FIRST + 1, 3 * FIRST])
def test_an_exact_prefix_of_any_length_is_found(make: Make, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    server, prompt = make(), text(4 * FIRST)
    if held:
        server.store(prompt[: held * CHUNK])
    asked = submitted(server, monkeypatch)
    found = server.look_up([*prompt, 5, 6])
    assert found.prefix_coverage_tokens == held * CHUNK
    assert asked == [held + 1 if held < FIRST else 4 * FIRST]


def test_chunks_after_the_prefix_are_found_as_before(make: Make) -> None:
    server, prefix, chunk = make(), text(1), text(20, 1)
    server.store(prefix + chunk, ingest=True)
    found = server.look_up([*prefix, *text(3, 2), *[5] * 7, *chunk])
    assert found.prefix_coverage_tokens == CHUNK
    assert len(found.non_prefix_segments) == 20
    held, result = server.hold([*prefix, *text(3, 2), *[5] * 7, *chunk])
    locked = sum(server.storage._l1_manager.is_key_evictable(each) is False for each in server.keys(prefix + chunk))
    assert locked == 21, "the prefix and the chunks, until they are released"
    server.release(held, result)
    assert all(server.storage._l1_manager.is_key_evictable(each) for each in server.keys(prefix + chunk))


def test_a_short_prompt_is_left_as_it_is(make: Make) -> None:
    server = make()
    asked = key(text(FIRST), "r", worker=None)
    assert server.guard.up_to_first_miss(asked) is asked
    assert server.look_up(text(FIRST)).prefix_coverage_tokens == 0


def test_a_second_tier_may_hold_what_memory_does_not(make: Make, tmp_path: Path) -> None:
    server = make(l2=tmp_path / "tier")
    asked = key(text(2 * FIRST), "r", worker=None)
    assert server.guard.up_to_first_miss(asked) is asked


def test_several_groups_of_objects_are_left_to_lmcache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make()
    registry = server.context.layout_desc_registry
    for groups in ({0: server.layout, 1: server.layout}, None):
        monkeypatch.setattr(registry, "find_group_layout_descs", lambda *_, groups=groups: groups)
        asked = key(text(2 * FIRST), "r", worker=None)
        assert server.guard.up_to_first_miss(asked) is asked


def test_subscribers_of_look_ups_get_every_hash(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make()
    monkeypatch.setattr(server.context.event_bus, "has_subscribers", lambda kind: kind.name == "MP_LOOKUP")
    asked = key(text(2 * FIRST), "r", worker=None)
    assert server.guard.up_to_first_miss(asked) is asked


def test_a_prompt_that_was_cut_can_be_stored_whole(make: Make) -> None:
    """The look-up's session is the one of the store that follows."""
    server, prompt = make(), text(3 * FIRST)
    asked, found = server.hold(prompt)
    assert found.prefix_coverage_tokens == 0
    server.blend.store(replace(asked, worker_id=0, end=len(prompt)), 7, [[1]], b"")
    server.release(asked, found)
    assert server.in_memory(prompt) == 3 * FIRST
    assert server.look_up(prompt).prefix_coverage_tokens == len(prompt)
