"""Vocabularies that are published without a tokenizer.json: SentencePiece, Mistral's tekken, tiktoken, GPT-2's files.

`read_vocabulary` makes of one what a tokenizer.json would hold. Token ids equal those of transformers, and for
tekken.json those of mistral-common; neither is needed, nor are sentencepiece and protobuf.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Tiktoken files name no pattern; this is the one of Llama 3 and 4.
_TIKTOKEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The special tokens of tekken.json files that list none.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_TURNS = (
    "{%- if message['role'] == 'user' %}{{- '[INST]' + text + message['content'] + '[/INST]' }}"
    "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}{%- endif %}"
)
# A chat as mistral-common writes it, by version: until v3 the system text stands in the last turn of the user.
_TEKKEN_CHATS = {
    "v3": "{{- bos_token }}{%- set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] + '\n\n' %}{%- endif %}"
    "{%- set text = ns.system if loop.last else '' %}" + _TURNS + "{%- endfor %}",
    **dict.fromkeys(
        ("v7", "v11", "v13"),
        "{{- bos_token }}{%- set text = '' %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{%- endif %}" + _TURNS + "{%- endfor %}",
    ),
}


@dataclass(frozen=True)
class Found:
    """What a folder's vocabulary says.

    Attributes:
        facts: What a tokenizer.json would hold.
        named: Special tokens by name, such as bos_token.
        chat_template: How the vocabulary's own library writes a chat; None: it does not say.
    """

    facts: dict[str, Any]
    named: dict[str, str]
    chat_template: str | None = None


def read_vocabulary(path: Path, config: Mapping[str, Any], *, llama: bool) -> Found | None:
    """The vocabulary of a folder without a tokenizer.json; None if there is none of a kind that is known here.

    Args:
        path: The folder.
        config: Its tokenizer_config.json.
        llama: Whether transformers would take its class LlamaTokenizer for it.

    Raises:
        ValueError, LookupError: A file is damaged.
    """
    if (file := path / "tekken.json").is_file():
        found = _tekken(json.loads(file.read_text(encoding="utf-8")))
    elif (file := path / "tokenizer.model").is_file():
        content = file.read_bytes()
        ranks = _tiktoken_ranks(content)
        found = _tiktoken(ranks, config) if ranks else _sentencepiece(_Pieces.parse(content), config, llama=llama)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        found = _gpt2(path)
    else:
        return None
    named = {
        **found.named,
        **{name: token for name in ("bos_token", "eos_token") if (token := _text(config.get(name)))},
    }
    begin, end = (named.get(f"{name}_token", "") if config.get(f"add_{name}_token") else "" for name in ("bos", "eos"))
    if "tekken" in file.name and "add_bos_token" not in config:
        begin = named["bos_token"]
    if begin or end:
        found.facts["post_processor"] = _around(begin, end, found.facts)
    return found


def _text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _facts(model: dict[str, Any], pre_tokenizer: Any, decoder: Any, **parts: Any) -> dict[str, Any]:
    made = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder,
    }  # fmt: skip
    return {**made, **parts, "model": model}


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _around(begin: str, end: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A post-processor that puts tokens around a text."""
    vocab = facts["model"]["vocab"]
    numbers = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    numbers |= {token["content"]: token["id"] for token in facts["added_tokens"]}

    def part(token: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}] if token else []

    def sequence(name: Literal["A", "B"], kind: int) -> list[dict[str, Any]]:
        return [*part(begin, kind), {"Sequence": {"id": name, "type_id": kind}}, *part(end, kind)]

    known = {token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in (begin, end) if token}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": known,
    }


# -- vocabularies of bytes: tekken, tiktoken, GPT-2 -------------------------------------------------------------------


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a vocabulary of bytes, as GPT-2 has it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(shown)]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _byte_level(model: dict[str, Any], pattern: str, **parts: Any) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    words = {"type": "Sequence", "pretokenizers": [split, level]} if pattern else {**level, "use_regex": True}
    return _facts(model, words, {**level, "add_prefix_space": True, "use_regex": True}, **parts)


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    made |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**made, **options, "vocab": vocab, "merges": merges}


