"""Refuses private words as names of functions, classes, arguments, variables, attributes, modules; long names of tests.

    python .ci/words.py [FOLDER ...]

A name is split into its words, `told_by_Twins` into told, by, twins. Each word of WORDS is refused; the message has the
field's words to use instead. Only definitions are checked, so that the names of other libraries can be used. Names
that cannot change, for example public ones, are excepted one by one in EXCEPTIONS, with the reason; an exception that
is not needed is reported too.

Uses only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lmcache_rag", "integrations", "benchmarks")
TESTS = "tests"
MAX_TEST_NAME = 50  # letters, `test_` included

WORDS = {
    "told": "reported, sent, received; statistics, metadata",
    "tell": "report, send, return, emit",
    "tells": "reports, sends, returns, emits",
    "said": "reported, logged, warned",
    "say": "report, log, return",
    "says": "reports, logs, returns",
    "heard": "received, observed",
    "hear": "receive, observe",
    "hears": "receives, observes",
    "asked_of": "input, request",
    "wish": "request, parameter",
    "wishes": "request_params, parameters",
    "given": "value, arguments, params; the name of what it is",
    "filed": "uncomputed, cached, registered",
    "frees": "releases, finished",
    "late": "timed_out, deferred",
    "pace": "admission, budget",
    "twin": "async version, counterpart",
    "twins": "async versions, counterparts",
    "notice": "observe, warn",
    "noticer": "warner, observer",
    "noticing": "warning, observing",
    "tap": "wrapper, callback, hook",
    "taps": "wrappers, callbacks, hooks",
    "in_turn": "lock, queued, round_robin",
    "whoever": "client, caller, user",
    "nobody": "none, unused, aborted",
    "somebody": "client, other",
    "whose": "owner",
    "sooner": "speedup, faster",
    "behind": "after",
    "beside": "next_to, parallel, with",
    "aside": "optional, temporary",
}

# "path:name" -> why it keeps its name
EXCEPTIONS = {
    "lmcache_rag/engines/base.py:said_why": "a public field of EngineInfo",
    "lmcache_rag/bench/speed.py:sooner": "a key in the JSON of `bench speed`",
    "integrations/llama_index/synthesizer.py:noticer": "a public parameter and property of BlendSynthesizer",
}


def words_of(name: str) -> list[str]:
    """The words of a name in snake case, camel case or both, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def refused_word(name: str) -> str:
    """The first entry of WORDS in a name; "" if it has none."""
    text = f"_{'_'.join(words_of(name))}_"
    return next((word for word in WORDS if f"_{word}_" in text), "")


def definitions(source: str) -> Iterator[tuple[str, int]]:
    """(name, line) of all definitions: functions, classes, arguments, variables, attributes and aliases."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str()):
                yield str(node.asname), node.lineno
            case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
                yield str(node.name), node.lineno
            case ast.MatchMapping(rest=str()):
                yield str(node.rest), node.lineno
            case _:
                pass


def violations(folders: Sequence[Path], exceptions: Mapping[str, str], root: Path) -> list[str]:
    """A sentence for each name that is refused, and for each exception of these folders that is not needed."""
    found, used = [], set()
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        names = [(file.stem, 1), *((part, 1) for part in file.relative_to(root).parent.parts)]
        for name, line in [*names, *definitions(file.read_text(encoding="utf-8"))]:
            if not (word := refused_word(name)):
                continue
            if f"{path}:{name}" in exceptions:
                used.add(f"{path}:{name}")
                continue
            found.append(f"{path}:{line}: {name!r} has the private word {word!r}; use for example: {WORDS[word]}")
    found += [f"{each}: this exception is not needed any more" for each in exceptions if each not in used]
    return found


def long_test_names(folder: Path, root: Path) -> list[str]:
    """A sentence for each test whose name is too long."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
                continue
            if (length := len(node.name)) > MAX_TEST_NAME:
                path = file.relative_to(root).as_posix()
                found.append(f"{path}:{node.lineno}: {node.name!r} has {length} letters, more than {MAX_TEST_NAME}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Refuse private words as names, and long names of tests.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders to read; default: this project's")
    options = parser.parse_args(arguments)
    if options.folders:
        found = [each for folder in options.folders for each in violations([folder], {}, folder.parent)]
        found += [each for folder in options.folders for each in long_test_names(folder, folder.parent)]
    else:
        found = violations([ROOT / folder for folder in FOLDERS], EXCEPTIONS, ROOT)
        found += long_test_names(ROOT / TESTS, ROOT)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
