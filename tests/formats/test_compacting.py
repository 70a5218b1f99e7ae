"""Compact adapters: the same update, with each layer at the rank that it uses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize

from nora_diffusion import UserError, add_adapter, delete_adapter, load_adapter, save_adapter
from nora_diffusion.adapters import AdapterConfig, dora, lora, nora, nora_input
from nora_diffusion.formats.adapter_writing import Part
from nora_diffusion.formats.compacting import compacted
from nora_diffusion.pipelines.components import nora_layers

CONFIGS = {
    "lora": lora(r=4),
    "lora-alpha": lora(r=4, alpha=2.0, alpha_pattern={"to_k": 6.0}, rank_pattern={"to_v": 3}),
    "lora-linear": lora(r=4, rank_scales="linear"),
    "lora-softmax": lora(r=4, alpha=2.0, rank_scales="softmax"),
    "nora": nora(r=4, inner_r=3, basis="svd", alpha=2.0, rank_scales="linear", inner_rank_pattern={"to_k": 2}),
    "nora_input": nora_input(r=4, inner_r=3, basis="svd", rank_scales="softmax"),
    "dora": dora(r=4, rank_scales="linear"),
}


def deltas(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    return {path: layer.get_delta_weight(name).clone() for path, layer in nora_layers(pipe.unet, name).items()}


@torch.no_grad()
def prune(pipe: Any, name: str, kept: dict[str, int]) -> None:
    """Zero a factor of all ranks but the first ``kept`` of each kind of layer, on either side of the chain."""
    for path, layer in nora_layers(pipe.unet, name).items():
        factors = dict(layer.delta(name).named_parameters())
        down = factors["core.A_in"] if "core.A_in" in factors else factors["A"]
        up = factors["core.B_in"] if "core.B_in" in factors else factors["B"]
        rank = next((rank for kind, rank in kept.items() if f"{kind}" in path), len(down))
        if "attn1" in path:
            up[:, rank:] = 0
        else:
            down[rank:] = 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_has_the_used_ranks_and_the_same_update(pipe: Any, tmp_path: Path, name: str) -> None:
    config: AdapterConfig = CONFIGS[name]
    add_adapter(pipe, config, "one", ["unet"])
    randomize(pipe)
    prune(pipe, "one", {"to_q": 0, "to_k": 1, "to_out": 2})
    before = deltas(pipe, "one")
    save_adapter(pipe, tmp_path, "one", finish=compacted)
    assert all(torch.equal(value, before[path]) for path, value in deltas(pipe, "one").items())
    delete_adapter(pipe, "one")
    load_adapter(pipe, tmp_path, "again")
    after = deltas(pipe, "again")
    dropped = {path for path in before if "to_q" in path and not config.magnitude}
    assert after.keys() == before.keys() - dropped
    assert dropped or config.magnitude
    for path, value in after.items():
        torch.testing.assert_close(value, before[path], rtol=1e-5, atol=1e-7 * before[path].abs().max().item() + 1e-9)
        layer = nora_layers(pipe.unet, "again")[path]
        expected = next((rank for kind, rank in {"to_q": 1, "to_k": 1, "to_out": 2}.items() if kind in path), None)
        assert expected is None or layer.delta("again").full_rank == expected  # type: ignore[union-attr]
        assert layer.delta("again").l is None  # type: ignore[union-attr]
        assert math.isclose(layer.states["again"].native_scale, config.scale_for(path))


@pytest.mark.parametrize("exclude", [None, ["mid.to_q"], r".*mid.*"])
def test_layers_without_ranks_are_no_targets(exclude: Any) -> None:
    config = lora(r=2, target_modules=["to_q"], exclude_modules=exclude)
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    layers = {"a.to_q": {"A": zero, "B": one.T}, "b.to_q": {"A": one, "B": one.T}}
    found = compacted({"unet": Part(config, layers)})["unet"].config
    assert [found.selects(path) for path in ("a.to_q", "b.to_q", "mid.to_q", "c.a.to_q")] == [False, True, False, False]


def test_an_adapter_without_any_rank_is_refused() -> None:
    layers = {"a.to_q": {"A": torch.zeros(2, 3), "B": torch.ones(3, 2)}}
    with pytest.raises(UserError, match="no rank of any layer"):
        compacted({"unet": Part(lora(r=2), layers)})
