"""docs/inside-a-server.md lists every patch of vLLM and LMCache, and the code makes no other."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from patch_kit import MODULES, patches

import lmcache_rag.connector
from lmcache_rag.connector.patching import Patch, patch_methods, patch_object, patch_once, patched

ROOT = Path(__file__).parents[2]
HEADING = "## What is changed inside vLLM and LMCache"
OWN = ("config", "entry", "removal")  # names of objects of ours that are not `self`
# Attributes of objects of vLLM and LMCache that are set, and hold data of a request, a transfer or an application.
DATA = {
    "app.openapi_schema",
    "context.mq_timeout",
    "inputs._lmcache_rag_validation",
    "metadata.need_flush_before_forward",
    "request.kv_transfer_params",
    "request.prompt_token_ids",
    "request.sampling_params",
    "request.sampling_params.extra_args",
    "sampling_params.extra_args",
    "self._adapter._completed_store_requests",
    "self._thread.storing",
    "serving.engine_client",
    "tracker.cache_salt",
    "tracker.max_offload_tokens",
    "tracker.state",
    "transfer._inflight_stores",
    "transfer.failed",
}


def table() -> str:
    """The table of docs/inside-a-server.md: one row for all patches of a project with the same reason."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for patch in patches():
        project = "vLLM" if patch.target.startswith("vllm.") else "LMCache"
        rows.setdefault((project, patch.why, patch.until), []).append(f"`{patch.qualified_name}`")
    lines = ["| | what | why | can go when |", "| --- | --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {who} | {', '.join(what)} | {why} | {until} |" for (who, why, until), what in rows.items())]
    )


def test_the_documentation_lists_every_patch() -> None:
    page = (ROOT / "docs" / "inside-a-server.md").read_text(encoding="utf-8")
    section = page.partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    found = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert found == table(), f"docs/inside-a-server.md needs this table:\n{table()}"


def test_every_patch_says_what_why_and_until_when() -> None:
    assert len(patches()) > 40
    for patch in patches():
        module, _, name = patch.target.partition(":")
        assert module.startswith(("vllm.", "lmcache.")), patch
        assert name, patch
        assert patch.why.endswith("."), patch
        assert patch.until, patch
        assert "|" not in patch.why + patch.until, patch


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the connector, with its code."""
    for module in pkgutil.walk_packages(lmcache_rag.connector.__path__, "lmcache_rag.connector."):
        name = module.name.removeprefix("lmcache_rag.connector.")
        if not module.ispkg and name != "patching":
            path = ROOT / "lmcache_rag" / "connector" / f"{name.replace('.', '/')}.py"
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def targets(tree: ast.Module) -> Iterator[ast.expr]:
    """What is assigned to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
                yield from target.elts if isinstance(target, ast.Tuple) else (target,)


def test_nothing_is_replaced_without_a_patch() -> None:
    for name, tree in sources():
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "setattr" not in calls, name
        assigned = {ast.unparse(target) for target in targets(tree) if isinstance(target, ast.Attribute)}
        assert not {each for each in assigned if each.endswith(".__class__")}, name
        if name in MODULES:
            foreign = {each for each in assigned if each.count(".") > 1 or not each.startswith("self.")}
            own = {each for each in foreign if each.split(".")[0] in OWN}
            assert foreign - own <= DATA, f"{name} sets {sorted(foreign - own - DATA)}"


# -- how ----------------------------------------------------------------------------------------------------------


class Stock:
    """Stands for a class of vLLM's."""

    def answer(self) -> str:
        """vLLM's own."""
        return "stock"


ANSWER = Patch(f"{__name__}:Stock.answer", "A test.", "never")


def test_a_function_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stock, "answer", Stock.answer)  # given back afterwards
    for _ in range(2):
        patch_once(ANSWER, lambda stock: lambda self: f"patched {stock(self)}")
    assert Stock().answer() == "patched stock"
    assert Stock.answer.__doc__ == "vLLM's own."

    class Other(Stock):
        pass

    patch_once(ANSWER, lambda stock: lambda self: f"again {stock(self)}", Other)
    assert Other().answer() == "patched stock", "its parent's is patched"


@pytest.mark.parametrize("target", ["no_such_module:Stock.answer", f"{__name__}:NoClass.answer"])
def test_a_class_that_is_not_there_is_an_import_error(target: str) -> None:
    with pytest.raises(ImportError):
        patch_once(Patch(target, "A test.", "never"), lambda stock: stock)


def test_objects_and_blocks_of_code_are_patched_alone() -> None:
    one, other, third = Stock(), Stock(), Stock()
    patch_object(ANSWER, one, lambda: "object")
    patch_methods(other, {ANSWER.name: lambda self: "subclass"})
    with patched(ANSWER, third, lambda: "for a while"):
        assert (one.answer(), other.answer(), third.answer()) == ("object", "subclass", "for a while")
        assert isinstance(other, Stock)
        assert Stock().answer() == "stock"
    assert third.answer() == "stock"


def test_a_function_of_a_module_is_named_by_it() -> None:
    patch = Patch(f"{__name__}:patches", "A test.", "never")
    assert (patch.qualified_name, patch.name) == ("patches", "patches")
    assert patch.owner() is importlib.import_module(__name__)
