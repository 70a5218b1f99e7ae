"""Each band imports only what is below it (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nora_diffusion"
EVERYWHERE = {"errors", "files", "quiet", "versions", ""}
BANDS = (
    (
        "maths",
        {
            "adapters.bases", "adapters.cores", "adapters.deltas", "adapters.functional", "adapters.magnitude",
            "adapters.routed", "adapters.tokens",
        },
    ),
    (
        "tuner",
        {
            "adapters", "adapters.build", "adapters.config", "adapters.layer", "adapters.model", "adapters.presets",
            "adapters.merging", "adapters.offloading", "adapters.qkv_guard", "adapters.rank_mask",
            "adapters.register", "adapters.patterns", "adapters.rows", "adapters.targets",
        },
    ),
    (
        "bridge",
        {
            "attention", "base", "basis_cache", "batches", "calibration", "captions", "components", "composition",
            "conditions", "data", "formats", "gates", "generation", "judges", "loaders", "methods", "metrics",
            "pictures", "plots", "precision", "run_layout", "tensor_cache", "webpage",
        },
    ),
    ("workflows", {"training", "evaluation"}),
    ("shows", {"demo", "tiny_sd"}),
    ("app", {"ui"}),
    ("scripts", {"cli"}),
    ("entry", {"__main__"}),
)  # fmt: skip
LEVELS = {name: level for level, (_, names) in enumerate(BANDS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The module's name, or its package's where bands are about the whole package."""
    return module if module.startswith("adapters") else module.split(".")[0]


def imports(path: Path) -> set[str]:
    """All modules of this package that a file imports, inside functions too."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    package = [part for part in package if part]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join(names)} if node.module else {".".join([*names, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nora_diffusion"):
            found.add((node.module or "").removeprefix("nora_diffusion").lstrip("."))
    return {module for module in found if is_module(module)}


def is_module(name: str) -> bool:
    """Whether the name is a module of the package, and not something that a package defines."""
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


FILES = sorted(p for p in PACKAGE.rglob("*.py") if module_of(p))


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_of(p))
def test_imports_point_downwards(path: Path) -> None:
    here = unit(module_of(path))
    if here in EVERYWHERE:
        assert not {unit(m) for m in imports(path)} - EVERYWHERE
        return
    for target in {unit(module) for module in imports(path)} - EVERYWHERE - {here}:
        assert target in LEVELS, f"{target} is in no band: add it to docs/architecture.md and here"
        # The config names the registered type and the registration names the config: one knot, within one band.
        same_band_is_fine = LEVELS[here] < LEVELS["training"]
        assert LEVELS[target] < LEVELS[here] or (same_band_is_fine and LEVELS[target] == LEVELS[here])


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text[text.index("## The modules") : text.index("## The adapter file")]))
    modules = {path.relative_to(PACKAGE).as_posix() for path in FILES if not path.name.startswith("__")}
    assert named == modules, f"docs/architecture.md: name {modules - named}, take out {named - modules}"


def test_the_maths_needs_torch_only() -> None:
    for name in BANDS[0][1]:
        path = PACKAGE / (name.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {m.split(".")[0] for m in modules} & {"peft", "diffusers", "transformers", "accelerate"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_top_level_scripts_hold_no_logic(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_main or is_text or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
        if is_main:
            assert len(node.body) == 1  # type: ignore[attr-defined]
