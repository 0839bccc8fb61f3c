"""The script that refuses private words as names, and long names of tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("ci_words", ROOT / ".ci" / "words.py")
assert spec is not None
assert spec.loader is not None
words: ModuleType = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = words
spec.loader.exec_module(words)


def found(tmp_path: Path, source: str, name: str = "module.py", exceptions: dict[str, str] | None = None) -> list[str]:
    """What is refused in a package p with one module."""
    file = tmp_path / "p" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    return words.violations([tmp_path / "p"], exceptions or {}, tmp_path)  # type: ignore[no-any-return]


def test_this_project_has_no_private_names() -> None:
    assert words.violations([ROOT / folder for folder in words.FOLDERS], words.EXCEPTIONS, ROOT) == []


def test_this_project_has_no_long_test_names() -> None:
    assert words.long_test_names(ROOT / words.TESTS, ROOT) == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_test_name_above_50_letters_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longest = "test_" + "a" * 45
    found(tmp_path, f"{kind} {longest}(): ...\n\n\ndef {'a' * 60}(): ...\n")
    assert words.main([str(tmp_path / "p")]) == 0
    found(tmp_path, f"class A:\n    {kind} {longest}a(): ...\n")
    assert words.main([str(tmp_path / "p")]) == 1
    assert capsys.readouterr().out == f"p/module.py:2: '{longest}a' has 51 letters, more than 50\n"


@pytest.mark.parametrize("word", words.WORDS)
def test_each_word_is_refused(word: str, tmp_path: Path) -> None:
    [problem] = found(tmp_path, f"has_{word}_now = 1\n")
    assert problem.startswith("p/module.py:1: ")
    assert repr(word) in problem
    assert words.WORDS[word] in problem


@pytest.mark.parametrize(
    "source",
    [
        "def told(): ...",
        "async def told(): ...",
        "class ToldWorkers: ...",
        "def f(told): ...",
        "def f(*, told=1): ...",
        "lambda told: 1",
        "told = 1",
        "told: int = 1",
        "TOLD_S = 1",
        "for told in (): ...",
        "self.told = 1",
        "(told := 1)",
        "import os as told",
        "from os import path as told",
        "with open('x') as told: ...",
        "try: ...\nexcept OSError as told: ...",
        "match 1:\n    case told: ...",
        "[1 for told in ()]",
    ],
)
def test_definitions_of_any_kind_are_refused(source: str, tmp_path: Path) -> None:
    assert len(found(tmp_path, source)) == 1


def test_module_names_are_refused(tmp_path: Path) -> None:
    [problem] = found(tmp_path, "", "in_turn.py")
    assert "'in_turn'" in problem


@pytest.mark.parametrize("source", ["file.tell()", "retold = 1", "related = 1", "template = 1", "turn = 1", "'told'"])
def test_uses_and_longer_words_are_accepted(source: str, tmp_path: Path) -> None:
    assert found(tmp_path, source) == []


def test_exceptions_are_for_one_name_in_one_file(tmp_path: Path) -> None:
    exceptions = {"p/module.py:told": "pinned"}
    assert found(tmp_path, "told = 1", exceptions=exceptions) == []
    assert len(found(tmp_path, "told = told_too = 1", exceptions=exceptions)) == 1
    assert "not needed" in found(tmp_path, "", exceptions=exceptions)[0]


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(tmp_path, "told = 1")
    assert words.main([str(tmp_path / "p")]) == 1
    assert "private word 'told'" in capsys.readouterr().out
    found(tmp_path, "reported = 1")
    assert words.main([str(tmp_path / "p")]) == 0
