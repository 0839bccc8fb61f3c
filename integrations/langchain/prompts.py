"""A prompt of chunks as LangChain's models take it: text, messages, and the token ids that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import PromptValue
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from lmcache_rag.prompt import PromptBuilder, Turn

    from ..blender import Prompted


class Segment(TypedDict):
    """A part of a prompt: token_ids[start:end]. `key` names a chunk's KV and is empty for the others."""

    kind: Literal["prefix", "chunk", "separator", "suffix"]
    start: int
    end: int
    key: str


class ChunkedPromptValue(PromptValue):
    """What is sent to the model. The token ids are the truth: parts are tokenised one by one.

    Attributes:
        text: What the model reads, special tokens included.
        messages: The same as a conversation, for chat models and for traces.
        token_ids: The prompt.
        segments: Its parts, in order, without gaps.
    """

    text: str
    messages: list[AnyMessage]
    token_ids: list[int]
    segments: list[Segment]

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class."""
        return ["lmcache_rag", "integrations", "langchain", "prompts"]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain does not load classes of other packages."""
        return False

    def to_string(self) -> str:
        """The text."""
        return self.text

    def to_messages(self) -> list[BaseMessage]:
        """The messages."""
        return list(self.messages)


def prompt_value(
    prompts: PromptBuilder, tokenizer: Any, prompted: Prompted, history: Sequence[Turn] = ()
) -> ChunkedPromptValue:
    """The prompt value of a blended prompt.

    Args:
        prompts: What made the prompt.
        tokenizer: The model's tokenizer.
        prompted: The prompt.
        history: The earlier turns in it.
    """
    ids = list(prompted.prompt.token_ids)
    return ChunkedPromptValue(
        text=tokenizer.decode(ids),
        messages=_messages(prompts, prompted, history),
        token_ids=ids,
        segments=_segments(prompted),
    )


def _segments(prompted: Prompted) -> list[Segment]:
    prompt = prompted.prompt
    parts: list[Segment] = [{"kind": "prefix", "start": 0, "end": prompt.prefix_tokens, "key": ""}]
    for span in prompt.chunks:
        if span.start > parts[-1]["end"]:
            parts.append({"kind": "separator", "start": parts[-1]["end"], "end": span.start, "key": ""})
        parts.append({"kind": "chunk", "start": span.start, "end": span.end, "key": span.key})
    return [*parts, {"kind": "suffix", "start": prompt.suffix_start, "end": len(prompt), "key": ""}]


def _messages(prompts: PromptBuilder, prompted: Prompted, history: Sequence[Turn]) -> list[AnyMessage]:
    """The conversation that the template would be given, passages in its first turn."""
    form = prompts.format
    passages = "".join(
        text if rank == 1 else form.separator.replace("{rank}", str(rank)) + text
        for rank, text in enumerate(prompted.texts, start=1)
    )
    opening = form.instruction + form.filler * _fillers(prompts) + form.context_head + passages
    messages: list[AnyMessage] = []
    if form.system and prompts.folds_system:
        opening = f"{form.system}\n\n{opening}"
    elif form.system:
        messages.append(SystemMessage(form.system))
    turns = [(turn.role, turn.content) for turn in history] + [("user", prompted.question)]
    for index, (role, content) in enumerate(turns):
        if role == "user":
            framed = form.question.replace("{question}", content)
            messages.append(HumanMessage(framed.lstrip() if index else opening + framed))
        else:
            messages.append(AIMessage(content))
    return messages


def _fillers(prompts: PromptBuilder) -> int:
    """How often the filler stands in the prefix: its longest run there."""
    [filler] = prompts.encode(prompts.format.filler)
    longest = run = 0
    for token in prompts.prefix_ids:
        run = run + 1 if token == filler else 0
        longest = max(longest, run)
    return longest if longest > 1 else 0
