"""Chain of LoRA: one adapter whose links are trained one after another equals training, merging and starting anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, in_double
from safetensors.torch import load_file
from torch import Tensor

from nora_diffusion import inspect_adapter
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.training import train
from nora_diffusion.training.hooks.trained import RankedChain, ranked_chain
from nora_diffusion.training.run.run import Run
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.strategies.chain import other_ranks, ranks_of_link

STEPS = 4
LORA = {"method": "lora", "rank": 2, "inner_rank": None, "basis": None}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "alpha": 3.0, "target_modules": ["attn", "conv"]},
    "rank 1, sgd": {**LORA, "rank": 1, "optimizer": "sgd", "learning_rate": 0.3, "adam_beta1": 0.9},
    "nora": {"inner_rank": 1, "alpha": 2.0},
    "one-sided": {"method": "nora_input", "inner_rank": 2},
    "text encoder": {**LORA, "train_text_encoder": True},
    "accumulation": {**LORA, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3},
    "gradient checkpointing": {**LORA, "gradient_checkpointing": True},
}  # fmt: skip


def pairs_of(run: Run) -> dict[tuple[str, str], RankedChain]:
    return {
        (name, path): ranked_chain(layer, run.adapter)
        for name, module in run.plan.components.items()
        for path, layer in nora_layers(module, run.adapter).items()
    }


def update_of(pair: RankedChain) -> Tensor:
    """``s B A``, dense, through the frozen outer pair if there is one."""
    down, up = pair.delta.pair()
    return (pair.scale * up @ down).detach()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_it_equals_training_merging_and_starting_anew(
    kind: dict[str, Any], ready: Callable[..., Stepper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strong weight decay shows that the links that are not trained keep their values."""
    in_double(monkeypatch.setattr)
    kind = {"max_train_steps": STEPS, "adam_weight_decay": 0.5, "lr_scheduler": "constant", **kind}
    chained = ready(**kind, strategy="chain", chain_links=2, output_dir=str(tmp_path / "chain"))
    single = ready(**kind, output_dir=str(tmp_path / "single"))
    links, pairs = pairs_of(chained.run), pairs_of(single.run)
    starts = {key: pair.down.detach().clone() for key, pair in links.items()}
    merged = {key: torch.zeros_like(update_of(pair)) for key, pair in pairs.items()}
    for link in range(2):
        for key, pair in pairs.items():
            pair.down.data.copy_(starts[key][slice(*ranks_of_link(links[key].ranks, 2, link))])
            pair.up.data.zero_()
        single.run.optimizer.state.clear()
        for step in (2 * link, 2 * link + 1):
            assert single.step(step) == pytest.approx(chained.step(step), rel=1e-9)
        for key, pair in pairs.items():
            merged[key] += update_of(pair)
            pair.layer.base_layer.weight.data += update_of(pair).view_as(pair.layer.base_layer.weight)
    for key, pair in links.items():
        assert pair.ranks == 2 * pairs[key].ranks and pair.scale == pairs[key].scale
        torch.testing.assert_close(update_of(pair), merged[key], rtol=1e-7, atol=1e-12)
    assert all(update.any() for update in merged.values())


def test_a_link_starts_at_an_equal_share_of_ranks_and_of_steps() -> None:
    assert [ranks_of_link(6, 3, link) for link in range(3)] == [(0, 2), (2, 4), (4, 6)]
    assert [ranks_of_link(4, 3, link) for link in range(3)] == [(0, 1), (1, 2), (2, 4)]  # a layer with 4 channels
    assert ranks_of_link(1, 2, 0) == (0, 0) and ranks_of_link(1, 2, 1) == (0, 1)
    before, after = other_ranks(torch.arange(8.0).view(2, 4), 1, 4, 2)
    assert before.tolist() == [[0, 1], [4, 5]] and after.tolist() == [[3], [7]]


def test_later_links_add_nothing_before_their_time(ready: Callable[..., Stepper]) -> None:
    stepper = ready(**LORA, strategy="chain", chain_links=3, max_train_steps=6)
    stepper.step(0)
    stepper.step(1)
    for pair in pairs_of(stepper.run).values():
        assert pair.up[:, :2].any() and not pair.up[:, 2:].any()
        state = stepper.run.optimizer.state[pair.up]
        assert float(state["step"]) == 2 and not state["exp_avg"][:, 2:].any()
    stepper.step(2)
    assert all(float(stepper.run.optimizer.state[p.up]["step"]) == 1 for p in pairs_of(stepper.run).values())


def test_the_file_is_one_adapter_of_all_ranks(configure: Configure) -> None:
    result = train(configure(**LORA, strategy="chain", chain_links=3, alpha=4.0))
    info = inspect_adapter(result.adapter_path)
    assert info.r == 6 and all(axes.alpha == 12.0 for axes in info.axes.values())
    assert all(value.any() for key, value in load_file(result.adapter_path).items() if key.endswith("nora_B"))
