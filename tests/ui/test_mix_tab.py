"""The Mix tab over HTTP: every mode gives an adapter that can be exported and used in a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import export_lora, inspect_adapter, nora, open_pipeline
from nora_diffusion.ui.tabs.mix import MODES

from .conftest import Server, save_random

RECIPE = "<lora:dog:0.8> <lora:second:0.5>"


@pytest.fixture(scope="module")
def second(server: Server, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A second NoRA with the same frozen basis, which some modes need."""
    made = save_random(
        open_pipeline(base), tmp_path_factory.mktemp("second") / "second", nora(r=4, inner_r=2, basis="svd")
    )
    shutil.copytree(made.parent, server.library / "second")
    yield
    shutil.rmtree(server.library / "second")


def mix(server: Server, recipe: str = RECIPE, mode: str = "cat", **changes: Any) -> dict[str, Any]:
    values = {"name": f"mix {mode}", "rank": 0, "density": 0.5, "seed": 0, **changes}
    return server.call("mix", recipe, mode, *values.values(), 0, session=f"mix {mode} {sorted(changes)}")


@pytest.mark.parametrize("mode", MODES.values())
def test_every_mode_makes_an_adapter_that_can_be_exported(server: Server, second: None, mode: str) -> None:
    result = mix(server, mode=mode)
    assert result["success"], result
    folder = server.library / f"mix-{mode}"
    try:
        assert inspect_adapter(folder).trained_parameters > 0
        assert server.call("pick", event={"name": folder.name}, session=f"export {mode}")["success"]
        exported = server.call("export", None, "kohya", session=f"export {mode}")
        assert exported["success"] and "Exported: rank" in str(exported["output"]), exported
        prompt = f"a dog <lora:{folder.name}:1>"
        assert server.call(
            "generate",
            prompt,
            "",
            1,
            3,
            2,
            2.0,
            16,
            16,
            {},
            True,
            "own",
            1,
            0.5,
            None,
            "",
            0.7,
            True,
            session=f"use {mode}",
        )["success"]
    finally:
        shutil.rmtree(folder)


def test_a_plain_lora_is_refused(server: Server, tmp_path: Path) -> None:
    plain = export_lora(server.library / "hat", tmp_path / "plain.safetensors", "kohya").path
    copy = server.library / "plain.safetensors"
    shutil.copy(plain, copy)
    try:
        result = mix(server, "<lora:dog:1> <lora:plain:1>", name="plain mix")
    finally:
        copy.unlink()
    message = str(result["output"])
    assert not result["success"] and "is a plain LoRA (kohya LoRA), which cannot be mixed: use its tag" in message
    assert "load_adapter" not in message and not (server.library / "plain-mix").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "<lora:dog:1>"}, "at least two"), ({"recipe": "<lora:dog:1> <lora:stranger:1>"}, "cannot be used"),
        ({"recipe": "<lora:dog:unet=1:te=0.5> <lora:hat:1>"}, "two weights"), ({"mode": "sum"}, "sum"),
        ({"density": float("nan")}, "density=nan"), ({"rank": -1}, "minimum"), ({"seed": -1}, "minimum"),
        ({"recipe": "<lora:../dog:1> <lora:hat:1>"}, "no adapter"),
    ],
)  # fmt: skip
def test_invalid_input_creates_nothing(server: Server, second: None, change: dict[str, Any], words: str) -> None:
    before = sorted(server.library.iterdir())
    result = mix(server, **change)
    assert not result["success"] and words in str(result["output"]), result
    assert sorted(server.library.iterdir()) == before
