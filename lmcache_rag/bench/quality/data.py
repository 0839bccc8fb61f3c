"""Questions with answers, from files.

A line of a JSONL file is ``{"question": ..., "answers": [...], "passages": [...]}``; without passages the user's own
store retrieves them. The file forms that LMCache's `lmcache bench engine --workload rag-qa-quality` reads are accepted
too: MuSiQue's `paragraphs`, `ctxs`, `contexts` or `retrieved_contexts`, and HotpotQA's `context`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_rag.errors import ConfigError

FORM = 'A line has the form {"question": "...", "answers": ["..."], "passages": ["..."]}; see docs/quality.md.'
_QUESTION = ("question", "query", "user_input")
_ANSWERS = ("answers", "answer", "reference")
_PASSAGES = ("passages", "paragraphs", "ctxs", "contexts", "retrieved_contexts")
_IDS = ("id", "_id", "sample_id")


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        sample_id: Its name, unique in its cell.
        cell: The group that is reported together: a size of the prompt, or a file.
        task: Kind of question.
        question: The question.
        answers: Right answers; any one counts.
        passages: The passages in the prompt's order; empty: the store retrieves them.
        style: Name of the prompt's style, see `tasks.STYLES`.
        history: Earlier questions and their right answers, in turn.
        gated: Whether gate and recommendation depend on it, or it is only reported.
    """

    sample_id: str
    cell: str
    task: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...] = ()
    style: str = "plain"
    history: tuple[str, ...] = ()
    gated: bool = True


def read_samples(path: Path, style: str = "plain", limit: int | None = None) -> list[Sample]:
    """The questions of a .jsonl or .json file.

    Args:
        path: The file; its name is the cell.
        style: Name of the prompts' style.
        limit: Read only so many, from the beginning; None: all.

    Raises:
        ConfigError: The file cannot be read, or a line has no question or no answer.
    """
    cell = path.stem if style == "plain" else f"{path.stem}:{style}"
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for place, record in _records(path)[:limit]:
        text = next((str(record[key]).strip() for key in _QUESTION if record.get(key)), "")
        answers = _answers(record)
        if not text or not answers:
            raise ConfigError(f"{place} has no {'answer' if text else 'question'}.", remedy=FORM)
        if any(isinstance(record.get(key), str) and record[key].strip() for key in (*_PASSAGES, "context")):
            raise ConfigError(f"{place}: its passages are one text.", remedy=f"Split it into a list of them. {FORM}")
        name = str(next((record[key] for key in _IDS if record.get(key) is not None), len(samples)))
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name}#{seen[name]}"
        samples.append(
            Sample(name, cell, str(record.get("task") or path.stem), text, answers, _passages(record), style)
        )
    if not samples:
        raise ConfigError(f"{path} holds no questions.", remedy=FORM)
    return samples


def _records(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(place in the file for messages, record)."""
    if path.suffix.lower() in (".parquet", ".pq"):
        raise ConfigError(f"{path} is a Parquet file.", remedy="Convert it to JSONL; docs/quality.md shows how.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            whole = json.loads(text)
            if not isinstance(whole, list):
                raise ConfigError(f"{path} is not a list of questions.", remedy=FORM)
            found = [(f"{path}, question {number}", each) for number, each in enumerate(whole, 1)]
        else:
            lines = enumerate(text.splitlines(), 1)
            found = [(f"{path}, line {number}", json.loads(line)) for number, line in lines if line.strip()]
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}", remedy=FORM) from problem
    for place, each in found:
        if not isinstance(each, dict):
            raise ConfigError(f"{place} is not an object.", remedy=FORM)
    return found


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    raw: Any = next((record[key] for key in _ANSWERS if record.get(key) is not None), [])
    extra = record.get("extra")
    aliases = [record.get("answer_aliases"), extra.get("answer_aliases") if isinstance(extra, dict) else None]
    for item in [raw, *aliases]:
        for each in item if isinstance(item, list) else [item]:
            found += each if isinstance(each, list) else [] if each is None else [each]
    return tuple(dict.fromkeys(text for text in (str(each).strip() for each in found) if text))


def _passages(record: Mapping[str, Any]) -> tuple[str, ...]:
    raw: Any = next((record[key] for key in _PASSAGES if record.get(key)), None)
    if raw is None:
        raw = _pairs(record.get("context"))
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        return ()
    # The same passage twice would be one chunk at two places, and its second KV of no use.
    return tuple(dict.fromkeys(text for text in map(_passage, raw) if text))


def _passage(passage: Any) -> str:
    """One passage as text, its title in the first line."""
    if not isinstance(passage, Mapping):
        return str(passage).strip()
    title = str(passage.get("title") or "").strip()
    body = str(passage.get("text") or passage.get("paragraph_text") or "").strip()
    return f"{title}\n{body}".strip()


def _pairs(context: Any) -> list[dict[str, str]]:
    """HotpotQA's passages: [title, sentences] pairs, or two lists of the same length."""
    if isinstance(context, Mapping):
        context = list(zip(context.get("title") or [], context.get("sentences") or [], strict=False))
    if not isinstance(context, list):
        return []
    pairs = [pair for pair in context if isinstance(pair, list | tuple) and len(pair) == 2]
    return [{"title": str(title), "text": "".join(map(str, body))} for title, body in pairs if isinstance(body, list)]
