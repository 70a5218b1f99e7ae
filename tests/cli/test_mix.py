"""``nora-diffusion mix`` and ``inspect --overlap``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from nora_diffusion import add_adapter, inspect_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.cli.mix import MODES
from nora_diffusion.composition.modes import Mode
from nora_diffusion.loaders import trainable_parameters

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters dog and hat."""
    pipe: Any = open_pipeline(tiny_base)
    path = tmp_path_factory.mktemp("adapters")
    for name in ("dog", "hat"):
        add_adapter(pipe, nora(r=8, inner_r=1, basis="svd", target_modules=["to_q"]), name)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_()
        save_adapter(pipe, path / name, name)
    return path


def test_mix_writes_an_adapter_and_prints_a_summary(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["mix", f"{folder}/dog:0.8", f"{folder}/hat", "--output", str(tmp_path / "both")]
    assert main([*words, "--mode", "linear"]) == 0
    out = capsys.readouterr().out
    assert "linear, rank 2 on 8 layers, exact" in out and "overlap of dog and hat: 0." in out
    info = inspect_adapter(tmp_path / "both")
    assert [(p["name"], p["weight"]) for p in info.extra["mix"]["parts"]] == [("dog", 0.8), ("hat", 1.0)]
    assert main([*words, "--mode", "cat"]) == 2
    assert "already holds an adapter" in capsys.readouterr().err
    words[-1] = str(tmp_path / "small")
    assert main([*words, "--mode", "svd", "--rank", "1"]) == 0
    assert "of the energy kept" in capsys.readouterr().out


def test_mixing_an_adapter_with_itself_warns_in_one_sentence(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["mix", f"{folder}/dog", f"{folder}/dog", "--out", str(tmp_path / "both")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: dog and dog-2 overlap by 1.00") and err.count("\n") == 1


def test_inspect_prints_the_overlap(folder: Path, capsys: Capture) -> None:
    assert main(["inspect", f"{folder}/dog", "--overlap", f"{folder}/dog"]) == 0
    assert "1.000 with" in capsys.readouterr().out
    assert main(["inspect", f"{folder}/dog", "--overlap", f"{folder}/hat", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert 0 <= values["overlap"] <= 1 and len(values["overlap_layers"]) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "slerp"], "slerp"),
        (["--rank", "0"], "rank=0"),
        (["--output", "x.safetensors"], "give a folder"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, capsys: Capture, more: list[str], message: str) -> None:
    assert main(["mix", f"{folder}/dog", "--output", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_mode() -> None:
    assert get_args(Mode) == MODES
