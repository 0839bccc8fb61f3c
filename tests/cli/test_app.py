"""The program and its help, verb by verb, in this process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import cli_kit
import pytest
import typer
from cli_kit import Call

from lmcache_rag import __version__
from lmcache_rag.cli.app import app
from lmcache_rag.settings import Settings

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked


ROOT = Path(__file__).parents[2]


VERBS = (
    "ingest",
    "ask",
    "search",
    "chat",
    "status",
    "list",
    "warm",
    "verify",
    "remove",
    "forget",
    "prune",
    "settings",
    "serve",
    "doctor",
)


def test_the_program_alone_shows_all_verbs(call: Call) -> None:
    output = call().output
    assert all(f"\n│ {verb} " in output for verb in VERBS)


def test_the_help_explains_the_exit_statuses(call: Call) -> None:
    output = call("--help").output
    assert all(f"\n {status} " in output for status in (0, 1, 2, 3, 70, 130, 141, 143))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_examples_of_it(call: Call, verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples")[2].partition("╭")[0]
    assert f"lmcache-rag {verb}" in examples


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_fits_80_columns(call: Call, verb: str) -> None:
    assert max(map(len, call(verb, "--help").stdout.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_has_a_help_text(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert [p.name for p in command.params if not p.help] == []


@pytest.mark.parametrize("verb", VERBS)
def test_setting_options_name_variable_and_default(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        if field := Settings.model_fields.get(parameter.name):
            assert f"LMCACHE_RAG_{parameter.name.upper()}" in parameter.help
            assert "default: " in parameter.help
            if field.default is not None and field.default is not True:
                assert f"default: {field.default}" in parameter.help


def test_every_verb_that_answers_has_common_options() -> None:
    wanted = {"--store", "--model", "--embedder", "--policy", "--ratio", "--blend", "--top-k", "--json", "--verbose"}
    wanted |= {"--device", "--dtype", "--max-tokens", "--temperature", "--kv-budget"}
    for verb in ("ask", "chat"):
        command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        assert wanted <= {name for parameter in command.params for name in parameter.opts}


def test_version(call: Call) -> None:
    assert call("--version").stdout == f"lmcache-rag {__version__}\n"


def test_the_package_runs_as_the_program() -> None:
    command = [sys.executable, "-m", "lmcache_rag", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"lmcache-rag {__version__}\n"


def test_the_help_imports_no_heavy_library() -> None:
    code = "import sys\nfrom lmcache_rag.cli.app import app\napp(['ask', '--help'], standalone_mode=False)\n"
    code += "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(eval(done.stderr))
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "sentence_transformers", "faiss", "numpy", "huggingface_hub"})


def test_help_takes_little_more_than_its_imports() -> None:
    # Side by side and without coverage's tracing, so that neither a slow machine nor a busy one decides.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "COV_"))}

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    libraries, help_ = [], []
    for _ in range(3):
        libraries.append(seconds("-m", "typer", "--help"))
        help_.append(seconds("-m", "lmcache_rag.cli", "--help"))
    assert min(help_) < 4 * min(libraries)  # numpy alone would be half of that, torch several times
