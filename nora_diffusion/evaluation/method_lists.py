"""Lists of what goes around a method, such as strategies, from the docstrings of their source. Imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..reports.markdown import table
from .method_costs import parts_of

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class MethodList:
    """The choices of one flag: a dict by name, the constant ``table`` of the module ``file``.

    Its values are classes or functions of that module, or imported into it from others of this package. Their
    docstrings begin with "Title: ``formula``" and have a link.
    """

    title: str
    flag: str
    file: str
    table: str

    def docstrings(self) -> dict[str, str]:
        """The docstring of each choice. The source is parsed, since importing it would take torch."""
        file = PACKAGE / self.file
        tree = _parsed(file)
        sources = {name: (file, name) for name in _definitions(tree)} | dict(_imports(tree, file))
        found = {}
        for key, value in _items(tree, self.table):
            source, name = sources[value]
            found[key] = ast.get_docstring(_definitions(_parsed(source))[name]) or ""
        return found

    def as_table(self) -> str:
        """The choices as a Markdown table."""
        rows = []
        for name, text in self.docstrings().items():
            title, formula, link = parts_of(text, name)
            rows.append([f"[{title}]({link}) `{name}`", f"`{formula}`".replace("|", r"\|")])
        return table([self.flag, "what it does"], rows)


LISTS = (
    MethodList("Rank allocations", "--rank_allocation", "training/allocation/table.py", "ALLOCATIONS"),
    MethodList("Strategies", "--strategy", "training/strategies/table.py", "STRATEGIES"),
    MethodList("Optimizers of pairs", "--optimizer", "training/step/optimization.py", "PAIRED_OPTIMIZERS"),
)


def all_lists() -> str:
    """All lists, each as a Markdown table under its title."""
    return "\n\n".join(f"{entry.title}\n\n{entry.as_table()}" for entry in LISTS)


Definition = ast.ClassDef | ast.FunctionDef


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definitions(tree: ast.Module) -> dict[str, Definition]:
    return {node.name: node for node in tree.body if isinstance(node, Definition)}


def _imports(tree: ast.Module, file: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Each name that is imported from a module of this package, with that module's file and its name there."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            source = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            yield from ((alias.asname or alias.name, (source, alias.name)) for alias in node.names)


def _items(tree: ast.Module, table: str) -> Iterator[tuple[str, str]]:
    """The keys of a dict with the names of its values."""
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict) and any(isinstance(t, ast.Name) and t.id == table for t in targets):
            for key, item in zip(value.keys, value.values, strict=True):
                assert isinstance(key, ast.Constant) and isinstance(item, ast.Name)
                yield str(key.value), item.id
