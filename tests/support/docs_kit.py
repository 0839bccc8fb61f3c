"""What the documents show, and whether a machine can see that it is right: commands, options, code, links, anchors."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from lmcache_rag.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
USED = [file for file in DOCUMENTS if "results" not in file.parts]  # measurements show the commands of their day
SHELL = ("bash", "shell", "sh", "console")
KINDS = (*SHELL, "python", "json", "yaml", "toml", "diff", "text", "ts", "")
# Commands of other packages, which are only looked at as far as shells do. LMCache's and vLLM's own are compared with
# what `serve` prints in tests/serving/test_commands.py.
FOREIGN = (
    "apt-get",
    "cd",
    "chmod",
    "cp",
    "curl",
    "docker",
    "git",
    "helm",
    "kubectl",
    "lmcache",
    "node",
    "npm",
    "openssl",
    "promtool",
    "umask",
    "vllm",
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        document: The file.
        line: Where it begins.
        kind: The word after the fence.
        text: What is in it.
    """

    document: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, each in one line."""
        found: list[str] = []
        for line in re.sub(r"\\\n\s*", " ", self.text).splitlines():
            if found and wrong_quotes(found[-1]):
                found[-1] += f" {line.strip()}"
            elif line.strip() and not line.lstrip().startswith("#"):
                found.append(line.strip().removeprefix("$ "))
        return found


def wrong_quotes(line: str) -> bool:
    """Whether a quotation of a command goes on in the next line."""
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def blocks(document: Path, *kinds: str) -> list[Block]:
    """The fenced blocks of a document, all or of some kinds."""
    text = document.read_text(encoding="utf-8")
    found = []
    for fence in re.finditer(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", text, re.MULTILINE | re.DOTALL):
        inner = re.sub(rf"^{fence[1]}", "", fence[4], flags=re.MULTILINE)
        found.append(Block(document, text.count("\n", 0, fence.start()) + 1, fence[3].strip(), inner))
    return [block for block in found if not kinds or block.kind in kinds]


def prose(document: Path) -> str:
    """A document without its blocks of code and HTML comments."""
    text = re.sub(r"^( *)(`{3,})[^\n`]*\n.*?^\1\2 *$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


# -- commands ---------------------------------------------------------------------------------------------------------


def wrong_syntax(text: str) -> str:
    """What bash says of a block of commands; "" if it is right."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def wrong_command(line: str) -> str:
    """Why a line of a block does not work as shown; "" if it does, as far as it can be seen without running it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as problem:
        return str(problem)
    for ends, group in itertools.groupby(tokens, lambda token: set(token) <= set("();|&")):
        words = [] if ends else list(group)
        if ">" in words:
            words = words[: words.index(">")]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and (problem := _wrong(words)):
            return problem
    return ""


def _wrong(words: list[str]) -> str:
    program, rest = Path(words[0]).name, words[1:]
    if program == "lmcache-rag":
        return wrong_arguments(rest)
    if program in ("pip", "pip3"):
        return _wrong_pip(rest)
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return "".join(f"there is no make {word}" for word in rest if "=" not in word and word not in targets)
    if program.startswith("python") or program in ("sh", "pytest"):
        return _wrong_script(program, rest)
    if program == "npm" and rest[:1] == ["run"]:
        scripts = json.loads((ROOT / "examples" / "typescript" / "package.json").read_text())["scripts"]
        return "" if rest[1] in scripts else f"there is no npm run {rest[1]}"
    if words[0].startswith((".ci/", "./")):
        return _wrong_script("sh", words)
    return "" if program in FOREIGN else f"{program} is no command that the tests know"


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def wrong_arguments(words: list[str]) -> str:
    """Why our command line refuses these arguments; "" if it takes them. Nothing is run."""
    command, words = _command(), list(words)
    context = command.make_context("lmcache-rag", [], resilient_parsing=True)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        if words[0].isupper():
            return ""
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
        context = type(context)(command, parent=context)
    if not words:
        return ""  # a command that is only named
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # --help prints
            command.make_context(context.info_name, words, parent=context.parent)
    except SystemExit:
        return ""
    except Exception as problem:  # its classes depend on Typer's version
        message = getattr(problem, "format_message", lambda: "")()
        return message or ("" if type(problem).__name__ == "Exit" else repr(problem))
    return ""


def _wrong_pip(words: list[str]) -> str:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word in words:
        if re.match(r"lmcache[-_]rag\b", word):
            return "the package is on no index yet: install it from the clone, '.[extra]'"
        if found := re.fullmatch(r"\.\[([^\]]+)\]", word):
            missing = set(found[1].split(",")) - extras
            if missing:
                return f"there is no extra {', '.join(sorted(missing))}"
    return "" if words and words[0] in ("install", "wheel") else f"pip {words[:1]} is not known"


def _wrong_script(program: str, words: list[str]) -> str:
    module = words[1] if words[:1] == ["-m"] and program.startswith("python") else ""
    if module in ("venv", "http.server"):
        return ""
    if module and module != "pytest":
        return _no_module(module)
    if module == "pytest" or program == "pytest":
        files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        return "".join(f"there is no {file}. " for file in files if not (ROOT / file).exists())
    script = next((word for word in words if not word.startswith("-")), "")
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    source = (ROOT / script).read_text(encoding="utf-8")
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return "".join(f"{script} has no {option}. " for option in options if f'"{option}"' not in source)


def _no_module(name: str) -> str:
    return "" if importlib.util.find_spec(name.partition(".")[0]) else f"there is no module {name}"


# -- code -------------------------------------------------------------------------------------------------------------


def wrong_python(text: str) -> str:
    """Why a block of Python is wrong: its syntax, or a name that it imports from us and that does not exist."""
    try:
        tree = ast.parse(text)
    except SyntaxError as problem:
        return f"line {problem.lineno}: {problem.msg}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmcache_rag"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    return f"{node.module} has no {alias.name}"
    return ""


# -- links ------------------------------------------------------------------------------------------------------------


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", prose(document), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset(found)


def wrong_link(document: Path, link: str) -> str:
    """Why a link of a document leads nowhere; "" if it leads somewhere in the repository, or to the web."""
    if re.match(r"(?:https?|mailto):", link):
        return ""
    path, _, anchor = link.partition("#")
    target = (document.parent / path).resolve() if path else document
    if not target.exists():
        return f"there is no {path}"
    if not target.is_relative_to(ROOT):
        return f"{path} is outside the repository"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{target.name} has no #{anchor}"
    return ""


def links(document: Path) -> list[str]:
    """Where a document's links lead."""
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(document))
