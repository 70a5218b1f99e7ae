"""The layout of the package: one direction everywhere, folders that can be overlooked, tests in the same tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from layering import PACKAGE, circles, folder_graphs, module_graph, modules

ROOT = Path(__file__).parents[1]
GRAPHS = folder_graphs(ROOT)
LAYERS = (
    "errors", "programs", "quiet", "versions", "io", "reports", "data", "optimizers", "adapters", "pipelines",
    "formats", "loaders", "attention", "conversion", "generation", "composition", "scoring", "results", "web",
    "serving", "training", "evaluation", "demo", "tiny_sd", "ui", "cli", "__main__",
)  # fmt: skip
"""The rooms of the package from bottom to top: each imports only what stands before it. See docs/architecture.md."""
APART = {("stored",), ("ecosystem",)}
"""Folders of tests about no folder of the package: files of earlier versions, and other libraries."""


def test_no_module_imports_in_a_circle() -> None:
    assert circles(module_graph(ROOT)) == []


@pytest.mark.parametrize("folder", GRAPHS, ids=lambda folder: "/".join((PACKAGE, *folder)))
def test_folders_have_one_direction(folder: tuple[str, ...]) -> None:
    assert circles(GRAPHS[folder]) == []


def test_the_package_imports_downwards() -> None:
    graph = GRAPHS[()]
    assert set(graph) - {"__init__"} == set(LAYERS), "add the new room to LAYERS and to docs/architecture.md"
    for room, targets in graph.items():
        upwards = [target for target in targets if LAYERS.index(target) >= LAYERS.index(room)]
        assert not upwards, f"{room} imports {upwards}, which stand above it"


def test_folders_can_be_overlooked() -> None:
    sizes: dict[tuple[str, ...], int] = {}
    for module in modules(ROOT):
        if module[-1] != "__init__":
            sizes[module[:-1]] = sizes.get(module[:-1], 0) + 1
    assert sizes[()] <= 10
    assert {folder: size for folder, size in sizes.items() if size > 16} == {}


def test_tests_lie_in_the_tree_of_the_package() -> None:
    tests = {file.relative_to(ROOT / "tests").parent.parts for file in (ROOT / "tests").rglob("test_*.py")}
    folders = {module[:-1] for module in modules(ROOT)}
    assert tests - folders - APART == set()
    assert {folder[:1] for folder in folders} - {folder[:1] for folder in tests} == set()


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text[text.index("## The modules") : text.index("## The adapter file")]))
    files = {"/".join(module) + ".py" for module in modules(ROOT) if not module[-1].startswith("__")}
    assert named == files, f"docs/architecture.md: name {files - named}, take out {named - files}"


def test_the_maths_needs_torch_only() -> None:
    folders = (ROOT / PACKAGE / "adapters" / "deltas", ROOT / PACKAGE / "optimizers")
    for path in (path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {m.split(".")[0] for m in names} & {"peft", "diffusers", "transformers", "accelerate"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_top_level_scripts_hold_no_logic(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_main or is_text or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
        if is_main:
            assert len(node.body) == 1  # type: ignore[attr-defined]
