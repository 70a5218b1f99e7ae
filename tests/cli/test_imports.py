"""What the commands import: those that only read or list start without torch and the libraries built on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nora_diffusion.cli import COMMANDS

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests/stored"
NORA = STORED / "adapter-1" / "nora"
PACK = STORED / "pack-1" / "two.nora_pack.safetensors"
LIBRARIES = ("PIL", "accelerate", "diffusers", "gradio", "huggingface_hub", "numpy", "peft", "torch", "transformers")
PROBE = f"""
import sys
from nora_diffusion.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:  # --help and --version
    code = stop.code
print(code or 0, *(name for name in {LIBRARIES} if name in sys.modules), file=sys.stderr)
"""


def imported(*words: object) -> str:
    """The exit code of a command and the :data:`LIBRARIES` that it has imported."""
    command = [sys.executable, "-c", PROBE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", ["--version", "--help", *(f"{name} --help" for name in ("train", *COMMANDS))])
def test_help(words: str) -> None:
    assert imported(*words.split()) == "0"


@pytest.mark.parametrize(
    "path", [NORA, NORA / "nora_adapter.safetensors", STORED / "adapter-1/shared", f"{PACK}#nora"],
    ids=["folder", "file", "shared basis", "subject of a pack"],
)  # fmt: skip
def test_inspect(path: object) -> None:
    """NumPy checks the values of the tensors."""
    assert imported("inspect", path) == "0 numpy"


def test_inspect_a_file_of_another_tool(tmp_path: Path) -> None:
    factors = {"down": torch.ones(2, 4), "up": torch.ones(4, 2)}
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_{side}.weight": value for side, value in factors.items()}, tmp_path / "x.safetensors")
    assert imported("inspect", "--json", tmp_path / "x.safetensors") == "0 numpy"


@pytest.mark.parametrize("words", [["methods"], ["pack", "list", PACK]], ids=["methods", "pack list"])
def test_lists(words: list[object]) -> None:
    assert imported(*words) == "0"


def test_data(tmp_path: Path) -> None:
    photos = ROOT / "examples/subjects/backpack"
    assert imported("data", photos, "--out", tmp_path) == "0 PIL numpy"


MISTAKES = [
    "inspekt x", "inspect --jsn x", "inspect", "inspect missing", "pack list missing", "methods --layout sd9",
    "demo --subject missing", "data missing", "export missing out", "mix missing --output out", "import missing out",
    "pack create x.nora_pack.safetensors missing", "generate --prompt x --adapter missing", "generate",
    "generate --prompt x --steps 5000", "train --instance_data_dir missing", "train --instance_data_dir x --rank 0",
    "app --port 99999", "grid --x seed=1..2", "grid --x seed=1..2 --prompt x --steps 0",
    "grid --x seed=1..2 --prompt x --adapter missing", "grid --x seed=1 --prompt x --judge tiny --references missing",
    "evaluate --adapters missing --subjects examples/subjects/backpack", "evaluate --adapters x --subjects missing",
]  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: str) -> None:
    """Pillow and NumPy may be there for photos and for the settings in image files."""
    code, *libraries = imported(*words.split()).split()
    assert code == "2" and set(libraries) <= {"PIL", "numpy"}
