"""What the documents show is right, as far as a machine sees it: commands, options, code, links, anchors, names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import docs_kit
import pytest
import yaml
from docs_kit import DOCUMENTS, ROOT, SHELL, USED, Block, blocks

from lmcache_rag import protocol
from lmcache_rag.settings import Settings

COMMANDS = [
    pytest.param(line, id=f"{block}: {line[:50]}")
    for file in USED
    for block in blocks(file, *SHELL)
    for line in block.commands()
]
INLINE = sorted({line for file in USED for line in re.findall(r"`(lmcache-rag [^`\n]+)`", docs_kit.prose(file))})
PYTHON = [
    block for file in USED if file.name != "upstream.md" for block in blocks(file, "python")
]  # test_upstream.py's


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_documents_exists(line: str) -> None:
    assert docs_kit.wrong_command(line) == ""


@pytest.mark.parametrize("line", INLINE)
def test_a_command_in_a_sentence_exists(line: str) -> None:
    assert docs_kit.wrong_command(line) == ""


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 80
    assert len(INLINE) > 20
    assert len(PYTHON) > 15


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lmcache-rag aks 'What?'", "there is no command aks"),
        ("lmcache-rag bench sped", "there is no command sped"),
        ("lmcache-rag ask 'What?' --comparison", "--comparison"),
        ("lmcache-rag bench exact docs/ --prompts many", "valid integer"),
        ("lmcache-rag ask 'What?' 'Why?'", "unexpected extra argument"),
        ("lmcache-rag bench exact", ""),
        ("lmcache-rag serve", ""),
        ("lmcache-rag serve Qwen/Qwen3-8B --index some", "some"),
        ("git ls-files | lmcache-rag ingets -", "there is no command ingets"),
        ("FOO=1 lmcache-rag statsu > file", "there is no command statsu"),
        ("(umask 077; openssl rand 32 > key) && lmcache-rag sevre MODEL", "there is no command sevre"),
        ("lmcache-rag ask 'What?", "No closing quotation"),
        ("pip install '.[embeded]'", "there is no extra embeded"),
        ("pip install 'lmcache-rag[gpu]'", "from the clone"),
        ("pip instal .", "is not known"),
        ("make tset", "there is no make tset"),
        ("sh .ci/install-touch python", "there is no .ci/install-touch"),
        (".ci/runs --list", "there is no .ci/runs"),
        ("python benchmarks/tft.py", "there is no benchmarks/tft.py"),
        ("python benchmarks/ttft.py --nonsense", "has no --nonsense"),
        (".venv/bin/pytest tests/nowhere.py", "there is no tests/nowhere.py"),
        ("python -m lmcache_ragg", "there is no module"),
        ("npm run biuld", "there is no npm run biuld"),
        ("frobnicate --all", "is no command that the tests know"),
    ],
)
def test_a_wrong_command_is_found(line: str, message: str) -> None:
    found = docs_kit.wrong_command(line)
    assert message in found
    assert bool(found) is bool(message), "a command that is only named is right"


def test_blocks_of_commands_are_what_a_shell_takes() -> None:
    shown = [block for file in USED for block in blocks(file, *SHELL)]
    assert {str(block): found for block in shown if (found := docs_kit.wrong_syntax(block.text))} == {}
    assert docs_kit.wrong_syntax("if true; then") != ""


def test_commands_stand_in_blocks_that_are_checked() -> None:
    kinds = {str(block): block.kind for file in DOCUMENTS for block in blocks(file)}
    assert {place: kind for place, kind in kinds.items() if kind not in docs_kit.KINDS} == {}
    indented = r"^\n    (?:\$ |pip |make |lmcache-rag |python |curl |sh |\.ci/|\.venv/).*"
    assert {file.name: found for file in USED if (found := re.findall(indented, docs_kit.prose(file), re.M))} == {}


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_the_documents_compiles(block: Block) -> None:
    assert docs_kit.wrong_python(block.text) == ""


def test_wrong_python_is_found() -> None:
    assert "line 1" in docs_kit.wrong_python("answer = = 1")
    assert docs_kit.wrong_python("from lmcache_rag import Workspaces") == "lmcache_rag has no Workspaces"


def test_the_first_program_runs(smollm2_path: Path, embedder_path: Path, tmp_path: Path) -> None:
    (block,), (same,) = (blocks(ROOT / name, "python") for name in ("README.md", "docs/index.md"))
    assert block.text == same.text
    documents = tmp_path / "examples" / "data" / "documents"
    documents.mkdir(parents=True)
    (documents / "uranium.txt").write_text("The atomic number of uranium is 92. It is a silvery metal.")
    variables = {"LMCACHE_RAG_MODEL": str(smollm2_path), "LMCACHE_RAG_EMBEDDER": str(embedder_path)}
    done = subprocess.run(
        [sys.executable, "-c", block.text],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ReuseStats(prompt_tokens=" in done.stdout
    assert (tmp_path / "my-store").is_dir()


def test_data_in_the_documents_can_be_read() -> None:
    for file in USED:
        for block in blocks(file, "json"):
            json.loads(block.text)
        for block in blocks(file, "yaml"):
            assert list(yaml.safe_load_all(block.text)), str(block)
        for block in blocks(file, "toml"):
            tomllib.loads(block.text)


def test_added_lines_of_diffs_are_those_of_examples() -> None:
    """Where a document shows a change, a program of examples/ has it."""
    files = [path for path in (ROOT / "examples").glob("*.*") if path.suffix in (".py", ".diff")]
    known = {_plain(line.lstrip("+-")) for path in files for line in path.read_text(encoding="utf-8").splitlines()}
    for name in ("langchain", "llama-index"):
        for block in blocks(ROOT / "docs" / f"{name}.md", "diff"):
            added = [_plain(line[1:]) for line in block.text.splitlines() if line.startswith("+")]
            if "LMCacheDocStore" in block.text:  # in tests/integrations/langchain/test_doc_store.py
                assert docs_kit.wrong_python("\n".join(added)) == ""
                continue
            assert [line for line in added if line not in known] == [], str(block)


def _plain(line: str) -> str:
    return " ".join(line.partition("  #")[0].split())


def test_the_changelog_has_its_usual_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions[0] == "[Unreleased]" or versions[0].startswith(f"[{project['version']}] - ")
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert found == [kind for kind in kinds if kind in found]


# -- links and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    assert {link: found for link in docs_kit.links(document) if (found := docs_kit.wrong_link(document, link))} == {}


@pytest.mark.parametrize("link", ["nowhere.md", "serving.md#nowhere", "#nowhere", "../../../etc/passwd"])
def test_a_wrong_link_is_found(link: str) -> None:
    assert docs_kit.wrong_link(ROOT / "docs" / "index.md", link) != ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_make_targets_of_the_documents_exist(document: Path) -> None:
    asked = re.findall(r"`(make [a-z-]+)", docs_kit.prose(document))
    assert {line: found for line in asked if (found := docs_kit.wrong_command(line))} == {}


@pytest.mark.parametrize("document", USED, ids=lambda document: document.name)
def test_variables_of_the_documents_are_read(document: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lmcache_rag").rglob("*.py")]
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "support").glob("*.py")]
    read = set(re.findall(r"LMCACHE_RAG_[A-Z0-9_]*[A-Z0-9]", "\n".join(sources)))
    read |= {f"LMCACHE_RAG_{name.upper()}" for name in Settings.model_fields}
    shown = set(re.findall(r"LMCACHE_RAG_[A-Z0-9_]*[A-Z0-9]", document.read_text(encoding="utf-8")))
    assert shown - read == set()


@pytest.mark.parametrize("document", USED, ids=lambda document: document.name)
def test_request_keys_of_the_documents_exist(document: Path) -> None:
    keys = {*protocol.REQUEST_KEYS, *re.findall(r'"(lmcache_rag\.\w+)"', _connector_sources())}
    shown = set(re.findall(r'"(lmcache_rag\.[a-z_]+)"', document.read_text(encoding="utf-8")))
    assert shown - keys == set()


def _connector_sources() -> str:
    folders = (ROOT / "lmcache_rag" / "connector", ROOT / "lmcache_rag" / "serving")
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))


def test_each_page_is_in_the_sites_navigation() -> None:
    """Where one is missing `make docs` fails, in the full tier only."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:: |^  /)([a-z-]+\.md)$", settings, re.MULTILINE))
    assert {file.name for file in (ROOT / "docs").glob("*.md")} == named, "mkdocs.yml: `nav`, or `not_in_nav`"


