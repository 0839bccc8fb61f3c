"""Retrieval traces: the documented form, what is refused, and writers that are killed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.errors import ConfigError
from lmcache_rag.store import text_hash
from lmcache_rag.trace import Retrieval, TraceWriter, chunk_name, opened, read_trace, write_trace

WORDS = st.text(min_size=1, max_size=8).filter(str.strip)


@st.composite
def retrievals(draw: st.DrawFn) -> Retrieval:
    chunks = draw(st.lists(WORDS, max_size=4))
    return Retrieval(
        draw(WORDS) if not chunks else draw(st.text(max_size=8)),
        tuple(chunks),
        tuple(draw(WORDS) for _ in chunks) if draw(st.booleans()) else (),
        tuple(draw(st.integers(1, 9999)) for _ in chunks) if draw(st.booleans()) else (),
        draw(st.none() | st.floats(0, 2e9)),
        draw(st.sampled_from(["", "acme", "zörg"])),
    )


@given(st.lists(retrievals(), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: list[Retrieval]) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    assert write_trace(path, found) == len(found)
    assert list(read_trace(path)) == found


def test_the_form_in_the_docstring_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        '{"time": 1767225600.5, "tenant": "acme", "question": "What?", "chunks": ["9f86d0", 7], "tokens": [512, 300]}',
        '{"query": "Which?", "more": {"ignored": true}}',
        '{"passages": ["one", "two"]}',
        "",
        '{"chunks": []}',
    ]
    path.write_text("\n".join(lines) + "\n")
    assert list(read_trace(path)) == [
        Retrieval("What?", ("9f86d0", "7"), (), (512, 300), 1767225600.5, "acme"),
        Retrieval("Which?"),
        Retrieval("", (text_hash("one"), text_hash("two")), ("one", "two")),
        Retrieval(),
    ]


def test_a_text_file_is_a_question_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffWhat is {this}?\n\n And that? \n", encoding="utf-8")
    assert [each.question for each in read_trace(path)] == ["What is {this}?", "And that?"]


def test_names_of_two_tenants_differ() -> None:
    one, other, none = (Retrieval(chunks=("a",), tenant=tenant).names for tenant in ("one", "other", ""))
    assert len({one, other, none}) == 3
    assert none == ("a",)


def test_a_chunk_is_named_as_in_the_store() -> None:
    assert chunk_name("text") == text_hash("text")
    assert chunk_name("a\ud800b") == text_hash("a\ufffdb")  # half a character, as the store replaces it


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "not an object"),
        ("{}", "neither chunks nor a question"),
        ('{"question": 3}', "question is no text"),
        ('{"chunks": "a"}', "no list of names"),
        ('{"chunks": [true]}', "no list of names"),
        ('{"chunks": ["a"], "tokens": [1, 2]}', "2 tokens for 1 chunks"),
        ('{"chunks": ["a"], "tokens": [0]}', "above 0"),
        ('{"chunks": ["a"], "passages": ["x", "y"]}', "2 passages for 1 chunks"),
        ('{"passages": [3]}', "no list of texts"),
        ('{"chunks": ["a"], "time": NaN}', "time is no number"),
        ('{"chunks": ["a"], "tenant": 5}', "tenant is no text"),
        ("{", "Expecting property name"),
    ],
)
def test_another_form_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"chunks": ["a"]}}\n{line}\n')
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_trace(path))
    assert "line 2" in caught.value.message
    assert '"chunks"' in caught.value.remedy


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for content in (b"", b"\n\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"holds no questions|cannot be read"):
            list(read_trace(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_trace(tmp_path / "none.jsonl"))


def test_a_killed_writer_loses_its_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path) as writer:
        writer.write(Retrieval("one"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # what users asked is for its owner
    with path.open("a") as file:
        file.write('{"question": "tw')
    assert [each.question for each in read_trace(path)] == ["one"]
    with TraceWriter(path) as writer, pytest.raises(ConfigError, match="line 2"):
        writer.write(Retrieval("three"))
        list(read_trace(path))  # damage inside a file is named
    assert json.loads(path.read_text().splitlines()[-1]) == {"question": "three"}


def test_a_failed_writer_leaves_the_old_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [Retrieval("old")])

    def failing() -> object:
        yield Retrieval("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace(path, failing())  # type: ignore[arg-type]
    assert [each.question for each in read_trace(path)] == ["old"]
    assert [each.name for each in tmp_path.iterdir()] == ["trace.jsonl"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(tmp_path / "none" / "trace.jsonl", [])
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceWriter(tmp_path / "none" / "trace.jsonl")


def test_a_recorded_question_affects_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    writer.record("What?", ["one", "two"], [3, 4], tenant="acme")
    writer.record("Nothing was found.", [])
    (found,) = read_trace(path)
    assert (found.question, found.tokens, found.tenant) == ("What?", (3, 4), "acme")
    assert found.chunks == (chunk_name("one"), chunk_name("two"))
    assert found.time is not None
    assert path.stat().st_mode & 0o777 == 0o600
    writer.close()
    for _ in range(3):  # as on a disk that is full
        writer.record("What?", ["one"])
    assert [each.levelname for each in caplog.records if "trace misses" in each.getMessage()].count("WARNING") == 1
    assert opened(None) is None
    assert opened(writer) is writer
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path / "no" / "folder")
