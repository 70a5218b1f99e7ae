"""The demo on the embedded base, with a short training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from nora_diffusion import demo, inspect_adapter
from nora_diffusion.cli import main


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--max_train_steps", "2"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 2
    assert set(report["scores"]) == {"base", "nora"}
    assert f"{report['trained_numbers']:,}" in printed and demo.SUBJECT in printed
    assert "--subject takes" in printed and all(name in printed for name in demo.example_names())
    assert inspect_adapter(out).trained_parameters == report["trained_numbers"]
    assert report["bytes"]["subject_lora.safetensors"] == (out / "subject_lora.safetensors").stat().st_size
    assert load_file(out / "subject_lora.safetensors")
    with Image.open(out / "grid.png") as grid:
        assert grid.width >= 6 * 128 and grid.height >= 3 * 128


def test_examples_are_complete() -> None:
    """At least 16 subjects, each with six training images, held-out images and six prompts."""
    slugs = demo.example_names()
    assert len(slugs) >= 16 and demo.SUBJECT in slugs
    for slug in slugs:
        example = demo.open_example(slug)
        assert len(example.images()) == 6 and example.heldout_images()
        assert len(example.prompts) == 6 and all("{}" in prompt for prompt in example.prompts)
        assert example.class_word in example.phrase


def test_the_wheel_has_one_subject_and_errors_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder inside the package wins over one next to it, which in site-packages may belong to another package."""
    package = tmp_path / "site-packages/nora_diffusion"
    shutil.copytree(demo.EXAMPLES / demo.SUBJECT, package / "examples/subjects" / demo.SUBJECT)
    (tmp_path / "site-packages/examples/subjects/other").mkdir(parents=True)
    monkeypatch.setattr(demo, "EXAMPLES", demo.find_examples(package))
    assert demo.example_names() == [demo.SUBJECT] and len(demo.open_example(demo.SUBJECT).images()) == 6
    assert main(["demo", "--subject", "tiger"]) == 2
    error = capsys.readouterr().err
    assert f"choose one of {demo.SUBJECT}" in error and "source repository has more" in error


def test_a_clone_has_all_subjects_next_to_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path(__file__).parents[1] / "examples/subjects" == demo.EXAMPLES
    assert main(["demo", "--subject", "unicorn"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in demo.example_names()) and "source repository" not in error


def test_an_installation_without_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", Path("nowhere"))
    assert main(["demo"]) == 2
    assert "no example subjects in nowhere: reinstall" in capsys.readouterr().err
