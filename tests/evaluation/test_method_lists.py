"""The lists of choices beside the methods: complete, documented, and read without importing what they describe."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from nora_diffusion.cli import main
from nora_diffusion.evaluation.method_lists import LISTS, MethodList, all_lists

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.mark.parametrize("entry", LISTS, ids=lambda entry: entry.title)
def test_a_list_has_the_docstrings_of_its_table(entry: MethodList) -> None:
    module = import_module(f"nora_diffusion.{entry.file.removesuffix('.py').replace('/', '.')}")
    choices = getattr(module, entry.table)
    assert entry.docstrings() == {name: inspect.getdoc(choice) for name, choice in choices.items()}


@pytest.mark.parametrize("entry", LISTS, ids=lambda entry: entry.title)
def test_it_is_documented(entry: MethodList) -> None:
    assert entry.as_table() in DOCUMENT.read_text(encoding="utf-8"), "run `nora-diffusion methods` and paste it there"
    assert all(f"`{name}`" in entry.as_table() for name in entry.docstrings())


def test_the_command_prints_all_lists_but_not_beside_chosen_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{all_lists()}\n")
    assert main(["methods", "--method", "nora"]) == 0
    assert all(entry.flag not in capsys.readouterr().out for entry in LISTS)


def test_a_choice_may_be_defined_beside_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.evaluation.method_lists.PACKAGE", tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/own.py").write_text(
        'from ..rules import far as away\nfrom os import path\n\n\ndef near():\n    """Near: ``a | b``. https://x.org/1"""\n\n\n'
        'T: dict = {"one": near, "two": away}\n'
    )  # fmt: skip
    (tmp_path / "rules.py").write_text('class far:\n    """Far: ``c``.\n\n    https://x.org/2\n    """\n')
    rows = MethodList("Things", "--thing", "sub/own.py", "T").as_table().splitlines()
    assert rows[2:] == ["| [Near](https://x.org/1) `one` | `a \\| b` |", "| [Far](https://x.org/2) `two` | `c` |"]
