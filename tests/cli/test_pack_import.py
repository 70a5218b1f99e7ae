"""The commands ``pack`` and ``import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import add_adapter, delete_adapter, inspect_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.loaders import trainable_parameters

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with a shared basis."""
    pipe: Any = open_pipeline(tiny_base)
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("dog", "cat"):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
        for parameter in trainable_parameters(pipe, "one").values():
            parameter.data.normal_(std=0.3)
        save_adapter(pipe, folder / name, "one", basis="shared", info={"trigger": f"sks{name}", "class_word": name})
        delete_adapter(pipe, "one")
    return folder


def test_all_verbs_of_pack(shelf: Path, tmp_path: Path, capsys: Capture) -> None:
    pack = str(tmp_path / "pets.nora_pack.safetensors")
    assert main(["pack", "create", pack, str(shelf / "dog")]) == 0
    assert main(["pack", "add", pack, f"kitten={shelf / 'cat'}"]) == 0
    assert "2 subjects" in capsys.readouterr().out
    assert main(["pack", "list", pack]) == 0
    table = capsys.readouterr().out
    assert "kitten" in table and "skscat" in table and "nora, r = 4, r' = 2" in table
    assert main(["pack", "list", pack, "--json"]) == 0
    assert [subject["class_word"] for subject in json.loads(capsys.readouterr().out)] == ["dog", "cat"]
    assert main(["inspect", f"{pack}#kitten"]) == 0
    assert "skscat" in capsys.readouterr().out
    assert main(["pack", "extract", pack, "kitten", str(tmp_path / "kitten")]) == 0
    assert (tmp_path / "kitten" / FILE_NAME).read_bytes() == (shelf / "cat" / FILE_NAME).read_bytes()
    assert main(["pack", "remove", pack, "dog"]) == 0
    assert ": 1 subject," in capsys.readouterr().out


def test_pack_skips_the_folder_of_shared_bases(shelf: Path, tmp_path: Path, capsys: Capture) -> None:
    """A shell pattern like ``shelf/*`` includes it."""
    everything = sorted(str(path) for path in shelf.iterdir())
    assert str(shelf / "bases") in everything
    assert main(["pack", "create", str(tmp_path / "all.nora_pack.safetensors"), *everything]) == 0
    assert ": 2 subjects," in capsys.readouterr().out


@pytest.mark.parametrize("method", ["nora", "nora_input"])
def test_import_prints_the_errors(
    shelf: Path, tiny_base: Path, tmp_path: Path, capsys: Capture, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onto the basis of another adapter, which is copied."""
    lora, out = str(tmp_path / "dog.safetensors"), tmp_path / "back"
    assert main(["export", str(shelf / "dog"), lora, "--format", "kohya"]) == 0
    capsys.readouterr()
    assert main(["inspect", lora]) == 0
    assert "a kohya LoRA file of another tool" in capsys.readouterr().out
    words = ["import", lora, str(out), "--base", str(tiny_base), "--rank", "4", "--inner_rank", "2", "--method", method]
    monkeypatch.setattr("nora_diffusion.loaders.add.outer_pairs", lambda *_: pytest.fail("a basis was computed"))
    assert main([*words, "--trigger", "rex", "--basis_from", str(shelf / "cat")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "||dW - dW'|| / ||dW|| =" in lines[-1] and "projections" in lines[-1]
    lost = [float(line.split()[0]) for line in lines[:-1]]
    assert lost == sorted(lost, reverse=True) and max(lost) < 1e-5
    info = inspect_adapter(out)
    assert (info.trigger, info.method) == ("rex", method)
    assert (info.basis_sha256 == inspect_adapter(shelf / "cat").basis_sha256) == (method == "nora")


MISTAKES = {
    "no verb": (["pack"], "VERB"),
    "unknown verb": (["pack", "zip"], "zip"),
    "name of a pack": (["pack", "create", "x.safetensors", "a"], "end it in"),
    "absent pack": (["pack", "list", "x.nora_pack.safetensors"], "no pack at"),
    "absent adapter": (["pack", "create", "x.nora_pack.safetensors", "nowhere"], "no adapter at"),
    "absent LoRA": (["import", "nowhere", "out"], "no adapter at"),
    "flag with a typo": (["import", "a", "b", "--rnk", "3"], "rnk"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(
    mistake: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