def test_files_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"[\w./]*\w\.py\b|\b(?:\w+/)+(?=`)", text))
    assert len(named) > 60
    assert [
        name for name in sorted(named) if not any((top / name).exists() for top in (ROOT, ROOT / "lmcache_rag"))
    ] == []


def test_figures_of_the_readme_are_those_of_results() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Measured")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    results = ROOT / "docs" / "results"
    timed = (results / "never-slower-h200.md").read_text(encoding="utf-8")
    asked = (results / "neutral-h200.md").read_text(encoding="utf-8")
    speeds = [row for row in rows if len(row) == 6 and row[0][:1].isdigit()]
    assert len(speeds) == 4
    eight = timed.partition("\n8B shape:\n")[2].partition("\nQwen2.5")[0]
    for tokens, stock, *shown in speeds:
        line = rf"^\| {tokens} \| (\S+) \| \S+ \| (\S+) \(\S+\) \| (\S+) \(\S+\) \|"
        (found,) = re.findall(line, eight, re.MULTILINE)
        base, cpu, hot = (float(ms.replace(",", "")) for ms in found)
        wanted = [base, base + cpu, base + hot]
        assert [stock, *shown[::2]] == [f"{ms:,.0f} ms" for ms in wanted]
        assert shown[1::2] == [f"{base / ms:.1f}" for ms in wanted[1:]]
    answers = [row for row in rows if len(row) == 5 and row[0][:1].isdigit()]
    assert len(answers) == 7
    for _, _, recomputed, _, difference in answers:
        assert any(recomputed in line and difference in line for line in asked.splitlines()), (recomputed, difference)


def test_what_is_left_for_the_owner_is_marked() -> None:
    """Addresses that do not exist yet: one line in each place, and none that looks like an address."""
    files = [ROOT / name for name in ("pyproject.toml", "SECURITY.md", "mkdocs.yml", "CHANGELOG.md")]
    marked = {file.name: file.read_text(encoding="utf-8").count("OWNER:") for file in files}
    assert set(marked.values()) == {1}, marked
    ours = r"https?://[^\s)>\"]*(?:lmcache[-_]rag|example\.(?:com|org))[^\s)>\"]*"
    assert {file.name: found for file in USED if (found := re.findall(ours, file.read_text(encoding="utf-8")))} == {}
