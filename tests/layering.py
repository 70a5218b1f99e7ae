"""The import graph of the package, read from its source. ``python -m tests.layering [ROOT]`` prints its numbers.

A folder's *rooms* are its modules and sub-folders. A module that imports another gives an arrow between the two rooms
in which their paths part, so that each folder has a graph of its own. Imports inside functions count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "nora_diffusion"
Path_ = tuple[str, ...]
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[Path_, Path]:
    """Every module of the package by its dotted path; a package's ``__init__`` has that name at its end."""
    package = root / PACKAGE
    return {file.relative_to(package).with_suffix("").parts: file for file in sorted(package.rglob("*.py"))}


def imports(module: Path_, known: Mapping[Path_, Path]) -> set[Path_]:
    """The modules of the package that a module imports; the package itself, which loads names late, is left out."""
    found = set()
    for target in _named(module, ast.parse(known[module].read_text(encoding="utf-8"))):
        for path in (target, target[:-1]):  # a name inside a module is that module
            if path in known or (*path, "__init__") in known:
                found.add(path if path in known else (*path, "__init__"))
                break
    return found - {module, ("__init__",)}


def _named(module: Path_, tree: ast.AST) -> Iterator[Path_]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            where = (node.module or "").split(".") if node.module else []
            if node.level:
                start = list(module[: len(module) - node.level])
            elif where[:1] == [PACKAGE]:
                start, where = [], where[1:]
            else:
                continue
            yield from ((*start, *where, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == PACKAGE)


def folder_graphs(root: Path) -> dict[Path_, Graph]:
    """For each folder the arrows between its rooms. The package's own ``__init__`` only names what lies elsewhere."""
    known = modules(root)
    graphs: dict[Path_, Graph] = {}
    for module in known:
        for depth in range(len(module)):
            graphs.setdefault(module[:depth], {}).setdefault(module[depth], set())
    for module in known:
        if module == ("__init__",):
            continue
        for target in imports(module, known):
            depth = next(i for i, (a, b) in enumerate(zip(module, target, strict=False)) if a != b)
            graphs[module[:depth]][module[depth]].add(target[depth])
    return graphs


def module_graph(root: Path) -> Graph:
    """The arrows between all modules."""
    known = modules(root)
    return {".".join(m): {".".join(t) for t in imports(m, known)} for m in known if m != ("__init__",)}


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that reach each other (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floors(graph: Graph) -> int:
    """The length of the longest chain of arrows, in rooms; only for a graph without circles."""
    height: dict[str, int] = {}

    def rise(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((rise(target) for target in graph.get(node, ())), default=0)
        return height[node]

    return max(map(rise, graph), default=0)


def main(root: Path) -> None:
    """Print the numbers of the whole graph and of each folder."""
    whole, folders = module_graph(root), folder_graphs(root)
    print(f"{len(whole)} modules, {sum(map(len, whole.values()))} imports, {len(circles(whole))} import circles")
    print(f"{'folder':32} rooms modules arrows floors circles")
    for folder, graph in sorted(folders.items()):
        loops = circles(graph)
        files = sum((root / PACKAGE).joinpath(*folder, f"{name}.py").is_file() for name in graph)
        high = "-" if loops else str(floors(graph))
        arrows = sum(map(len, graph.values()))
        print(f"{'/'.join((PACKAGE, *folder)):32} {len(graph):5} {files:7} {arrows:6} {high:>6} {len(loops):7}")
        for loop in loops:
            print(f"    {' <-> '.join(loop)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
