"""The examples run, and the three-line diff turns the ordinary program into a blended one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_vllm import MODEL
from framework_kit import fresh
from langchain_kit import TEMPLATE, server, tiny_engine

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def few_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The beginning of each sample, so that a test takes seconds."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in sorted((EXAMPLES / "data").rglob("*.txt")):
        (folder / path.name).write_text(path.read_text()[:1500])
    return folder


def load(path: Path, data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the graph resolves its state's annotations there
    spec.loader.exec_module(module)
    module.DATA = data  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("name", ["langchain_basic", "langchain_rerank_history", "langchain_agent"])
def test_an_example_runs_and_reuses(
    name: str, tokenizer: Any, embedder: Any, tmp_path: Path, few_documents: Path, capsys: Any
) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
    module = load(EXAMPLES / f"{name}.py", few_documents)
    options = {"engine": tiny_engine(tokenizer, tmp_path), "embedder": embedder, "max_tokens": 3}
    made = module.main(str(tmp_path / "store"), **options)
    reused = [made] if name == "langchain_basic" else made
    if name == "langchain_agent":
        reused = [made["answer"].response_metadata["lmcache_rag"]]
        assert made["queries"] == []  # a tiny model names nothing, so it searched twice
        assert 3 < len(made["documents"]) <= 6
    assert all(facts["reused_tokens"] > 0 and facts["chunks_missed"] == 0 for facts in reused)
    assert "cached chunks" in (out := capsys.readouterr().out) or "tokens reused" in out


def test_three_changed_lines(
    tokenizer: Any,
    embedder_path: Path,
    tmp_path: Path,
    few_documents: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    diff = (EXAMPLES / "langchain_three_lines.diff").read_text()
    changed = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    removed = [line for line in diff.splitlines() if re.match(r"-(?!--)", line)]
    assert len(changed) <= 3
    assert len(removed) <= len(changed)
    ordinary, blended = EXAMPLES / "langchain_ordinary.py", tmp_path / "langchain_blended.py"
    subprocess.run(
        ["patch", "--silent", "--output", str(blended), str(ordinary), str(EXAMPLES / "langchain_three_lines.diff")],
        check=True,
    )
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("EMBEDDER", str(embedder_path))
    monkeypatch.setenv("MODEL", MODEL)
    results = {}
    for path in (ordinary, blended):
        with server(tokenizer, tmp_path / path.stem) as running:
            monkeypatch.setenv("VLLM_URL", running.url)
            module = load(path, few_documents)
            results[path.stem] = module.main(), running.backend.reused, len(running.questions)
    (plain, no_reuse, _), (fast, reuse, asked) = results.values()
    assert [_sources(result) for result in plain] == [_sources(result) for result in fast]
    assert all(result["answer"] for result in (*plain, *fast))
    assert sum(no_reuse) == 0
    assert asked == len(fast)
    assert min(reuse) > 0


def test_the_tutorials_programs_reuse(
    tokenizer: Any, tmp_path: Path, few_documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setenv("MODEL", MODEL)
    with server(tokenizer, tmp_path / "server") as running:
        monkeypatch.setenv("VLLM_URL", running.url)
        module = load(EXAMPLES / "langchain_tutorials.py", few_documents)
        facts = module.main()
    assert list(facts) == ["tool_agent", "prompt_agent", "agentic_rag", "retrieval_chain"]
    for shape, answers in facts.items():
        assert len(answers) == 4
        assert all(one["chunks_hit"] >= 3 and one["chunks_missed"] == 0 for one in answers), shape
        assert all(one["reused_tokens"] > 0 for one in answers), shape
    assert capsys.readouterr().out.count("passages") == 16


def test_the_documents_conversions_are_the_examples() -> None:
    """Each line that a diff of docs/langchain.md adds or keeps stands in the example that runs."""
    example = {line.strip() for line in (EXAMPLES / "langchain_tutorials.py").read_text().splitlines()}
    page = (EXAMPLES.parent / "docs" / "langchain.md").read_text()
    section = page.partition("## Agents and other programs")[2].partition("\n## ")[0]
    diffs = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    assert len(diffs) == 4
    lines = [line[1:].strip() for diff in diffs for line in diff.splitlines() if not line.startswith("-")]
    assert [line for line in lines if line not in example] == []


def _sources(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(document.metadata["source"], document.page_content) for document in result["documents"]]
