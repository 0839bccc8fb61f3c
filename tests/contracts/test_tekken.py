"""A tekken.json alone gives the ids and chats of mistral-common, by which vLLM serves such a model."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from vocabulary_kit import thousand_texts

from lmcache_rag.tokenizer import SafeTokenizer, chat_text, open_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "user", "content": " What?\n"}, {"role": "assistant", "content": "That."}]
LAST = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize("version", ["v3", "v7", "v13"])
def test_tekken_alone_gives_mistral_commons_ids(version: str, tmp_path: Path) -> None:
    raw = json.loads((DATA / "tekken_240911.json").read_text())
    if version != "v3":
        raw["config"]["version"] = version
        names = [str(getattr(t["token_str"], "value", t["token_str"])) for t in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
        names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
        raw["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
        raw.pop("multimodal", None)
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    ours, theirs = open_tokenizer(tmp_path), Tekkenizer.from_file(tmp_path / "tekken.json")
    assert len(ours) == theirs.n_words
    text_ids = SafeTokenizer.of(ours).text
    for text in thousand_texts():
        assert text_ids(text) == theirs.encode(text, bos=False, eos=False), text
    assert ours.encode("Quince") == theirs.encode("Quince", bos=True, eos=False)
    chats = MistralTokenizer.from_file(str(tmp_path / "tekken.json"))
    for messages in ([LAST], [SYSTEM, LAST], [*TURNS, LAST], [SYSTEM, *TURNS, LAST]):
        expected = chats.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ours.encode(chat_text(ours, messages, {}), add_special_tokens=False) == expected
