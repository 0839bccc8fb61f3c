"""The wheel, installed into an environment of its own with nothing of the checkout in reach."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {"lmcache_rag": "lmcache_rag", "integrations": "lmcache_rag/integrations"}
SAMPLES = ROOT / "examples" / "data"
FACT = "The lighthouse of Brandaris was rebuilt in 1594 and its lamp turns every five seconds."

pytestmark = [pytest.mark.slow, pytest.mark.full]


def run(command: list[Any], cwd: Path) -> str:
    """Run a command and give its standard output; fail with everything that it said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "COVERAGE"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that what earlier builds left in the checkout cannot get in."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("lmcache_rag", "integrations", "examples/data"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place / "dist"], place)
    (built,) = (place / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it requires, in the versions that are tested here."""
    place = tmp_path_factory.mktemp("elsewhere")
    python = place / "venv" / "bin" / "python"
    venv.create(place / "venv", with_pip=False, symlinks=True)
    versions = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    (place / "versions.txt").write_text(
        "".join(f"{name}=={version}\n" for name, version in versions.items() if name.lower() != "lmcache-rag")
    )
    wanted = ["--constraint", place / "versions.txt", f"{wheel}[embedded,langchain,llama-index]"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    if importlib.util.find_spec("uv") is None:
        run([*pip, *wanted], place)
        return place
    # Each finds some builds of torch that the other does not (see .ci/install-torch). The rest uv installs much sooner.
    torch = [*pip, "--no-deps", f"torch=={versions['torch']}"]
    found = subprocess.run([str(word) for word in torch], capture_output=True).returncode == 0
    backend = [] if found else ["--torch-backend=cpu"]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--link-mode", "copy", "--python", python]
    run([*uv, *backend, *wanted], place)
    return place


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{home}/{file.relative_to(ROOT / name).as_posix()}"
        for name, home in HOMES.items()
        for file in (ROOT / name).rglob("*")
        if file.suffix in (".py", ".html", ".css") or file.name == "py.typed"
    }
    expected |= {
        f"lmcache_rag/demo/sample_data/{file.relative_to(SAMPLES).as_posix()}"
        for file in SAMPLES.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "lmcache_rag/py.typed" in held


def test_the_wheel_carries_licence_readme_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "lmcache-rag = lmcache_rag.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert (ROOT / "README.md").read_text().splitlines()[0] in metadata


def test_the_environment_has_nothing_of_the_checkout(elsewhere: Path) -> None:
    code = (
        "import importlib.util, lmcache_rag; "
        "print(lmcache_rag.__file__, [n for n in ('pytest', 'mypy', 'vllm') if importlib.util.find_spec(n)])"
    )
    place, found = run([elsewhere / "venv/bin/python", "-c", code], elsewhere).split(maxsplit=1)
    assert Path(place).is_relative_to(elsewhere / "venv")
    assert found.strip() == "[]"


def test_the_wheel_ingests_a_file_and_answers_from_it(elsewhere: Path, smollm2_path: Path) -> None:
    command = elsewhere / "venv/bin/lmcache-rag"
    (elsewhere / "lighthouse.md").write_text(f"# Brandaris\n\n{FACT}\n")
    common = ["--store", "store", "--model", smollm2_path, "--json"]
    ingested = json.loads(run([command, "ingest", "lighthouse.md", *common], elsewhere))
    assert ingested["failed"] == []
    answer = json.loads(run([command, "ask", "When was the lighthouse rebuilt?", *common], elsewhere))
    assert FACT in answer["sources"][0]["text"]
    assert "1594" in answer["text"]
    assert answer["stats"]["chunks_hit"] == 1


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_an_integration_imports(elsewhere: Path, framework: str) -> None:
    code = f"from lmcache_rag.integrations.{framework} import LMCacheRetriever; print(LMCacheRetriever.__name__)"
    assert run([elsewhere / "venv/bin/python", "-c", code], elsewhere).strip() == "LMCacheRetriever"
