"""docs/models.md says what lmcache_rag/families.py says."""

from __future__ import annotations

from pathlib import Path

from lmcache_rag.families import ARCHITECTURES, FAMILIES, REFUSED, family_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def table() -> str:
    """The table of families."""
    lines = [
        "| family | `architectures` in config.json | embedded engine | quality | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        names = ", ".join(f"`{name}`" for name in (family.vllm_class, *family.architectures))
        embedded = f"`{family.model_type}`" if family.model_type else "no"
        quality = "[measured](quality.md)" if family.measured else "not measured"
        lines.append(f"| {family.title} | {names} | {embedded} | {quality} | {family.note} |")
    return "\n".join(lines)


def refused() -> str:
    """The rows of architectures that are refused although vLLM loads them as a class of the table."""
    return "\n".join(f"| `{name}` | {why} |" for name, why in REFUSED.items())


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for rows in (table(), refused()):
        assert f"\n{rows}\n" in page, f"docs/models.md needs these rows:\n{rows}"


def test_each_name_belongs_to_one_family() -> None:
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES)
    assert not set(ARCHITECTURES) & set(REFUSED)
    for family in FAMILIES:
        for name in (family.vllm_class, *family.architectures):
            assert family_of([name]) is family
    assert family_of(["GptOssForCausalLM"]) is None
