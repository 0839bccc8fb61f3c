"""Tokenise the parts of a prompt: the template with its special tokens, everything else strictly as text."""

from __future__ import annotations

import json
import threading
import weakref
from typing import Any

from lmcache_rag.errors import PromptError

_lock = threading.Lock()
_made: weakref.WeakKeyDictionary[Any, tuple[int, PartTokenizer]] = weakref.WeakKeyDictionary()


class PartTokenizer:
    """Two views of one tokenizer.

    A document or a question may contain text such as ``<|im_end|>``. Only the template may produce that *token*: a
    document that could would end the user's turn and speak as the system. So text goes through a copy of the
    tokenizer that knows no added tokens (those of white space alone stay: they are ordinary text), and its result is
    checked besides.
    """

    @classmethod
    def of(cls, tokenizer: Any) -> PartTokenizer:
        """The one of this tokenizer; making it copies the whole vocabulary, which takes most of a second."""
        with _lock:
            size, made = _made.get(tokenizer, (-1, None))
            if made is None or size != len(tokenizer):  # tokens may have been added since
                made = cls(tokenizer)
                _made[tokenizer] = (len(tokenizer), made)
            return made

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PromptError(
                f"{type(tokenizer).__name__} has no fast backend.",
                remedy="Use a model that comes with a tokenizer.json.",
            )
        serialised = backend.to_str()
        facts = json.loads(serialised)
        control = [token for token in facts["added_tokens"] if token["content"].strip()]
        facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["content"].strip()]
        # The post-processor only adds special tokens around a text, and may name some that are gone now.
        facts["post_processor"] = None
        self._control = frozenset(int(token["id"]) for token in control)
        self._text = Tokenizer.from_str(json.dumps(facts))
        self._template = Tokenizer.from_str(serialised)
        for view in (self._text, self._template):
            view.no_truncation()
            view.no_padding()

    def template(self, text: str) -> list[int]:
        """Ids of a piece of the chat template; special tokens are recognised, none is added."""
        return list(self._template.encode(text, add_special_tokens=False).ids)

    def text(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special.

        Raises:
            PromptError: The tokenizer's own vocabulary maps some text to a control token. (No tokenizer of the
                supported families does.)
        """
        ids = list(self._text.encode(text, add_special_tokens=False).ids) if text else []
        if not self._control.isdisjoint(ids):
            raise PromptError(
                "The tokenizer turns plain text into a control token.", remedy="This model cannot be used safely."
            )
        return ids
