"""The runner of `make mutants`, on a small checkout; and that every entry of ours can be used."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tests" / "mutants" / "run.py"
FILES = {
    "lmcache_rag/__init__.py": "",
    "lmcache_rag/sums.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n",
    "integrations/__init__.py": "ANSWER = 42\n",
    "tests/test_sums.py": """
import time

import pytest
from lmcache_rag.integrations import ANSWER
from lmcache_rag.sums import add, double


def test_add():
    assert add(2, 3) == 5


def test_double():
    double(3)


def test_answer():
    assert ANSWER == 42


def test_broken():
    raise ValueError


@pytest.mark.skip
def test_skipped():
    pass


def test_ends():
    while add(1, 1) != 2:
        time.sleep(0.05)
""",
}


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """Its code; as a program it stands outside every package."""
    spec = importlib.util.spec_from_file_location("mutants_run", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "tests" / "mutants").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def mutants(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs them: exit status and lines."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load

    def run(*entries: dict[str, str], options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        names = ("fault", "file", "find", "replace", "test", "needs")
        text = "".join(
            "[[mutant]]\n" + "".join(f"{name} = '''{entry[name]}'''\n" for name in names if name in entry)
            for entry in entries
        )
        (checkout / "tests" / "mutants" / "some.toml").write_text(text)
        command = [sys.executable, str(RUNNER), "--root", str(checkout), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def entry(fault: str, find: str, replace: str, test: str, file: str = "lmcache_rag/sums.py") -> dict[str, str]:
    return {"fault": fault, "file": file, "find": find, "replace": replace, "test": f"tests/test_sums.py::{test}"}


ADD = entry("A1", "a + b", "a - b", "test_add")
DOUBLE = entry("A2", "2 * a", "3 * a", "test_double")
ANSWER = entry("A3", "42", "43", "test_answer", "integrations/__init__.py")


def test_a_mutant_that_its_test_notices(mutants: Callable[..., tuple[int, list[str]]], checkout: Path) -> None:
    status, lines = mutants(ADD, ANSWER)
    assert status == 0
    assert "A1  lmcache_rag/sums.py  tests/test_sums.py::test_add  failed" in lines
    assert "A3  integrations/__init__.py  tests/test_sums.py::test_answer  failed" in lines
    assert lines[-1] == "mutants: 2 passed, 0 failed"
    assert {name: (checkout / name).read_text() for name in FILES} == FILES


def test_a_mutant_that_survives(mutants: Callable[..., tuple[int, list[str]]]) -> None:
    status, lines = mutants(ADD, DOUBLE)
    assert status == 1
    assert "A2  lmcache_rag/sums.py  tests/test_sums.py::test_double  SURVIVED" in lines
    assert lines[-1] == "mutants: 1 passed, 1 failed"


CHANGES: list[tuple[dict[str, str], str]] = [
    ({"find": "a / b"}, "its text to find is in the file 0 times, not once"),
    ({"find": "return"}, "its text to find is in the file 2 times, not once"),
    ({"find": "a + b", "replace": "a + b"}, "it changes nothing"),
    ({"replace": "a +"}, "what it makes is no Python"),
    ({"file": "lmcache_rag/none.py"}, "there is no such file"),
    ({"test": "tests/test_sums.py::test_broken"}, "its test does not pass unmutated"),
    ({"test": "tests/test_sums.py::test_none"}, "its test does not pass unmutated"),
    ({"test": "tests/test_sums.py::test_skipped"}, "its test did not run"),
    ({"find": "def add(a, b):", "replace": "def added(a, b):"}, "pytest ended with"),
    ({"needs": "contracts"}, "there is no /nowhere/python, which its test needs"),
]


def test_mutants_that_cannot_be_judged(mutants: Callable[..., tuple[int, list[str]]]) -> None:
    entries = [ADD | {"fault": f"{number:02}"} | change for number, (change, _) in enumerate(CHANGES)]
    status, lines = mutants(*entries, options=("--contracts-python", "/nowhere/python"))
    assert status == 1
    for number, (_, reason) in enumerate(CHANGES):
        line = next(line for line in lines if line.startswith(f"{number:02}  "))
        assert f"ERROR: {reason}" in line
    assert lines[-1] == f"mutants: 0 passed, {len(CHANGES)} failed"


def test_a_mutant_that_makes_its_test_hang(runner: ModuleType, checkout: Path, tmp_path: Path) -> None:
    mutant = runner.Mutant(**ADD | {"test": "tests/test_sums.py::test_ends"})
    copy = runner.copy_checkout(checkout, tmp_path / "copy")
    assert runner.Runner({"": Path(sys.executable)}, 1.0).mutated(copy, mutant) == "failed (it hung)"
    assert (copy / mutant.file).read_text() == FILES[mutant.file]


def test_mutants_side_by_side_print_whole_lines(
    runner: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    class Both:
        """Its two mutants end at the same moment."""

        def unmutated(self, *_: Any) -> dict[str, str]:
            return {}

        def mutated(self, *_: Any) -> str:
            both.wait(60)
            return "failed"

    class Slow(io.StringIO):
        """Between two writes of a thread the other has its turn."""

        def write(self, text: str) -> int:
            time.sleep(0.1)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Slow())
    outcomes = runner.run(checkout, [runner.Mutant(**ADD), runner.Mutant(**DOUBLE)], Both(), 2)
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sorted(lines) == [str(outcome) for outcome in outcomes]


def test_some_mutants_of_all(mutants: Callable[..., tuple[int, list[str]]]) -> None:
    status, lines = mutants(ADD, DOUBLE, ANSWER, options=("--only", "A1", "--only", "A3", "--needs", "none"))
    assert (status, lines[-1]) == (0, "mutants: 2 passed, 0 failed")
    assert mutants(ADD, options=("--only", "B1")) == (1, ["There are no such mutants."])


@pytest.mark.parametrize("entry", [ADD | {"needs": "gpu"}, {"fault": "A1"}])
def test_a_file_that_is_no_list_of_mutants(
    entry: dict[str, str], mutants: Callable[..., tuple[int, list[str]]]
) -> None:
    status, lines = mutants(entry)
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("some.toml, entry 1: ")


def test_every_entry_of_this_project_fits_its_file(runner: ModuleType) -> None:
    """Cheap enough for each run; `make mutants` runs the tests."""
    found = runner.read(RUNNER.parent)
    assert found
    for mutant in found:
        mutant.text((ROOT / mutant.file).read_text(encoding="utf-8"))
        file, _, name = mutant.test.partition("::")
        assert f"def {name.partition('[')[0].rpartition('::')[2]}(" in (ROOT / file).read_text(encoding="utf-8"), mutant
