"""Chunks of texts in many scripts, with code, tables, front matter and invisible characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.documents import Chunk, Document, Splitter
from lmcache_rag.documents.blocks import find_blocks
from lmcache_rag.documents.decoding import is_visible
from lmcache_rag.documents.graphemes import is_border, last_border

SENTENCES = {
    "latin": "Größe und Café, naïve façade. ",
    "combining": "Cafe\u0301 a\u0308o\u0302u\u0308 z\u0323\u0307. ",
    "cyrillic": "Реки несут воду к морю. ",
    "greek": "Τα ποτάμια φέρνουν νερό. ",
    "arabic": "تَحمِلُ الأنهارُ الماءَ إلى البحر؟ ",
    "hebrew": "הַנְּהָרוֹת נוֹשְׂאִים מַיִם. ",
    "devanagari": "नदियाँ समुद्र तक क्षत्रिय पानी ले जाती हैं। ",
    "tamil": "ஆறுகள் கடலுக்கு நீரைக் கொண்டு செல்கின்றன. ",
    "bengali": "নদীগুলি সমুদ্রে জল নিয়ে যায়। ",
    "thai": "แม่น้ำนำน้ำไปสู่ทะเลที่กว้างใหญ่",
    "khmer": "ទន្លេនាំទឹកទៅសមុទ្រ។",
    "burmese": "မြစ်များသည် ပင်လယ်သို့ ရေကို သယ်ဆောင်သည်။",
    "tibetan": "གཙང་པོས་རྒྱ་མཚོར་ཆུ་འདྲེན།",
    "chinese": "河流把水带到大海，山在旁边。",
    "japanese": "川は水を海へ運び、山はそばに立つ。がぎぐ",
    "korean": "강은 물을 바다로 나른다. \u1112\u1161\u11ab\u1100\u1173\u11af ",
    "emoji": "👨‍👩‍👧‍👦🇩🇪🇯🇵🏳️‍🌈👍🏽🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "zalgo": "Z\u0300\u0301\u0302\u0303\u0304a\u0310\u0311\u0312l ",
    "spaced mark": "a \u0301b \u0308",
}
INVISIBLE = ["\u200b" * 300, "\u2060\ufeff", "\u00ad", "\u3164" * 80, "\u2800 " * 90, "\x01\x02" * 70, "\u200e\u202e"]
BLOCKS = [
    "\n```python\n# not a heading\n\nx = 1\n```\n",
    "\n~~~\n---\n~~~\n",
    "\n| Name | Born |\n| --- | :-: |\n| Ada | 1815 |\n| Bob | |\n",
    "\na | b\n--|--\n1 | 2\n",
    "\n```\nnever closed\n",
    "\n## 見出し\n\n",
    "\n---\n",
]


def encode(text: str) -> Sequence[int]:
    """As a byte-level tokenizer without merges over words: long for other scripts than Latin."""
    return range(sum(-(-len(word.encode()) // 3) for word in regex.findall(r"\s+|[^\s]+", text)))


def borders(text: str) -> set[int]:
    return {0, len(text)} | {match.start() for match in regex.finditer(r"\X", text)}


def checked(text: str, splitter: Splitter, media_type: str = "") -> list[Chunk]:
    chunks = splitter.split(text, media_type=media_type)
    whole, position = borders(text), 0
    for chunk in chunks:
        own = chunk.text[chunk.repeated :]
        stop = chunk.start + len(own)
        assert own == text[chunk.start : stop]
        assert is_visible(own)
        assert chunk.tokens == len(encode(chunk.text)) <= splitter.chunk_tokens
        assert {chunk.start, stop} <= whole, "a grapheme cluster is cut"
        left_out = text[position : chunk.start]
        assert not is_visible(left_out) or left_out.strip() in chunk.text[: chunk.repeated]
        position = max(position, stop)
    assert not is_visible(text[position:])
    return chunks


@pytest.mark.parametrize("script", SENTENCES)
@pytest.mark.parametrize("overlap", [0, 16])
def test_no_script_is_cut_inside_a_grapheme(script: str, overlap: int) -> None:
    for size in (32, 41, 64):
        chunks = checked(SENTENCES[script] * 80, Splitter(encode, chunk_tokens=size, overlap_tokens=overlap))
        assert len(chunks) > 2


@pytest.mark.parametrize("script", [script for script in SENTENCES if script != "spaced mark"])
def test_overlap_overlaps_in_every_script(script: str) -> None:
    text = SENTENCES[script] * 80
    chunks = checked(text, Splitter(encode, chunk_tokens=96, overlap_tokens=40))
    shared = [before.start + len(before.text) - after.start for before, after in pairwise(chunks)]
    assert sum(characters > 0 for characters in shared) > 0.9 * len(shared)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*SENTENCES.values(), *INVISIBLE, *BLOCKS, "\n\n", "\n", "x" * 200]), max_size=40),
    front=st.sampled_from(["", "---\ntitle: x\ntags: [a]\n---\n", "+++\na = 1\n+++\n"]),
    size=st.integers(32, 70),
    overlap=st.integers(0, 16),
)
def test_any_mixture_of_scripts_is_covered(parts: list[str], front: str, size: int, overlap: int) -> None:
    text = front + "".join(parts)
    chunks = checked(text, Splitter(encode, chunk_tokens=size, overlap_tokens=overlap))
    limit = size - overlap
    for block in find_blocks(text):
        part = text[block.start : block.stop].strip()
        if len(encode(part)) <= limit and is_visible(part):
            assert any(part in chunk.text for chunk in chunks), f"{part!r} fits, and is cut"


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=400), size=st.integers(32, 50), overlap=st.integers(0, 16))
def test_any_text_is_cut_between_graphemes(text: str, size: int, overlap: int) -> None:
    checked(text, Splitter(encode, chunk_tokens=size, overlap_tokens=overlap))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("a \n\u0301\u200d\U0001f1e9\U0001f1ea👩🏽क\u094dषกำ한\u1112\u1161"), max_size=40))
def test_borders_are_those_of_the_whole_text(text: str) -> None:
    whole = borders(text)
    for place in range(len(text) + 1):
        assert is_border(text, place) == (place in whole)
        assert last_border(text, 0, place) == max((b for b in whole if 0 < b <= place), default=0)


def test_a_cluster_larger_than_a_chunk_is_cut() -> None:
    text = "a" + "\u0301" * 5000
    chunks = Splitter(encode, chunk_tokens=32).split(text)
    assert "".join(chunk.text for chunk in chunks) == text


# Tables


def table(rows: int, head: str = "| Name | Born |\n| --- | --- |\n") -> str:
    return head + "".join(f"| Person {number} | {1800 + number} |\n" for number in range(rows))


@pytest.mark.parametrize("before", ["", "# People\n\nA short introduction.\n\n"])
def test_a_tables_head_is_in_each_of_its_chunks(before: str) -> None:
    text = before + table(60) + "\nAnd the text goes on.\n"
    chunks = checked(text, Splitter(encode, chunk_tokens=64))
    rows = [chunk for chunk in chunks if "Person" in chunk.text]
    assert len(rows) > 5
    assert all("| Name | Born |\n| --- | --- |\n" in chunk.text for chunk in rows)
    assert all(chunk.text.count("| Person") == chunk.text.count("\n| Person") for chunk in rows), "only whole rows"
    assert [chunk.repeated > 0 for chunk in rows] == [False] + [True] * (len(rows) - 1)


def test_a_csv_files_head_is_in_each_of_its_chunks() -> None:
    text = "name,note\n" + "".join(f'Person {number},"two\nlines, ""quoted"""\n' for number in range(80))
    chunks = checked(text, Splitter(encode, chunk_tokens=64, overlap_tokens=8), "text/csv")
    assert len(chunks) > 5
    assert all(chunk.text.startswith("name,note\nPerson") for chunk in chunks)
    assert all(chunk.text.endswith('"""') for chunk in chunks), "a row in quotes is cut"


