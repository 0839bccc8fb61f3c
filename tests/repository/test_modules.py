"""The script that measures modules and imports, on small packages that each exceed one limit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
Check = Callable[[dict[str, str]], tuple[int, str]]


@pytest.fixture(scope="module")
def modules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_modules", ROOT / ".ci" / "modules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(modules: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Exit status and output of --check over a package p of these files."""

    def run(files: dict[str, str]) -> tuple[int, str]:
        for name, text in files.items():
            file = tmp_path / "p" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        status = modules.main(["--check", f"p={tmp_path / 'p'}"])
        return status, capsys.readouterr().out

    return run


def fan(count: int) -> dict[str, str]:
    """Modules with two importers each, so that few have a single one."""
    importers = "".join(f"import p.leaf{n}\n" for n in range(count))
    return {f"leaf{n}.py": "" for n in range(count)} | {"one.py": importers, "two.py": importers}


def test_a_sound_package_passes(check: Check) -> None:
    assert check(fan(4)) == (0, "")


def test_a_circle_is_found_also_through_a_function(check: Check) -> None:
    status, out = check({"a.py": "import p.b\n", "b.py": "def late():\n    from p import a\n"})
    assert status == 1
    assert "These modules import each other: p.a, p.b." in out


def test_a_circle_for_type_checkers_only_is_none(check: Check) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.one import x\n"
    assert check(fan(4) | {"leaf0.py": guarded}) == (0, "")


def test_an_upward_import_between_packages_is_found(check: Check) -> None:
    files = {"low/__init__.py": "", "high/__init__.py": "", "low/a.py": "", "low/b.py": "from ..high import view\n"}
    files |= {"high/view.py": "", "high/x.py": "import p.low.a\n", "high/y.py": "from p.low import a\nimport p.low.b\n"}
    status, out = check(fan(20) | files)
    assert (status, out) == (1, "p.low.b imports p.high.view: upward, since that package imports this one.\n")


def test_a_chain_that_is_too_long_is_found(check: Check, modules: ModuleType) -> None:
    names = [f"m{n}" for n in range(modules.MAX_DEPTH + 1)]
    chain = {f"{a}.py": f"import p.{b}\n" for a, b in pairwise(names)} | {f"{names[-1]}.py": ""}
    status, out = check(fan(60) | chain)
    assert (status, out) == (1, "The longest chain of imports has 17 modules, more than 16.\n")


def test_a_module_that_is_too_long_is_found(check: Check) -> None:
    status, out = check(fan(4) | {"leaf1.py": "x = 1\n" * 701})
    assert (status, out) == (1, "p.leaf1 has 701 lines, more than 700.\n")


def test_too_many_single_importers_are_found(check: Check) -> None:
    alone = "".join(f"import p.part{n}\n" for n in range(3))
    status, out = check(fan(4) | {f"part{n}.py": "" for n in range(3)} | {"whole.py": alone})
    assert status == 1
    assert "3 of 10 modules have a single importer, more than 25%" in out


def test_a_module_its_package_offers_is_not_single(check: Check) -> None:
    parts = {f"part{n}.py": "" for n in range(3)}
    assert check(fan(4) | parts | {"__init__.py": "".join(f"import p.part{n}\n" for n in range(3))}) == (0, "")


def test_the_report_names_what_it_measures(modules: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert modules.main([]) == 0
    out = capsys.readouterr().out
    assert "Circles: none" in out
    for words in ("modules", "Longest chain of imports", "Upward imports", "With a single importer"):
        assert words in out
