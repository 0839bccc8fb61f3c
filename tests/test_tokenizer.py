"""A client's tokenizer gives transformers' ids and chats, and prompts keep their contract, for every vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vocabulary_kit import VOCABULARIES, check_same_tokens, model_folder

from lmcache_rag.engines.base import EngineInfo
from lmcache_rag.errors import EngineError, OptionalDependencyError
from lmcache_rag.prompt import PromptBuilder, Turn
from lmcache_rag.tokenizer import ModelTokenizer, auto_tokenizer, open_tokenizer

INFO = EngineInfo("embedded", "m", "r", "float32", "t", 64, 8192, 1)
HISTORY = [Turn("user", "First?"), Turn("assistant", "<think>\nHidden.\n</think>\n\nShown.")]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What?\n"},
    {"role": "assistant", "content": HISTORY[1].content},
    {"role": "user", "content": "Why?"},
]


# The others take longer to convert, or differ little: `make test-full` has them.
SOON = ("llama2, legacy", "mistral v0.3", "qwen3", "smollm2")


@pytest.fixture(
    scope="module",
    params=[name if name in SOON else pytest.param(name, marks=pytest.mark.full) for name in VOCABULARIES],
)
def name(request: pytest.FixtureRequest) -> str:
    """A vocabulary; all tests of one run before those of the next, since each takes much memory."""
    return str(request.param)


@pytest.fixture(scope="module")
def both(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelTokenizer, Any]:
    """Its tokenizer: ours, transformers'."""
    path = model_folder(name, tmp_path_factory.mktemp("model") / "m")
    ours = open_tokenizer(path)
    assert isinstance(ours, ModelTokenizer)
    return ours, auto_tokenizer(path)


@pytest.fixture(scope="module")
def builder(both: tuple[ModelTokenizer, Any], name: str) -> PromptBuilder:
    """Prompts with ours."""
    if name == "minilm":
        pytest.skip("no language model")
    return PromptBuilder(both[0], INFO)


def test_ids_are_those_of_transformers(both: Any) -> None:
    check_same_tokens(*both)


def test_chats_are_rendered_as_transformers_does(both: Any) -> None:
    ours, theirs = both
    for turns in (CHAT, CHAT[1:], CHAT[1:2]):
        for options in ({}, {"enable_thinking": False, "date_string": "1 May 2031"}):
            shown = []
            for tokenizer in (ours, theirs):
                try:
                    shown.append(
                        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
                    )
                except Exception as problem:  # what a template refuses, it refuses in both
                    shown.append(str(problem) if theirs.chat_template else "no template")
            assert shown[0] == shown[1]


def test_ingest_and_query_agree_in_every_family(both: Any, builder: PromptBuilder) -> None:
    _, theirs = both
    other = PromptBuilder(theirs, INFO)
    assert builder.fingerprint == other.fingerprint
    assert len(builder.prefix_ids) % 64 == 0
    control = {i for i, token in theirs.added_tokens_decoder.items() if str(token) != theirs.unk_token}
    evil = "".join(str(token) for token in theirs.added_tokens_decoder.values())
    chunks = ["Figs ripen in May.", " Quince.\n\nIn two paragraphs.", evil, "日本語 naïve 👩‍👩‍👧 12,345"]
    prompt = builder.query(chunks, evil, HISTORY)
    assert prompt == other.query(chunks, evil, HISTORY)
    for span, text in zip(prompt.chunks, chunks, strict=True):
        assert prompt.token_ids[span.start : span.end] == builder.ingest(text).chunk_ids
        assert control.isdisjoint(builder.chunk_ids(text))
    # What only the template may produce is as often in the prompt as with harmless texts.
    harmless = builder.query(["Figs."] * 4, "What?", [Turn("user", "First?"), Turn("assistant", "Shown.")])
    assert [i for i in prompt.token_ids if i in control] == [i for i in harmless.token_ids if i in control]


def test_a_prompt_begins_as_the_model_expects(both: Any, builder: PromptBuilder) -> None:
    ours, theirs = both
    prompt = builder.query(["Quince."], "What?")
    if ours.chat_template:
        text = theirs.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
        expected = theirs.encode(text, add_special_tokens=False)
    else:
        expected = theirs.encode("You")
    assert prompt.token_ids[0] == expected[0]
    assert prompt.token_ids.count(theirs.bos_token_id) == expected.count(theirs.bos_token_id)


def test_no_space_is_put_before_a_part_of_a_prompt(both: Any, builder: PromptBuilder, name: str) -> None:
    ours, _ = both
    if name == "unigram":
        pytest.skip("it makes one space of all white space")
    for text in ("Quince.", " Quince.", "\nQuince"):
        assert ours.decode((*builder.prefix_ids[:1], *builder.chunk_ids(text))).endswith(
            ours.decode(builder.prefix_ids[:1]) + text
        )
    shown = ours.decode(builder.query(["Passage.", "Other."], "What?").token_ids)
    assert "Passages:\n\nPassage.\n\nOther.\n\nQuestion: What?" in shown


def test_reasoning_is_left_out_where_the_template_does(both: Any, builder: PromptBuilder) -> None:
    ours, _ = both
    text = ours.decode(builder.query(["Quince."], "Second?", HISTORY).token_ids)
    assert "Shown." in text
    assert ("Hidden." in text) == ("</think>" not in (ours.chat_template or ""))


def test_no_tokenizer_json_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(OptionalDependencyError, match=r"\.\[embedded\]"):
        open_tokenizer(tmp_path)


def test_a_damaged_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="could be loaded from"):
        open_tokenizer(tmp_path)
