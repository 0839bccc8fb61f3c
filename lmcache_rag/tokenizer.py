"""A model's tokenizer and chat template, read from the model's files without transformers.

`ModelTokenizer` is what a client needs of transformers' AutoTokenizer, with the same token ids and the same rendered
chat templates. `SafeTokenizer` encodes the parts of a prompt, of either of them.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from lmcache_rag._utils import needs, well_formed
from lmcache_rag.errors import EngineError, LMCacheRAGError, PromptError
from lmcache_rag.vocabularies import read_vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END_OF_TEXT = "<|endoftext|>"
# Named tokens that transformers' classes have where the files name none.
_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT},
    "GPT2Tokenizer": {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT},
}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Models for which transformers uses tokenizer.json as it is, whichever class their files name.
_AS_IT_IS = frozenset({"mistral", "mixtral", "mistral3", "ministral", "ministral3", "pixtral", "voxtral"})


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder: a ModelTokenizer, or transformers' own of a kind that only transformers reads.

    Raises:
        EngineError: It cannot be read.
        OptionalDependencyError: Only transformers reads it, which is not installed.
    """
    try:
        found = ModelTokenizer.open(path)
        return auto_tokenizer(path) if found is None else found
    except LMCacheRAGError:
        raise
    except Exception as problem:  # the library tokenizers raises plain ones
        raise EngineError(
            f"No tokenizer could be loaded from {path}: {problem}", remedy="Name a folder with a tokenizer.json."
        ) from problem


def auto_tokenizer(path: Path | str) -> Any:
    """Transformers' tokenizer of a folder, with a fast backend; ours of a tekken.json that stands alone.

    Raises:
        OptionalDependencyError: transformers is not installed.
        OSError, ValueError, ImportError: It cannot be read.
    """
    with needs("embedded"):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Transformers needs mistral-common for it, whose tokenizer has no fast backend.
    if not (Path(path) / "tokenizer.json").is_file() and (Path(path) / "tekken.json").is_file():
        return ModelTokenizer.open(Path(path))

    found = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if getattr(found, "backend_tokenizer", None) is None:  # Mistral's own, where mistral-common is installed
        found = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, fix_mistral_regex=True)
    return found


class ModelTokenizer:
    """What clients use of a transformers tokenizer, made of a tokenizer.json or of an older form of vocabulary.

    Args:
        backend: The tokenizer of the library `tokenizers`.
        named: Its special tokens by name, such as bos_token.
        chat_template: Its chat template; None: it has none.
    """

    def __init__(self, backend: Any, *, named: Mapping[str, str], chat_template: str | None = None) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(named)
        self.chat_template = chat_template

    @classmethod
    def open(cls, path: Path) -> ModelTokenizer | None:
        """The tokenizer of a folder; None if it has no vocabulary that is read here."""
        from tokenizers import Tokenizer

        config, model = _read(path / "tokenizer_config.json"), _read(path / "config.json")
        name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
        if name == "LlamaTokenizer" and model.get("model_type") in _AS_IT_IS:
            name = ""
        file, older = path / "tokenizer.json", None
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif (older := read_vocabulary(path, config, llama=name == "LlamaTokenizer")) is not None:
            text = json.dumps(older.facts)
        else:
            return None
        if name == "LlamaTokenizer" and '"ByteLevel"' in text:
            name = ""
        backend = Tokenizer.from_str(_as_class(name, text, config))
        backend.no_truncation()
        backend.no_padding()
        if "added_tokens_decoder" not in config:
            config = {**config, **_read(path / "special_tokens_map.json")}
        named = {
            **(older.named if older else {}),
            **_DEFAULTS.get(name, {}),
            **{key: content for key in _NAMED if (content := _content(config.get(key)))},
        }
        _add_tokens(backend, config, named)
        return cls(
            backend, named=named, chat_template=_chat_template(path, config) or (older.chat_template if older else None)
        )

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """As `encode`, in the form that transformers gives."""
        return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, in which special tokens are recognised."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation by the model's chat template.

        Raises:
            ValueError: The model has no chat template, or token ids are asked for.
        """
        if self.chat_template is None or tokenize:
            raise ValueError("only the text of a chat template can be given, of a tokenizer that has one")
        variables = {"add_generation_prompt": add_generation_prompt, **self.special_tokens_map, **variables}
        return render_chat(self.chat_template, messages, variables)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own comes before the configuration; of several the default one."""
    file = path / "chat_template.jinja"
    found: Any = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}
    return found.get("default") if isinstance(found, dict) else found