def _byte_bpe(ranks: Mapping[bytes, int], shift: int = 0) -> dict[str, Any]:
    """A model of tokens in the order in which they are merged."""
    letters = _byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in halves if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[names[left], names[right]] for left, right in pairs]
    vocab = {names[token]: rank + shift for token, rank in ranks.items()}
    return _bpe(vocab, merges, ignore_merges=True)


def _tekken(raw: Mapping[str, Any]) -> Found:
    """Mistral's: the special tokens come first."""
    config = raw["config"]
    listed = raw.get("special_tokens")
    if listed is None:
        special = list(_TEKKEN_SPECIAL)
    else:
        special = [str(token["token_str"]) for token in sorted(listed, key=lambda token: int(token["rank"]))]
    count = int(config.get("default_num_special_tokens") or len(special))
    special += [f"<SPECIAL_{number}>" for number in range(len(special), count)]
    size = config.get("default_vocab_size")
    words = raw["vocab"][: int(size) - count] if size else raw["vocab"]
    model = _byte_bpe({base64.b64decode(word["token_bytes"]): rank for rank, word in enumerate(words)}, shift=count)
    model["vocab"] |= {token: number for number, token in enumerate(special)}
    added = [_added(number, token, special=True) for number, token in enumerate(special)]
    named = {f"{name}_token": token for name, token in zip(("unk", "bos", "eos"), special, strict=False)}
    facts = _byte_level(model, str(config["pattern"]), added_tokens=added)
    return Found(facts, named, _TEKKEN_CHATS.get(str(config.get("version"))))