@pytest.mark.parametrize("row", ['a,"never closed\n', 'a"b,c\n', "1;2;3\n", "\n"])
def test_odd_csv_text_is_covered(row: str) -> None:
    checked("head,of it\n" + row * 500, Splitter(encode, chunk_tokens=40), "text/csv")


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from('ab,;"\n \r|é東'), max_size=600), size=st.integers(32, 50))
def test_any_csv_text_is_covered(text: str, size: int) -> None:
    checked(text, Splitter(encode, chunk_tokens=size), "text/csv")


def test_a_row_longer_than_a_chunk_keeps_the_head() -> None:
    text = "| Name | Text |\n| --- | --- |\n| Ada | " + "many words " * 100 + " |\n| Bob | few |\n"
    chunks = checked(text, Splitter(encode, chunk_tokens=64))
    assert len(chunks) > 4
    assert all("| Name | Text |" in chunk.text for chunk in chunks)


def test_a_head_of_half_a_chunk_is_not_repeated() -> None:
    head = "| " + " | ".join(f"Column {number}" for number in range(20)) + " |\n" + "| --- " * 20 + "|\n"
    chunks = checked(table(30, head), Splitter(encode, chunk_tokens=64))
    assert not any(chunk.repeated for chunk in chunks)


# Code and front matter


