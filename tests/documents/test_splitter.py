"""Chunks: sizes in tokens, complete coverage, good borders, hostile texts."""

from __future__ import annotations

import logging
import random
import string
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_rag.documents import Chunk, Splitter, load_document
from lmcache_rag.documents.decoding import is_visible
from lmcache_rag.documents.graphemes import is_border
from lmcache_rag.errors import ConfigError

DATA = Path(__file__).parents[2] / "examples" / "data" / "documents"
Encode = Callable[[str], Sequence[int]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A small byte-level BPE tokenizer of the kind that Llama 3, Qwen and SmolLM2 use, trained on the sample corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text() for path in sorted(DATA.glob("*.[mt][dx]*"))], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Encode:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n\n".join(load_document(path).text for path in sorted(DATA.iterdir()))


def checked(text: str, chunks: list[Chunk], splitter: Splitter, encode: Encode) -> list[Chunk]:
    """What holds for every text: places, sizes, and that nothing visible is left out."""
    position = 0
    for number, chunk in enumerate(chunks):
        own = chunk.text[chunk.repeated :]
        assert chunk.index == number
        assert own == text[chunk.start : chunk.start + len(own)]
        assert chunk.text[: chunk.repeated] in text
        assert is_visible(own)
        assert not (own[0].isspace() and is_border(text, chunk.start + 1))
        assert not own[-1].isspace()
        assert chunk.tokens == len(encode(chunk.text)) <= splitter.chunk_tokens
        assert not is_visible(text[position : chunk.start]) or chunk.text.startswith(text[position : chunk.start])
        assert number == 0 or chunk.start > chunks[number - 1].start
        position = max(position, chunk.start + len(own))
    assert not is_visible(text[position:])
    return chunks


def test_chunks_of_prose_fit_and_cover_it(encode: Encode, prose: str) -> None:
    splitter = Splitter(encode, chunk_tokens=128)
    chunks = checked(prose, splitter.split(prose), splitter, encode)
    assert sum(chunk.tokens for chunk in chunks) / len(chunks) > 70


def test_a_short_text_is_one_chunk_without_outer_space(encode: Encode) -> None:
    (chunk,) = Splitter(encode).split("\n\n  A short text.  \n")
    assert (chunk.text, chunk.index, chunk.start) == ("A short text.", 0, 4)


@pytest.mark.parametrize("text", ["", " \n\t \n"])
def test_a_blank_text_has_no_chunks(encode: Encode, text: str) -> None:
    assert Splitter(encode).split(text) == []


def test_markdown_is_cut_before_headings(encode: Encode) -> None:
    section = "\n\n".join(["Rivers carry water to the sea, and mountains stand beside them."] * 4)
    text = "\n\n".join(f"## Part {number}\n\n{section}" for number in range(6))
    splitter = Splitter(encode, chunk_tokens=128)
    chunks = checked(text, splitter.split(text), splitter, encode)
    assert len(chunks) > 1
    assert all(chunk.text.startswith("## Part") for chunk in chunks)


def test_a_heading_stays_with_its_long_paragraph(encode: Encode) -> None:
    text = "## Lakes\n\n" + "A lake is a body of water that lies in a basin. " * 20
    splitter = Splitter(encode, chunk_tokens=64)
    first = checked(text, splitter.split(text), splitter, encode)[0]
    assert first.text.startswith("## Lakes\n\nA lake is")


def test_long_paragraphs_are_cut_at_sentences(encode: Encode) -> None:
    text = " ".join(f"Sentence number {number} speaks of rivers and of the sea." for number in range(100))
    splitter = Splitter(encode, chunk_tokens=64)
    chunks = checked(text, splitter.split(text), splitter, encode)
    assert all(chunk.text.startswith("Sentence") and chunk.text.endswith(".") for chunk in chunks)


def test_a_paragraph_a_little_too_long_is_cut_evenly(encode: Encode) -> None:
    text = " ".join(["river"] * 70)
    limit = len(encode(text)) - 3
    splitter = Splitter(encode, chunk_tokens=limit)
    chunks = checked(text, splitter.split(text), splitter, encode)
    assert len(chunks) == 2
    assert min(chunk.tokens for chunk in chunks) > limit / 3


def test_words_are_not_cut_where_there_are_spaces(encode: Encode) -> None:
    text = "mountain " * 3000
    splitter = Splitter(encode, chunk_tokens=64)
    assert {word for chunk in splitter.split(text) for word in chunk.text.split()} == {"mountain"}


def test_an_accent_stays_on_its_letter_in_a_hard_cut(encode: Encode) -> None:
    text = "e\u0301" * 5000
    splitter = Splitter(encode, chunk_tokens=64)
    assert all(chunk.text.startswith("e") for chunk in checked(text, splitter.split(text), splitter, encode))


def test_overlap_never_repeats_the_whole_chunk_before(encode: Encode) -> None:
    short, long = "## Sea\n\nWaves break on the long shore. ", "## Land\n\n" + "Rivers carry water to the sea. " * 5
    splitter = Splitter(encode, chunk_tokens=96, overlap_tokens=40)
    text = "\n\n".join([long, short, long, short, long])
    chunks = checked(text, splitter.split(text), splitter, encode)
    whole = [chunk for chunk in chunks if chunk.text.startswith("## Sea")]
    assert len(whole) <= 2
    assert any(chunk.text.startswith("Sea\n\nWaves") for chunk in chunks), "nearly all of it is repeated"


