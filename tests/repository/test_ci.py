"""The tiers of CI: which parts a change asks for, that a failure is one, and the watchdog."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

from lmcache_rag.serving.machine import TESTED

ROOT = Path(__file__).parents[2]
SLEEP = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(150)'])"


@pytest.fixture(scope="module")
def ci() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_parts", ROOT / ".ci" / "parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> object:
    """Names of the parts of `run` for some changed files."""
    monkeypatch.setenv("VENV", "build/ci-venv")
    return lambda *files: [part.name for part in ci.run_parts(ci.touched(files))]


def test_a_change_asks_for_the_parts_it_touches(ci: ModuleType, names) -> None:
    always = ["install", "lint and types", "quickstart", "test", "environment, LMCache 0.5.6", "servers", "contracts"]
    always += ["kernels, interpreted", "browser", "alerts"]
    assert names("README.md", "lmcache_rag/rag.py") == always
    others = {name for name in names("lmcache_rag/connector/vllm_patches.py") if name not in always}
    assert others == {
        f"{kind}, vLLM {version}" for kind in ("sources", "contracts") for version in ("0.25.1", "0.33.0")
    }
    more = names("lmcache_rag/connector/lmcache_client.py")
    assert {"environment, LMCache 0.5.7rc2", "contracts, LMCache 0.5.7rc2"} <= set(more)
    everything = [part.name for part in ci.run_parts(ci.touched(None))]
    assert names(".ci/parts.py") == names("pyproject.toml") == everything
    assert set(more) <= set(everything)


def test_framework_tests_join_the_servers_when_touched(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV", "build/ci-venv")

    def of(file: str) -> bool:
        (part,) = [part for part in ci.run_parts(ci.touched([file])) if part.name == "servers"]
        assert "tests/servers/test_vllm.py" in part.command
        return "tests/servers/test_frameworks.py" in part.command

    assert of("integrations/langchain/blend.py")
    assert not of("README.md")


def test_the_full_tier_leaves_nothing_of_the_other_out(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV", "build/ci-venv")
    full = {part.name for part in ci.full_parts()}
    run = {part.name for part in ci.run_parts({"*"})}
    assert run - full == {"servers", "contracts"}  # named by their LMCache there
    for version in ("0.5.6", "0.5.7rc2"):
        assert {f"{kind}, LMCache {version}" for kind in ("contracts", "servers", "own servers")} <= full
    assert {"mutants", "mutants, contracts", "mutants, servers", "long tests"} <= full


def test_kernels_run_interpreted_the_cheap_ones_in_run(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV", "build/ci-venv")
    for parts, selection in ((ci.run_parts(set()), ["-m", "not full"]), (ci.full_parts(), [])):
        (part,) = [part for part in parts if part.name == "kernels, interpreted"]
        assert part.command == ci.check("0.5.6", *selection, "tests/connector/test_kernels.py")
        assert part.env == {"TRITON_INTERPRET": "1"}


def test_run_has_three_scenarios_of_the_page_full_all(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV", "build/ci-venv")
    for parts, selection in ((ci.run_parts(set()), ["-m", "not full"]), (ci.full_parts(), [])):
        (part,) = [part for part in parts if part.name == "browser"]
        assert part.command[0] == "build/ci-venv/bin/python"
        assert "--must-run" in part.command
        files = [f"tests/demo/test_browser{each}.py" for each in ("", "_access", "_faults")]
        files.append("tests/repository/test_site_browser.py")
        assert part.command[-len(selection) - 4 :] == [*selection, *files]
        assert part.before is ci.chromium
        (part,) = [part for part in parts if part.name == "alerts"]
        assert "--must-run" in part.command
        assert part.before is ci.promtool
    (part,) = [part for part in ci.full_parts() if part.name == "long tests"]
    assert part.command[-1] == "full and not browser"
    (part,) = [part for part in ci.full_parts() if part.name == "clean environments"]
    assert part.command[-1] == "tests/repository/test_extras.py"
    assert '-m "not full and not browser"' in (ROOT / "Makefile").read_text()


def test_chromium_is_installed_where_it_is_missing(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ci, "CHROMIUM", tmp_path / "chromium")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ci.PartError, match="apt-get install chromium"):
        ci.chromium()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexec sh {tmp_path}/does\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    (tmp_path / "does").write_text("echo no such package >&2; exit 100")
    with pytest.raises(ci.PartError, match=r"Chromium cannot be installed.*no such package"):
        ci.chromium()
    (tmp_path / "does").write_text("exit 0")
    with pytest.raises(ci.PartError, match="there is no"):
        ci.chromium()
    (tmp_path / "does").write_text(f"touch {tmp_path}/chromium")
    ci.chromium()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1].endswith("install -y --no-install-recommends chromium")
    (tmp_path / "calls").unlink()
    ci.chromium()
    assert not (tmp_path / "calls").exists(), "it is there: nothing is installed"


def test_interpreted_kernels_need_no_gpu() -> None:
    """Marked as a GPU's they could be skipped with --must-run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/connector/test_kernels.py",
    ]
    done = subprocess.run(
        [*command, "-m", "gpu"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
    assert "no tests collected" in done.stdout


def test_contracts_cover_what_make_test_omits(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernels, and with a bar of their own."""
    monkeypatch.setenv("VENV", "build/ci-venv")
    omit = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["run"]["omit"]
    config = configparser.ConfigParser()
    config.read(ROOT / ".ci" / "contracts.coveragerc")
    measured = config["run"]["source_pkgs"].split()
    omitted, covered = set(), set()
    for file in (ROOT / "lmcache_rag").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if any(fnmatch.fnmatchcase(str(file), glob) for glob in omit):
            omitted.add(name)
        if any(f"{name}.".startswith(f"{package}.") for package in measured):
            covered.add(name)
    kernels = {"lmcache_rag.connector.kernels"}
    assert omitted == covered | kernels
    assert not covered & kernels
    for parts, name in ((ci.run_parts(set()), "contracts"), (ci.full_parts(), "contracts, LMCache 0.5.6")):
        (part,) = [part for part in parts if part.name == name]
        assert {"--cov", "--cov-config=.ci/contracts.coveragerc"} <= set(part.command)
        assert f"--cov-fail-under={ci.COVERED['contracts']}" in part.command
    assert ci.COVERED["contracts"] >= 90
    assert ci.COVERED["make test"] >= 90


def test_both_lmcaches_are_allowed_and_called_tested(ci: ModuleType) -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (allowed,) = [Requirement(line).specifier for line in extra if Requirement(line).name == "lmcache"]
    both = [ci.LMCACHE, ci.LMCACHE_NEXT]
    assert list(allowed.filter(both, prereleases=True)) == both
    assert {("0.32.0", version) for version in both} <= TESTED


def test_changes_count_from_the_last_landed_commit(ci: ModuleType, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(name: str) -> None:
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "-q", "-m", name)

    git("init", "-q")
    commit("a")
    assert ci.changed(tmp_path) is None, "there is nothing to compare with"
    assert ci.touched(None) == {"*"}
    commit("b")
    commit("c")
    assert ci.changed(tmp_path) == ["c"]
    git("update-ref", "refs/remotes/origin/main", "HEAD~2")
    (tmp_path / "new").touch()
    assert ci.changed(tmp_path) == ["b", "c", "new"]


def test_a_failed_part_ends_run_but_not_full(ci: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    good = ci.Part("good", [sys.executable, "-c", "print('1 passed')"])
    bad = ci.Part("bad", [sys.executable, "-c", "raise SystemExit(3)"])
    missing = ci.Part("missing", ["/nowhere/python"])
    assert ci.Run().run([good, good]) == 0
    assert ci.Run().run([bad, good]) == 1
    said = capfd.readouterr().out
    assert said.count("1 passed") == 2
    assert "parts: 0 passed, 1 failed, of 2" in said
    assert ci.Run(go_on=True).run([bad, missing, good]) == 1
    said = capfd.readouterr().out
    assert re.search("<== bad: [0-9]+ s, failed with status 3", said)
    assert "parts: 1 passed, 2 failed, of 3" in said
    assert [line.split()[0] for line in said.splitlines() if " s  " in line] == ["bad", "missing", "good"]


def test_the_watchdog_names_the_part_and_ends_it(ci: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    run = ci.Run(3.0)
    begin = time.monotonic()
    assert run.run([ci.Part("a long one", [sys.executable, "-c", SLEEP]), ci.Part("another", ["true"])]) == 1
    assert time.monotonic() - begin < 120
    said = capfd.readouterr().out
    assert "minutes are over; the part that ran, 'a long one', is ended" in said
    assert "parts: 0 passed, 1 failed, of 2" in said
    mark = f"{run.MARK}={run._mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        assert mark not in environment, f"process {folder.name} is left"


@pytest.mark.parametrize(("must_run", "gpu", "outcome"), [(0, 0, "skipped"), (1, 0, "failed"), (1, 1, "skipped")])
def test_a_skip_fails_where_everything_must_run(
    must_run: bool, gpu: bool, outcome: str, pytestconfig: pytest.Config
) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    item = SimpleNamespace(
        config=SimpleNamespace(getoption={"--must-run": must_run}.get), get_closest_marker={"gpu": gpu or None}.get
    )
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr="no vLLM here")
    hook = conftest.pytest_runtest_makereport(item)
    next(hook)
    with pytest.raises(StopIteration) as stop:
        hook.send(report)
    assert stop.value.value is report
    assert report.outcome == outcome
    assert "no vLLM here" in report.longrepr
