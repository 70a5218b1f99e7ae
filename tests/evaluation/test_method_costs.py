"""The table of methods: counts equal those of real files, and docs/adapters.md has the printed table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from nora_diffusion import UserError, add_adapter, export_lora, save_adapter
from nora_diffusion.adapters import PRESETS, AdapterConfig, dora, melora, mora, nora, nora_input
from nora_diffusion.adapters.tuner.build import flat_weight
from nora_diffusion.cli import main
from nora_diffusion.evaluation.method_costs import LAYOUTS, cost, layout, method_table
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import projections, targets

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"
EVERYTHING = ["attn", "ff", "proj", "conv"]
CONFIGS = {
    "nora": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=EVERYTHING),
    "patterns": lambda: nora(r=4, inner_r=2, basis="svd", rank_pattern={"to_q": 6}, core="dense"),
    "inner ranks": lambda: nora_input(r=4, inner_r=2, basis="svd", inner_rank_pattern={"to_q": 3, "to_k": 1}),
    "dora": lambda: dora(r=3, target_modules=EVERYTHING),
    "mora": lambda: mora(r=2),
    "melora": lambda: melora(r=4, blocks=2),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Arguments of ``UNet2DConditionModel`` for the UNets of Stable Diffusion 1.5 and SDXL."""


@pytest.mark.parametrize("name", CONFIGS)
def test_costs_equal_those_of_a_real_file(pipe: Any, tmp_path: Path, name: str) -> None:
    counted = cost(CONFIGS[name](), {path: flat_weight(layer).shape for path, layer in projections(pipe.unet).items()})
    add_adapter(pipe, CONFIGS[name](), "one")
    tensors = load_file(save_adapter(pipe, tmp_path / "one", "one"))
    assert counted.trained == sum(p.numel() for p in trainable_parameters(pipe, "one").values())
    assert counted.file_bytes == sum(value.numel() * value.element_size() for value in tensors.values())
    frozen = [value for key, value in tensors.items() if key.endswith(("A_out", "B_out"))]
    assert counted.basis_bytes == sum(value.numel() * value.element_size() for value in frozen)
    assert max(counted.ranks) == export_lora(tmp_path / "one", tmp_path / "plain.safetensors").rank


@pytest.mark.parametrize(("name", "count"), [("sd15", 128), ("sdxl", 560)])
def test_layouts_have_the_attention_of_the_real_models(name: str, count: int) -> None:
    """Rank 1 trains ``d_in + d_out`` parameters per projection; the totals of SD 1.5 and SDXL are known."""
    known = {"sd15": 199_296, "sdxl": 1_451_520}
    model = layout(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    assert model == {path: flat_weight(layer).shape for path, layer in targets(unet, nora()).items()}
    assert len(model) == count
    assert cost(AdapterConfig(r=1, inner_r=1, core="none", basis="kaiming"), model).trained == known[name]
    assert cost(nora(r=1, inner_r=1), model).trained == 2 * count


def test_the_documented_table_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    table, *lists = capsys.readouterr().out.strip().split("\n\n")
    assert table in DOCUMENT.read_text(encoding="utf-8"), "run `nora-diffusion methods` and paste its table there"
    assert len(table.splitlines()) == len(PRESETS) + 2
    assert lists


def test_parts_of_the_table_and_unknown_names() -> None:
    head, _, row = method_table(["nora"], ["sd15"]).splitlines()
    assert "SDXL" not in head and "| 32,768 | 12.89 MB, 0.13 MB shared |" in row
    with pytest.raises(UserError, match="nore"):
        method_table(["nore"])
    with pytest.raises(UserError, match=", ".join(LAYOUTS)):
        method_table(["nora"], ["sd9"])