def test_overlap_repeats_whole_words_of_the_last_chunk(encode: Encode, prose: str) -> None:
    splitter = Splitter(encode, chunk_tokens=128, overlap_tokens=24)
    chunks = checked(prose, splitter.split(prose), splitter, encode)
    overlaps = 0
    for before, after in pairwise(chunks):
        end = before.start + len(before.text)
        own = prose[end : after.start + len(after.text)].strip()
        overlaps += after.start < end
        assert after.tokens - len(encode(own)) <= 24
        assert prose[after.start - 1].isspace()
    assert overlaps > len(chunks) / 2


def test_without_overlap_no_character_is_in_two_chunks(encode: Encode, prose: str) -> None:
    chunks = Splitter(encode, chunk_tokens=64).split(prose)
    assert all(a.start + len(a.text) <= b.start for a, b in pairwise(chunks))


def test_chunks_do_not_depend_on_earlier_texts(encode: Encode, prose: str) -> None:
    fresh, used = Splitter(encode, chunk_tokens=64), Splitter(encode, chunk_tokens=64)
    used.split("something else entirely " * 500)
    assert used.split(prose) == fresh.split(prose) == used.split(prose)


def test_a_change_at_the_end_keeps_the_chunks_before(encode: Encode, prose: str) -> None:
    splitter = Splitter(encode, chunk_tokens=64)
    before, after = splitter.split(prose), splitter.split(prose + "\n\nOne more paragraph.")
    assert before[:-2] == after[: len(before) - 2]


def test_chunks_at_a_window_border_are_full(encode: Encode) -> None:
    text = "\n\n".join(f"Paragraph {number} has its own eight words here." for number in range(3000))
    splitter = Splitter(encode, chunk_tokens=64)
    chunks = checked(text, splitter.split(text), splitter, encode)
    assert len(text) > 64 * 64 * 10  # many windows
    assert all(chunk.text.count("Paragraph") >= 2 for chunk in chunks[:-1])


def test_the_fingerprint_names_library_and_sizes(encode: Encode) -> None:
    from importlib.metadata import version

    one = Splitter(encode, chunk_tokens=64).fingerprint
    assert version("langchain-text-splitters") in one
    assert one == Splitter(lambda text: [0], chunk_tokens=64).fingerprint
    assert (
        len(
            {
                one,
                Splitter(encode, chunk_tokens=65).fingerprint,
                Splitter(encode, chunk_tokens=64, overlap_tokens=1).fingerprint,
            }
        )
        == 3
    )


@pytest.mark.parametrize(("chunk", "overlap"), [(0, 0), (31, 0), (-1, 0), (64, -1), (64, 33)])
def test_sizes_without_meaning_are_refused(encode: Encode, chunk: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"Use (at least 32|0 to 32)\."):
        Splitter(encode, chunk_tokens=chunk, overlap_tokens=overlap)


def test_a_character_longer_than_a_chunk_is_an_error() -> None:
    with pytest.raises(ConfigError, match="One character"):
        Splitter(lambda text: [0] * (100 * len(text)), chunk_tokens=32).split("abc")


def test_text_without_tokens_gives_no_chunks() -> None:
    assert Splitter(lambda text: []).split("\u200b\u200b") == []


def test_a_long_text_gives_no_tokenizer_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import PreTrainedTokenizerFast

    from lmcache_rag.prompt import SafeTokenizer

    short = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, eos_token="<|end|>")
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    try:
        chunks = Splitter(SafeTokenizer(short).text, chunk_tokens=64).split("<|end|> one two three " * 2000)
    finally:
        transformers.removeHandler(caplog.handler)
    assert len(chunks) > 10
    assert not caplog.records


texts = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from(["\n", "\n\n", " ", "\n## Heading ", "\n```\n", "\n---\n", "word ", "A sentence. ", "x" * 300]),
        st.sampled_from(["👨‍👩‍👧 ", "ﷺ", "天地玄黃。", "\u200b", "\t", "\x0b", "<|end|>"]),
    ),
    max_size=120,
).map("".join)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, chunk_tokens=st.integers(32, 80), overlap=st.integers(0, 16))
def test_any_text_is_covered_by_chunks_that_fit(encode: Encode, text: str, chunk_tokens: int, overlap: int) -> None:
    splitter = Splitter(encode, chunk_tokens=chunk_tokens, overlap_tokens=overlap)
    checked(text, splitter.split(text), splitter, encode)


def random_words(size: int) -> str:
    rnd = random.Random(7)
    return " ".join("".join(rnd.choices(string.ascii_lowercase, k=rnd.randint(2, 10))) for _ in range(size // 7))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: random_words(1_000_000), id="one line of different words"),
        pytest.param(lambda: random_words(1_000_000).replace(" ", ""), id="one line without a space"),
        pytest.param(lambda: "word " * 400_000, id="one line of one word"),
        pytest.param(lambda: "a" + " " * 2_000_000 + "b", id="two letters and a lot of space"),
        pytest.param(lambda: "\n" * 2_000_000 + "end", id="newlines"),
        pytest.param(lambda: "1\n" * 200_000, id="many short lines"),
        pytest.param(lambda: "天地玄黃。" * 60_000, id="no spaces between words"),
        pytest.param(lambda: "👨‍👩‍👧‍👦🇩🇪" * 20_000, id="emoji"),
    ],
)
def test_texts_without_structure_are_cut_in_seconds(encode: Encode, make: Callable[[], str]) -> None:
    text = make()
    splitter = Splitter(encode)
    begin = time.perf_counter()
    chunks = splitter.split(text)
    assert time.perf_counter() - begin < 30
    assert len(checked(text, chunks, splitter, encode)) >= 1
