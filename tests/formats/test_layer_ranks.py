"""The ranks of the layers of a file: from any kind of file, as text, in the command and in the app."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import add_adapter, save_adapter
from nora_diffusion.adapters import lora, nora
from nora_diffusion.cli import main
from nora_diffusion.formats.adapter_file import layer_ranks
from nora_diffusion.reports.layer_ranks import by_block, ranks_text
from nora_diffusion.ui.tabs.inspect import show_ranks

CONFIGS = {
    "lora": lora(r=4, rank_pattern={"mid_block.*": 1, "to_k": 2}, target_modules="attn"),
    "nora": nora(r=4, inner_r=3, basis="svd", inner_rank_pattern={"mid_block.*": 1, "to_k": 2}, target_modules="attn"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_by_layer(name: str, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_adapter(pipe, CONFIGS[name], "one", ["unet"])
    save_adapter(pipe, tmp_path, "one")
    ranks = layer_ranks(tmp_path)
    most = 4 if name == "lora" else 3
    for (component, path), rank in ranks.items():
        assert component == "unet"
        assert rank == (1 if path.startswith("mid_block") else 2 if path.endswith("to_k") else most)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"{ranks_text(ranks)}\n") and f"{len(ranks)} layers, mean rank" in text
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_ranks"] == {f"unet.{path}": r for (_, path), r in ranks.items()}
    assert show_ranks(ranks).count("<rect") == len(ranks)


def test_equal_ranks_need_no_list(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_adapter(pipe, lora(r=2, target_modules="attn"), "one", ["unet"])
    save_adapter(pipe, tmp_path, "one")
    assert layer_ranks(tmp_path) == {} and show_ranks({}) == ""
    assert main(["inspect", str(tmp_path)]) == 0
    assert "ranks by layer" not in capsys.readouterr().out


def test_blocks() -> None:
    ranks = {("unet", "up_blocks.1.a.to_q"): 3, ("unet", "up_blocks.1.b"): 1, ("text_encoder", "text_model.x"): 2}
    assert by_block(ranks) == {"up_blocks.1": [3, 1], "text_encoder.text_model": [2]}
    assert ranks_text(ranks).splitlines()[1:] == [
        "up_blocks.1               2.0  3 1", "text_encoder.text_model   2.0  2", "3 layers, mean rank 2.0",
    ]  # fmt: skip