def _as_class(name: str, text: str, config: Mapping[str, Any]) -> str:
    """tokenizer.json with what transformers' class of that name uses in the place of the file's own settings."""
    if name not in _DEFAULTS:
        return text
    facts = json.loads(text)
    if facts["model"].get("type", "BPE") != "BPE":
        return text
    space = config.get("add_prefix_space")
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(space), "trim_offsets": True, "use_regex": True}
    llama = name == "LlamaTokenizer"
    facts["normalizer"] = None
    facts["model"].update(unk_token=None, fuse_unk=llama, byte_fallback=llama)
    if llama:
        scheme = "never" if space is False else "always" if config.get("legacy") else "first"
        facts["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False
        }  # fmt: skip
        strip = [] if space is False else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        decoders = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
        facts["decoder"] = {"type": "Sequence", "decoders": decoders}
    elif name == "GPT2Tokenizer":
        facts["pre_tokenizer"] = byte_level
    else:
        facts["normalizer"] = {"type": "NFC"}
        split = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
        facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    return json.dumps(facts)


def _add_tokens(backend: Any, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the tokens that the configuration names and tokenizer.json does not have."""
    from tokenizers import AddedToken

    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = [AddedToken(**token) for _, token in listed if isinstance(token, dict)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [*named.values(), *(_content(each) for each in (extra.values() if isinstance(extra, dict) else extra))]
    known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
    tokens += [AddedToken(each, special=True, normalized=False) for each in dict.fromkeys(special) if each not in known]
    if tokens:
        backend.add_tokens(tokens)


# -- chat templates ---------------------------------------------------------------------------------------------------


_DATE = datetime(2024, 7, 26)


def chat_template(tokenizer: Any) -> str:
    """The chat template of a ModelTokenizer or transformers' own, of several the default one; "": there is none."""
    found = getattr(tokenizer, "chat_template", None)
    return (found.get("default") if isinstance(found, dict) else found) or ""


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str | None:
    """The text of a conversation by a tokenizer's chat template, before an answer; None: it has no template.

    A template that asks for today's date gets a fixed one: a prompt that changes every day would make all KV useless.

    Args:
        tokenizer: A ModelTokenizer, or transformers' own.
        messages: The conversation, of plain values.
        variables: What else the template may use.
    """
    if not (template := chat_template(tokenizer)):
        return None
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    fixed = {"strftime_now": _DATE.strftime, "add_generation_prompt": True}
    return render_chat(template, messages, {**named, **fixed, **variables})


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a conversation, as transformers renders it.

    Args:
        template: The chat template, in Jinja.
        messages: The conversation, of plain values.
        variables: What else the template may use: special tokens by name, add_generation_prompt, options of its own.
    """
    context = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    return str(_compiled(template).render(messages=[dict(message) for message in messages], **context))


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    """Compile a template, in Jinja's sandbox: it comes with the model, from whoever published that."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks an assistant's text for training."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


# -- the parts of a prompt --------------------------------------------------------------------------------------------

_FILLERS = ("\n", " ", ".", "-", "_")
_lock = threading.Lock()
_made: weakref.WeakKeyDictionary[Any, tuple[int, SafeTokenizer]] = weakref.WeakKeyDictionary()


class SafeTokenizer:
    """A tokenizer for the parts of a prompt, which are encoded one by one.

    A document or a question may contain text such as ``<|im_end|>``. Only the template may produce that *token*: a
    document that could do so would end the user's turn and pose as the system. So text goes through a copy of the
    tokenizer without added tokens (those of white space alone stay: they are ordinary text) and without any way to
    put one together, and the result is checked too.

    SentencePiece tokenizers put a space before a text. A part that stands inside a prompt gets none.
    """

    @classmethod
    def of(cls, tokenizer: Any) -> SafeTokenizer:
        """The SafeTokenizer of a tokenizer; making it copies the whole vocabulary, which takes most of a second."""
        with _lock:
            size, made = _made.get(tokenizer, (-1, None))
            if made is None or size != len(tokenizer):  # tokens may have been added since
                made = cls(tokenizer)
                _made[tokenizer] = (len(tokenizer), made)
            return made

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PromptError(
                f"{type(tokenizer).__name__} has no fast backend.",
                remedy="Use a model that comes with a tokenizer.json.",
            )
        serialised = backend.to_str()
        facts = json.loads(serialised)
        control = [token for token in facts["added_tokens"] if not _is_space(token["content"])]
        unknown = _unknown_token(facts["model"])
        # A text may have letters that the vocabulary lacks; that ends no turn.
        self._control = frozenset(int(token["id"]) for token in control if token["content"] != unknown)
        self._begins = re.compile(
            "|".join((r"\s*" if t["lstrip"] else "") + re.escape(t["content"]) for t in _longest_first(control))
            or "(?!)"
        )
        self._first = _tokenizer(serialised)
        prepends = _without_prefix_space(facts)
        self._template = _tokenizer(json.dumps(facts)) if prepends else self._first
        facts["added_tokens"] = [token for token in facts["added_tokens"] if _is_space(token["content"])]
        # The post-processor only adds special tokens around a text, and may name some that are gone now.
        facts["post_processor"] = None
        _make_unreachable(facts["model"], {token["content"] for token in control})
        self._text = _tokenizer(json.dumps(facts))

    def filler(self, *preferred: str) -> tuple[str, list[int]]:
        """A neutral text that is one token, and that token: a preferred text if one is.

        Raises:
            PromptError: There is none.
        """
        for text in (*preferred, *_FILLERS):
            if len(ids := self.text(text)) == 1:
                return text, ids
        raise PromptError("No white space or sign is one token of this model.", remedy="This model cannot be used.")

    def start(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text, such as the one that begins a sequence."""
        plain = self._first.encode("a", add_special_tokens=False).ids
        whole = self._first.encode("a", add_special_tokens=True).ids
        return list(whole[: next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)])

    def template(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a piece of the chat template; special tokens are recognised, none is added.

        Args:
            text: The piece.
            first: Whether a prompt begins with it.
        """
        if first or self._template is self._first:
            return list(self._first.encode(text, add_special_tokens=False).ids)
        found = self._begins.search(text)
        inside = found.start() if found else len(text)
        ids = list(self._template.encode(text[:inside], add_special_tokens=False).ids) if inside else []
        return ids + (list(self._first.encode(text[inside:], add_special_tokens=False).ids) if found else [])

    def has_special(self, text: str) -> bool:
        """Whether a text, as a piece of the chat template, holds a special token."""
        return not self._control.isdisjoint(self.template(text))

    def text(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special; lone surrogates become U+FFFD.

        Raises:
            PromptError: The tokenizer's own vocabulary maps some text to a control token. (No tokenizer of the
                supported families does.)
        """
        ids = list(self._text.encode(well_formed(text), add_special_tokens=False).ids) if text else []
        if not self._control.isdisjoint(ids):
            raise PromptError(
                "The tokenizer turns plain text into a control token.", remedy="This model cannot be used safely."
            )
        return ids


def _tokenizer(serialised: str) -> Any:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(serialised)
    made.no_truncation()
    made.no_padding()
    return made


def _is_space(content: str) -> bool:
    return not content.replace("▁", " ").strip()


def _longest_first(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(tokens, key=lambda token: -len(token["content"]))


def _unknown_token(model: Mapping[str, Any]) -> str | None:
    """The token for letters that the vocabulary lacks."""
    if model.get("type") == "Unigram":
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    return model.get("unk_token")


def _without_prefix_space(facts: dict[str, Any]) -> bool:
    """Change a tokenizer.json so that no space is put before a text; returns whether it was."""
    found = False

    def normalizer(part: dict[str, Any] | None) -> dict[str, Any] | None:
        nonlocal found
        # The second form doubles a space at the beginning of a text, where Metaspace would put none.
        if part is None or part.get("type") == "Prepend" or part.get("pattern") == {"Regex": "\\A▁"}:
            found = found or part is not None
            return None
        if part.get("type") == "Sequence":
            parts = [kept for each in part["normalizers"] if (kept := normalizer(each)) is not None]
            return {**part, "normalizers": parts}
        return part

    def pre_tokenizer(part: dict[str, Any] | None) -> None:
        nonlocal found
        kind = (part or {}).get("type")
        if part is None:
            return
        if kind == "Sequence":
            for each in part["pretokenizers"]:
                pre_tokenizer(each)
        elif kind == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            part["prepend_scheme"], found = "never", True
            part.pop("add_prefix_space", None)  # of older versions
        elif kind == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"], found = False, True

    facts["normalizer"] = normalizer(facts.get("normalizer"))
    pre_tokenizer(facts.get("pre_tokenizer"))
    return found


def _make_unreachable(model: dict[str, Any], control: set[str]) -> None:
    """Rename control tokens in a model's vocabulary, so that no text has the new names, and drop their merges."""
    rename: Callable[[str], str] = lambda token: f"{token}\x00\x00" if token in control else token  # noqa: E731
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with scores
        model["vocab"] = [[rename(piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {rename(token): number for token, number in vocabulary.items()}
    if model.get("unk_token"):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        kept = [[a, b] for a, b in merges if control.isdisjoint((a, b, a + b))]
        model["merges"] = kept
