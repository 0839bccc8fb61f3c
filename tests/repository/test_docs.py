"""The commands that the documents show exist, with the options that they are shown with; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lmcache_rag.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "lmcache-rag "


def code(document: Path) -> list[str]:
    """The lines of its blocks of shell commands, each command in one line."""
    kept, kind = [], None
    for line in document.read_text().splitlines():
        if line.startswith("```"):
            kind = line[3:].strip() if kind is None else None
        elif kind in ("", "bash", "shell", "sh", "console"):
            kept.append(line)
    return "\n".join(kept).replace("\\\n", " ").splitlines()


def commands(document: Path) -> list[str]:
    """Those of ours."""
    lines = [line.strip().removeprefix("$ ") for line in code(document)]
    return [line for line in lines if line.startswith(OURS)]


SHOWN = [pytest.param(line, id=f"{file.name}: {line[:60]}") for file in DOCUMENTS for line in commands(file)]


def test_there_are_commands_to_check() -> None:
    assert len(SHOWN) > 10


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_of_the_documents_exists(line: str) -> None:
    words = shlex.split(re.split(r"\s[|&;]|\s>", line)[0], comments=True)[1:]
    command: Any = typer.main.get_command(app)
    context = command.make_context("lmcache-rag", [], resilient_parsing=True)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
        context = type(context)(command, parent=context)
    assert not hasattr(command, "commands") or not words or words[0].startswith("-"), f"there is no {words[0]}"
    command.make_parser(context).parse_args(words)  # raises where there is no such option


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_make_targets_of_the_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(r"`make ([a-z-]+)", document.read_text())
    asked += re.findall(r"^make ([a-z-]+)", "\n".join(code(document)), re.MULTILINE)
    assert set(asked) <= targets


def test_files_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"[\w./]*\w\.py\b|\b(?:\w+/)+(?=`)", text))
    assert len(named) > 60
    assert [
        name for name in sorted(named) if not any((top / name).exists() for top in (ROOT, ROOT / "lmcache_rag"))
    ] == []