def test_code_that_fits_is_not_cut() -> None:
    code = "```python\n# a comment\n\n# another\n\ndef f():\n    return 1\n```"
    text = "\n\n".join(["Words before it, " * 5 + "and more.", code] * 8)
    chunks = checked(text, Splitter(encode, chunk_tokens=64))
    assert sum(chunk.text.count(code) for chunk in chunks) == 8


def test_long_code_is_cut_between_lines() -> None:
    text = "Before.\n\n```\n" + "".join(f"value_{number} = {number}\n" for number in range(100)) + "```\n\nAfter."
    chunks = checked(text, Splitter(encode, chunk_tokens=64))
    assert all(line in text.splitlines() for chunk in chunks for line in chunk.text.splitlines())


def test_front_matter_stays_whole() -> None:
    front = "---\ntitle: Rivers\nauthor: Ada\n\ntags:\n  - water\n---"
    chunks = checked(front + "\n\n" + "Words of the text. " * 100, Splitter(encode, chunk_tokens=64))
    assert chunks[0].text.startswith(front)


@pytest.mark.parametrize("filler", ["\u200b", "\u3164", "\u2800", "\x01", "\U000e0041", "\u00ad", "\ufeff"])
def test_no_chunk_is_without_visible_text(filler: str) -> None:
    text = "Seen." + "\n\n" + (filler * 50 + "\n\n") * 20 + "Also seen."
    assert [chunk.text for chunk in Splitter(encode, chunk_tokens=32).split(text) if not is_visible(chunk.text)] == []
    assert Splitter(encode, chunk_tokens=32).split(filler * 500) == []


def test_chunks_carry_the_facts_of_their_place() -> None:
    pages = ["Words of the first page. " * 20, "Words of the next page. " * 20]
    text = "\n\n".join(pages)
    places = ((0, {"page": 1, "page_label": "i"}), (len(pages[0]) + 2, {"page": 2, "page_label": "1"}))
    chunks = Splitter(encode, chunk_tokens=64).split_document(Document("a", text, "", "a", {}, places))
    assert chunks[0].metadata == {"page": 1, "page_label": "i"}
    assert chunks[-1].metadata == {"page": 2, "page_label": "1"}
    assert all((chunk.metadata["page"] == 2) == (chunk.start >= places[1][0]) for chunk in chunks)


def test_marks_of_tables_do_not_hold_the_search() -> None:
    for text in (
        " " * 10**6 + "x",
        "-" * 10**6,
        "|" * 10**6,
        "| -" * 10**5,
        "```\n~~~\n" * 10**5,
        "a|b\n-|-\n" * 10**5,
    ):
        assert isinstance(find_blocks(text), list)