def _tiktoken_ranks(content: bytes) -> dict[bytes, int]:
    """The tokens of a tiktoken file, with their ranks; none if it is no such file."""
    if not re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", content):
        return {}
    try:
        lines = (line.split() for line in content.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        return {}


def _tiktoken(ranks: Mapping[bytes, int], config: Mapping[str, Any]) -> Found:
    """Llama 3's and 4's: special tokens follow, by the configuration."""
    listed = {int(number): _text(token) for number, token in (config.get("added_tokens_decoder") or {}).items()}
    extra = config.get("extra_special_tokens") or []
    special = [
        listed.get(number, f"<|reserved_token_{number}|>") for number in range(len(ranks), max(listed, default=-1) + 1)
    ]
    special += [token for each in extra if (token := _text(each)) not in special]
    added = [_added(len(ranks) + i, token, special=True) for i, token in enumerate(special)]
    return Found(_byte_level(_byte_bpe(ranks), _TIKTOKEN_WORDS, added_tokens=added), {})


def _gpt2(path: Path) -> Found:
    """GPT-2's and Qwen2's: vocab.json and merges.txt."""
    vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    return Found(_byte_level(_bpe(vocab, merges), ""), {})


# -- SentencePiece ----------------------------------------------------------------------------------------------------

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of pieces
_UNIGRAM = 1


@dataclass(frozen=True)
class _Pieces:
    """A SentencePiece model's file: pieces (text, score, kind), and what it says of training and of normalizing."""

    pieces: list[tuple[str, float, int]]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    @classmethod
    def parse(cls, content: bytes) -> _Pieces:
        """Read the fields that are needed here, by their numbers in sentencepiece_model.proto."""
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it is neither a SentencePiece model nor a tiktoken file")
        return cls(pieces, trainer, normalizer)

    def named(self) -> dict[str, str]:
        """The special tokens that it names."""
        names = (("unk", 40, 0, 45, "<unk>"), ("bos", 41, 1, 46, "<s>"), ("eos", 42, 2, 47, "</s>"))
        return {
            f"{name}_token": self.trainer.get(text, default.encode()).decode("utf-8")
            for name, number, usual, text, default in names
            if self.trainer.get(number, usual) < 1 << 31  # a negative one: there is none
        }


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: whole numbers, or bytes.

    Raises:
        ValueError: It is no such message, or cut off.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while at < len(content):
            key = varint()
            kind = key & 7
            if kind == 0:
                yield key >> 3, varint()
                continue
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            if at + length > len(content):
                raise ValueError("the SentencePiece model is cut off")
            yield key >> 3, content[at : at + length]
            at += length
    except LookupError as problem:
        raise ValueError("it is no SentencePiece model, or cut off") from problem


def _sentencepiece(model: _Pieces, config: Mapping[str, Any], *, llama: bool) -> Found:
    if llama:
        return _llama_sentencepiece(model)
    trainer, normalizer = model.trainer, model.normalizer
    renamed = {int(number): _text(token) for number, token in (config.get("added_tokens_decoder") or {}).items()}
    legacy, fallback = config.get("legacy", True), bool(trainer.get(35, 0))
    prefix, unknown = normalizer.get(3, 1), model.named().get("unk_token", "<unk>")
    if trainer.get(3, _UNIGRAM) == _UNIGRAM:
        texts = [text for text, _, _ in model.pieces]
        vocabulary = [[text, score] for text, score, _ in model.pieces]
        kind = {"type": "Unigram", "unk_id": trainer.get(40, 0), "vocab": vocabulary, "byte_fallback": fallback}
    else:
        kept = {text for number, (text, _, _) in enumerate(model.pieces) if number not in renamed}
        texts = [
            renamed[number] if number in renamed and renamed[number] not in kept else text
            for number, (text, _, _) in enumerate(model.pieces)
        ]
        scores = {
            text: (-score, number)
            for number, (text, (_, score, kind)) in enumerate(zip(texts, model.pieces, strict=True))
            if kind == _NORMAL
        }
        ranked = sorted(
            (*scores[text], text[:cut], text[cut:])
            for text in scores
            for cut in range(1, len(text))
            if text[:cut] in scores and text[cut:] in scores
        )
        kind = _bpe(
            {text: number for number, text in enumerate(texts)},
            [[left, right] for _, _, left, right in ranked],
            unk_token=unknown, fuse_unk=True, byte_fallback=fallback,
        )  # fmt: skip
    whole = [text for text, (_, _, kind) in zip(texts, model.pieces, strict=True) if kind == _USER_DEFINED]
    if kind["type"] == "BPE":
        kind["ignore_merges"] = bool(whole)

    def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    normalizers: list[dict[str, Any]] = []
    if charsmap := normalizer.get(2):
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if normalizer.get(4, 1):
        normalizers += [replaced({"Regex": r"\A +| +\z"}, ""), replaced({"Regex": " {2,}"}, " ")]
    if normalizer.get(5, 1):
        normalizers.append(replaced({"String": " "}, "▁"))
    pre_tokenizers: list[dict[str, Any]] = []
    if prefix:
        if legacy:
            normalizers.append(replaced({"Regex": "\\A▁"}, "▁▁"))
        pre_tokenizers.append(_metaspace("always" if legacy else "first"))
    if whole:
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        pre_tokenizers.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    decoders: list[dict[str, Any]] = [replaced({"String": "▁"}, " ")]
    decoders += [{"type": "ByteFallback"}] if fallback else []
    decoders += [{"type": "Fuse"}] if prefix or fallback else []
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    added = [
        _added(number, text, special=True)
        for number, (text, (_, _, kind)) in enumerate(zip(texts, model.pieces, strict=True))
        if kind == _CONTROL
    ]
    facts = _facts(
        kind,
        {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        {"type": "Sequence", "decoders": decoders},
        normalizer={"type": "Sequence", "normalizers": normalizers},
        added_tokens=added,
    )
    return Found(facts, model.named())


def _llama_sentencepiece(model: _Pieces) -> Found:
    """As transformers' LlamaTokenizer takes it: by the order of pieces; what stands around is set by that class."""
    vocab = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    ranked = sorted(
        (vocab[text], cut, len(text) - cut, text[:cut], text[cut:])
        for text in vocab
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    )
    added = [
        _added(number, text, special=True)
        for number, (text, _, kind) in enumerate(model.pieces)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    facts = _facts(
        _bpe(vocab, [[left, right] for *_, left, right in ranked]), _metaspace("first"), None, added_tokens=added
    )
    return Found(facts, {})


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
