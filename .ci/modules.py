"""The modules of a package and how they import each other; `--check` fails if a limit is exceeded.

    python .ci/modules.py [--check] [NAME=FOLDER ...]

Prints the number of modules and their lines, the longest chain of imports, circles, upward imports, long modules, and
modules with a single importer. NAME is the import name of the package in FOLDER; default: this project's own.

An import inside a function counts like any other, since it is a dependency too; one below `if TYPE_CHECKING:` does not
count. A chain's length is its number of modules.

An import is upward if it closes a circle between packages. A folder or a module directly below the root is a package
here; in a circle, the imports between the two packages with the fewest are the upward ones.

A module whose only importer is another module could be a section of that one. A package's `__init__` is no such
importer: it only offers what its modules hold. `__init__` and `__main__` modules themselves are not counted.

Uses only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"lmcache_rag": ROOT / "lmcache_rag", "lmcache_rag.integrations": ROOT / "integrations"}
MAX_DEPTH = 16
MAX_LINES = 700
MAX_SINGLE = 1 / 4  # of the modules

Graph = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        lines: Lines by module.
        imports: Imported modules of the packages by module.
        chain: The longest chain of imports, from the top; circles count as one module.
        circles: Groups of modules that import each other.
        upward: Imports (from, to) that close a circle between packages.
        single: The only importer, by module.
        code: How many modules there are without `__init__` and `__main__`.
    """

    lines: dict[str, int]
    imports: dict[str, set[str]]
    chain: list[str] = field(default_factory=list)
    circles: list[list[str]] = field(default_factory=list)
    upward: list[tuple[str, str]] = field(default_factory=list)
    single: dict[str, str] = field(default_factory=dict)
    code: int = 0

    @property
    def long(self) -> dict[str, int]:
        """Modules that are too long, with their lines."""
        return {name: count for name, count in self.lines.items() if count > MAX_LINES}

    def violations(self) -> list[str]:
        """Everything that exceeds a limit, in sentences."""
        found = [f"These modules import each other: {', '.join(circle)}." for circle in self.circles]
        found += [
            f"{source} imports {target}: upward, since that package imports this one." for source, target in self.upward
        ]
        if len(self.chain) > MAX_DEPTH:
            found.append(f"The longest chain of imports has {len(self.chain)} modules, more than {MAX_DEPTH}.")
        found += [f"{name} has {count} lines, more than {MAX_LINES}." for name, count in self.long.items()]
        if len(self.single) > MAX_SINGLE * self.code:
            found.append(
                f"{len(self.single)} of {self.code} modules have a single importer, more than {MAX_SINGLE:.0%}: "
                "make them sections of it."
            )
        return found


def measure(packages: Mapping[str, Path]) -> Report:
    """Read the packages' modules and compare their imports."""
    files = dict(sorted(item for name, folder in packages.items() for item in _modules(name, folder)))
    imports = {name: set(_imports(name, file, files)) - {name} for name, file in files.items()}
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    components = strongly_connected(imports)
    circles = [sorted(group) for group in components if len(group) > 1]
    importers: dict[str, list[str]] = {name: [] for name in files}
    for source, targets in imports.items():
        for target in targets:
            importers[target].append(source)
    code = [name for name, file in files.items() if file.stem not in ("__init__", "__main__")]
    facades = {name for name, file in files.items() if file.stem == "__init__"}
    single = {name: importers[name][0] for name in code if len(importers[name]) == 1}
    single = {name: importer for name, importer in single.items() if importer not in facades}
    return Report(lines, imports, longest_chain(imports, components), circles, _upward(imports), single, len(code))


def _modules(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        yield ".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts))), file


def _imports(module: str, file: Path, known: Collection[str]) -> Iterator[str]:
    """The known modules that a module imports, also inside functions; not those for type checkers only."""
    package = module if file.stem == "__init__" else module.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *filter(None, [base])])
                for alias in child.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for other in child.orelse:
                    yield from walk(ast.Module([other], []))
            else:
                yield from walk(child)

    yield from (name for name in walk(ast.parse(file.read_text(encoding="utf-8"))) if name in known)


def strongly_connected(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other, each after the groups that it leads to (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            at = stack.index(node)
            found.append(stack[at:])
            del stack[at:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def longest_chain(graph: Graph, components: Sequence[Sequence[str]]) -> list[str]:
    """The longest chain of imports; of the modules of a circle it has one."""
    home = {node: number for number, group in enumerate(components) for node in group}
    best: list[list[str]] = []
    for number, group in enumerate(components):  # what a group imports comes before it
        below = {home[target] for node in group for target in graph[node]} - {number}
        best.append([min(group), *max((best[one] for one in sorted(below)), key=len, default=[])])
    return max(best, key=len, default=[])


def _upward(imports: Graph) -> list[tuple[str, str]]:
    """The imports that close circles between packages: of each circle, those between the two with the fewest."""
    found: list[tuple[str, str]] = []
    left = {(source, target) for source, targets in imports.items() for target in targets}
    while True:
        edges = Counter((_package(source), _package(target)) for source, target in left)
        edges = Counter({pair: count for pair, count in edges.items() if pair[0] != pair[1]})
        graph: dict[str, set[str]] = {name: set() for pair in edges for name in pair}
        for one, other in edges:
            graph[one].add(other)
        circle = next((group for group in strongly_connected(graph) if len(group) > 1), None)
        if circle is None:
            return sorted(found)
        inside = [pair for pair in edges if set(pair) <= set(circle)]
        fewest = min(inside, key=lambda pair: (edges[pair], pair))
        closing = {each for each in left if (_package(each[0]), _package(each[1])) == fewest}
        found += closing
        left -= closing


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def show(report: Report) -> None:
    """Print the report."""
    lines = sum(report.lines.values())
    print(f"{len(report.lines)} modules, {report.code} without __init__ and __main__, {lines:,} lines")
    print(f"Longest chain of imports, {len(report.chain)} of at most {MAX_DEPTH}: {' > '.join(report.chain)}")
    print(f"Circles: {'; '.join(', '.join(circle) for circle in report.circles) or 'none'}")
    print(f"Upward imports: {'; '.join(f'{source} > {target}' for source, target in report.upward) or 'none'}")
    longest = sorted(report.lines.items(), key=lambda item: -item[1])[:5]
    print(f"Longest, of at most {MAX_LINES} lines: {', '.join(f'{name} {count}' for name, count in longest)}")
    print(f"With a single importer, {len(report.single)} of at most {int(MAX_SINGLE * report.code)}:")
    for name, importer in report.single.items():
        print(f"  {name}, by {importer}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only print what exceeds a limit; exit status 1 then")
    parser.add_argument("packages", nargs="*", metavar="NAME=FOLDER", help="packages to read; default: this project's")
    options = parser.parse_args(arguments)
    packages = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.packages)}
    report = measure(packages or PACKAGES)
    if not options.check:
        show(report)
        return 0
    violations = report.violations()
    print(*violations, sep="\n", end="\n" if violations else "")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
