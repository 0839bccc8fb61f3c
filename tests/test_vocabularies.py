"""A folder without a tokenizer.json gives the ids of transformers, or of mistral-common, without either of them."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vocabulary_kit import check_same_tokens, package_folder, thousand_texts

from lmcache_rag.engines.base import EngineInfo
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.tokenizer import ModelTokenizer, auto_tokenizer, chat_text, open_tokenizer

INFO = EngineInfo("embedded", "m", "r", "float32", "t", 64, 8192, 1)
SPM = "data/tokenizer.model.v1"
SPM3 = "data/mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = "data/tekken_240911.json"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **NAMED}
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "Why?"},
]


@dataclass(frozen=True)
class Raw:
    """A vocabulary's file of a package, under the name that a model's folder has it."""

    package: str
    file: str
    config: dict[str, Any] | None = None
    model_type: str = "llama"
    name: str = "tokenizer.model"

    def folder(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        shutil.copy(package_folder(self.package) / self.file, path / self.name)
        (path / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        if self.config is not None:
            (path / "tokenizer_config.json").write_text(json.dumps(self.config))
        return path


HEADERS_ADDED = {str(128_000 + i): {"content": token, "special": True} for i, token in enumerate(HEADERS)}
RAW = {
    "llama2": Raw("mistral_common", SPM, LLAMA),
    "llama2, not legacy": Raw("mistral_common", SPM, {**LLAMA, "legacy": False}),
    "llama2, no configuration": Raw("mistral_common", SPM),
    "mistral v0.1": Raw("mistral_common", SPM, LLAMA, "mistral"),
    "mistral v0.2": Raw("mistral_common", "data/mistral_instruct_tokenizer_240216.model.v2", LLAMA, "mistral"),
    "mistral v0.3": Raw("mistral_common", SPM3, {**LLAMA, "legacy": False}, "mistral"),
    "mistral v0.3's pieces as llama": Raw("mistral_common", SPM3, LLAMA),
    "mistral v7": Raw("mistral_common", "data/mistral_instruct_tokenizer_241114.model.v7", LLAMA, "mistral"),
    "llama3": Raw("llama_models", "llama3/tokenizer.model"),
    "llama3, special tokens": Raw(
        *("llama_models", "llama3/tokenizer.model"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": HEADERS[0], "added_tokens_decoder": HEADERS_ADDED},
    ),
    "unigram": Raw("ai21_tokenizer", "resources/j2-tokenizer/j2-tokenizer.model"),
}
SOON = ("llama2", "mistral v0.3")


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.full) for n in RAW])
def test_raw_vocabularies_give_transformers_ids(name: str, tmp_path: Path) -> None:
    path = RAW[name].folder(tmp_path / "m")
    ours, theirs = open_tokenizer(path), auto_tokenizer(path)
    assert isinstance(ours, ModelTokenizer)
    assert not isinstance(theirs, ModelTokenizer)
    assert ours.special_tokens_map == {key: str(token) for key, token in theirs.special_tokens_map.items()}
    check_same_tokens(ours, theirs)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_vocab_and_merges_files_are_read(kind: str, tmp_path: Path, smollm2_path: Path) -> None:
    model = json.loads((smollm2_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = json.loads((smollm2_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": kind}))
    ours, theirs = open_tokenizer(tmp_path), auto_tokenizer(tmp_path)
    assert isinstance(ours, ModelTokenizer)
    check_same_tokens(ours, theirs)


def test_tekken_alone_gives_its_own_librarys_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken import Encoding

    path = Raw("mistral_common", TEKKEN, None, "mistral", "tekken.json").folder(tmp_path / "m")
    raw = json.loads((path / "tekken.json").read_text())
    words = raw["vocab"][: raw["config"]["default_vocab_size"] - 1000]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    reference = Encoding("tekken", pat_str=raw["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        ours = open_tokenizer(path)
    assert len(ours) == 131_072
    assert ours.encode("Quince") == [1, *ours.encode("Quince", add_special_tokens=False)]
    builder = PromptBuilder(ours, INFO)
    for text in thousand_texts():
        assert list(builder.chunk_ids(text)) == [1000 + rank for rank in reference.encode_ordinary(text)], text
    expected = "<s>[INST]What?[/INST]That.</s>[INST]Be brief.\n\nWhy?[/INST]"
    assert chat_text(ours, CHAT, {}) == expected


def test_the_embedded_engine_reads_tekken_json_too(tmp_path: Path) -> None:
    words = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = {"pattern": r"\p{L}+|\s+|.", "default_vocab_size": 264, "default_num_special_tokens": 8, "version": "v7"}
    (tmp_path / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": words, "special_tokens": special[::-1]})
    )
    found = auto_tokenizer(tmp_path)
    assert isinstance(found, ModelTokenizer)
    assert found.encode("A<SPECIAL_7>b") == [1, 8 + ord("A"), 7, 8 + ord("b")]
    assert chat_text(found, CHAT, {}) == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]What?[/INST]That.</s>[INST]Why?[/INST]"
    )


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\xff" * 40, "cut", "pickle"], ids=["empty", "0a", "ff", "cut", "text"]
)
def test_a_damaged_tokenizer_model_is_named(content: bytes | str, tmp_path: Path) -> None:
    if content == "cut":
        content = (package_folder("mistral_common") / SPM).read_bytes()[:300_001]
    (tmp_path / "tokenizer.model").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(EngineError, match="could be loaded from") as caught:
        open_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_a_damaged_tekken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(EngineError, match="could be loaded from"):
        open_tokenizer(tmp_path)
