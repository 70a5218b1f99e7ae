"""Every preset against the invariants of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize

from nora_diffusion import (
    AdapterConfig,
    UserError,
    add_adapter,
    delete_adapter,
    load_adapter,
    mixed_batch,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import (
    dora,
    dylora,
    lora,
    lora_mini,
    lora_xs,
    malora,
    melora,
    milora,
    moe_lora,
    mor,
    mora,
    nora,
    nora_input,
)
from nora_diffusion.loaders import active_adapters, list_adapters, trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

EVERYTHING = ["attn", "ff", "proj", "conv"]
PRESETS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=4, inner_r=2),
    "nora-svd-everywhere": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=EVERYTHING),
    "nora-awsvd-everywhere": lambda: nora(r=4, inner_r=2, target_modules=EVERYTHING, dropout=0.5),
    "nora-patterns": lambda: nora(r=4, inner_r=2, alpha=2.0, rank_pattern={"to_q": 6}, alpha_pattern={"to_k": 8.0}),
    "nora-inner-ranks": lambda: nora(
        r=4, inner_r=2, basis="svd", target_modules=EVERYTHING, inner_rank_pattern={"to_q": 3, "conv1": 4}
    ),
    "nora-orthogonal": lambda: nora(r=4, inner_r=2, basis="orthogonal"),
    "mor": lambda: mor(r=4, num_experts=3),
    "mor-linear": lambda: mor(r=4, num_experts=3, target_modules=["attn", "ff"], dropout=0.5),
    "mor-prompt": lambda: mor(r=4, num_experts=3, router="prompt"),
    "mor-timestep-everywhere": lambda: mor(r=4, num_experts=3, router="timestep", target_modules=EVERYTHING),
    "mor-prompt+timestep": lambda: mor(r=4, num_experts=3, router="prompt+timestep", dropout=0.5),
    "nora_input": lambda: nora_input(r=4, inner_r=2),
    "nora_input-everywhere": lambda: nora_input(r=4, inner_r=2, basis="svd", magnitude=True, target_modules=EVERYTHING),
    "nora_input-inner-ranks": lambda: nora_input(r=4, inner_r=2, inner_rank_pattern={"to_q": 4, "to_v": 1}),
    "moe_lora": lambda: moe_lora(r=2, num_experts=3),
    "malora": lambda: malora(r=4, inner_r=2, num_experts=3),
    "malora-prompt+timestep": lambda: malora(r=4, inner_r=2, num_experts=3, router="prompt+timestep"),
    "milora": lambda: milora(r=2, top_k=0),
    "milora-everywhere": lambda: milora(r=2, top_k=0, router="prompt+timestep", target_modules=EVERYTHING),
    "moe_lora-prompt+timestep": lambda: moe_lora(r=2, num_experts=3, router="prompt+timestep"),
    "lora": lambda: lora(r=3, alpha=6.0),
    "lora-everywhere": lambda: lora(r=3, target_modules=EVERYTHING),
    "lora_xs": lambda: lora_xs(r=4),
    "lora_xs-everywhere": lambda: lora_xs(r=4, target_modules=EVERYTHING),
    "nora-dense": lambda: nora(r=4, basis="svd", core="dense"),
    "nora-diagonal-all-trained": lambda: nora(r=4, basis="svd", core="diagonal", trained=["down", "core", "up"]),
    "nora-up-trained": lambda: nora(r=4, basis="orthogonal", core="none", trained=["up"]),
    "nora-magnitude": lambda: nora(r=4, inner_r=2, basis="svd", magnitude=True),
    "lora_mini": lambda: lora_mini(r=4, inner_r=2),
    "dora": lambda: dora(r=3, alpha=6.0),
    "dora-everywhere": lambda: dora(r=3, target_modules=EVERYTHING),
    "mora-everywhere": lambda: mora(r=2, target_modules=EVERYTHING),
    "melora-everywhere": lambda: melora(r=4, blocks=2, target_modules=EVERYTHING),
    "dylora": lambda: dylora(r=4),
    "lora-scales": lambda: lora(r=3, rank_scales="linear"),
    "nora-scales-everywhere": lambda: nora(
        r=4, inner_r=3, basis="svd", rank_scales="softmax", target_modules=EVERYTHING
    ),
    "nora_input-scales": lambda: nora_input(r=4, inner_r=2, rank_scales="linear", dropout=0.5),
    "dora-scales": lambda: dora(r=3, rank_scales="softmax"),
}
COMPONENTS = ("unet", "text_encoder")
Render = Callable[[Any], torch.Tensor]


def all_factors(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{path}.{factor}": value.clone()
        for component in COMPONENTS
        for path, layer in nora_layers(getattr(pipe, component), name).items()
        for factor, value in layer.delta(name).state_dict().items()
    }


@pytest.fixture(params=PRESETS, ids=str)
def config(request: pytest.FixtureRequest) -> AdapterConfig:
    return PRESETS[request.param]()


def test_starts_as_exact_no_op(pipe: Any, render: Render, config: AdapterConfig) -> None:
    before = render(pipe)
    add_adapter(pipe, config, "one", COMPONENTS)
    torch.testing.assert_close(render(pipe), before, atol=1e-6 if config.magnitude else 0, rtol=0)


def test_only_trained_factors_get_gradients(pipe: Any, config: AdapterConfig) -> None:
    add_adapter(pipe, config, "one", COMPONENTS)
    randomize(pipe)
    out = pipe.unet(torch.randn(1, 4, 8, 8), 3, pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0]).sample
    out.square().mean().backward()
    declared = trainable_parameters(pipe, "one")
    requiring = {id(p) for component in COMPONENTS for p in getattr(pipe, component).parameters() if p.requires_grad}
    assert requiring == {id(p) for p in declared.values()}
    reached = [p for p in declared.values() if p.grad is not None and p.grad.abs().sum() > 0]
    # The pooled output and projections of the last text layer may not reach the UNet; all others must get gradients.
    assert len(reached) >= 0.9 * len(declared)
    for layer in nora_layers(pipe.unet, "one").values():
        frozen = {name for name, _ in layer.delta("one").named_buffers()}
        assert frozen == {name for name, of in {"A_out": "down", "B_out": "up"}.items() if of not in config.trained}


def test_scale_zero_and_disabling_give_the_base_bit_for_bit(pipe: Any, render: Render, config: AdapterConfig) -> None:
    before = render(pipe)
    add_adapter(pipe, config, "one", COMPONENTS)
    randomize(pipe)
    with_adapter = render(pipe)
    assert not torch.equal(with_adapter, before)
    set_adapters(pipe, "one", 0.0)
    assert torch.equal(render(pipe), before)
    set_adapters(pipe, "one")
    pipe.disable_lora()
    assert torch.equal(render(pipe), before)
    pipe.enable_lora()
    assert torch.equal(render(pipe), with_adapter)


def test_fused_equals_live_and_unfused_is_bit_for_bit(pipe: Any, render: Render, config: AdapterConfig) -> None:
    before = render(pipe)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    add_adapter(pipe, config, "one", COMPONENTS)
    randomize(pipe)
    live = render(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.fuse_lora()
    routed = config.router != "none"
    assert any("stays live" in str(w.message) for w in caught) == routed
    torch.testing.assert_close(render(pipe), live, atol=2e-5, rtol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(render(pipe), live)
    delete_adapter(pipe, "one")
    assert torch.equal(render(pipe), before)
    after = pipe.unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], v) for k, v in weights.items())


def test_deleting_a_fused_adapter_restores_the_weights(pipe: Any, render: Render) -> None:
    before = render(pipe)
    add_adapter(pipe, nora(r=4, inner_r=2), "one", COMPONENTS)
    add_adapter(pipe, lora(r=2), "two", COMPONENTS)
    randomize(pipe, "one")
    randomize(pipe, "two", seed=1)
    set_adapters(pipe, ["one", "two"])
    pipe.fuse_lora()
    delete_adapter(pipe, "one")
    delete_adapter(pipe, "two")
    assert torch.equal(render(pipe), before)


def test_deleting_an_adapter_beside_a_magnitude_copies_no_weights(pipe: Any) -> None:
    """Only fusing needs a copy of the clean weight."""
    add_adapter(pipe, dora(r=2), "one")
    add_adapter(pipe, nora(r=4, inner_r=2), "two")
    delete_adapter(pipe, "two")
    assert all(layer.merging.clean is None for layer in nora_layers(pipe.unet, "one").values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_repeated_fusing_in_half_precision_leaves_the_weights(pipe: Any, dtype: torch.dtype) -> None:
    pipe.to(dtype=dtype)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
    randomize(pipe)
    for _ in range(3):
        pipe.fuse_lora()
        pipe.unfuse_lora()
    delete_adapter(pipe, "one")
    assert all(torch.equal(value, weights[key]) for key, value in pipe.unet.state_dict().items())


def test_save_then_load_is_exact(pipe: Any, render: Render, config: AdapterConfig, tmp_path: Path) -> None:
    add_adapter(pipe, config, "one", COMPONENTS)
    randomize(pipe)
    image = render(pipe)
    factors = all_factors(pipe, "one")
    save_adapter(pipe, tmp_path, "one")
    delete_adapter(pipe, "one")
    loaded = load_adapter(pipe, tmp_path, "again")
    assert loaded.applied == loaded.total == len(factors) > 0
    again = all_factors(pipe, "again")
    assert again.keys() == factors.keys()
    assert all(torch.equal(again[key], value) for key, value in factors.items())
    # The values are equal bit for bit, but a kernel may round differently at another memory alignment.
    torch.testing.assert_close(render(pipe), image, atol=1e-5, rtol=1e-5)


def test_evaluation_equals_training_path(pipe: Any, config: AdapterConfig) -> None:
    config.dropout = 0.0
    add_adapter(pipe, config, "one")
    randomize(pipe)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    trained = pipe.unet(x, 3, states).sample.detach()
    with torch.no_grad():
        assert (pipe.unet(x, 3, states).sample - trained).norm() < 1e-5 * trained.norm()


def test_dropout_is_off_in_inference(pipe: Any, render: Render) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, dropout=0.9), "one")
    randomize(pipe)
    assert torch.equal(render(pipe), render(pipe))


def test_loading_without_activating_keeps_the_active_set(pipe: Any, render: Render, tmp_path: Path) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2), "one")
    randomize(pipe)
    save_adapter(pipe, tmp_path / "one", "one")
    image = render(pipe)
    load_adapter(pipe, tmp_path / "one", "quiet", activate=False)
    assert active_adapters(pipe.unet) == ["one"]
    assert torch.equal(render(pipe), image)
    load_adapter(pipe, tmp_path / "one", "loud")
    assert active_adapters(pipe.unet) == ["one", "loud"]
    assert list_adapters(pipe) == {"unet": ["one", "quiet", "loud"]}


def test_a_fresh_adapter_beside_an_active_one_is_a_no_op(pipe: Any, render: Render) -> None:
    add_adapter(pipe, lora(r=2), "one", COMPONENTS)
    randomize(pipe)
    image = render(pipe)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "two", COMPONENTS)
    assert active_adapters(pipe.unet) == ["one", "two"]
    # Both are one matrix product, which may round otherwise than that of one adapter.
    torch.testing.assert_close(render(pipe), image, atol=1e-6, rtol=0)
    delete_adapter(pipe, "two")
    assert torch.equal(render(pipe), image)


def test_adapters_add_up(pipe: Any) -> None:
    """Two active weighted adapters equal the base plus both dense updates."""
    layer_path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipe.unet.get_submodule(layer_path)
    x = torch.randn(3, base.in_features)
    weight = base.weight.detach().clone()
    add_adapter(pipe, nora(r=4, inner_r=2), "one")
    add_adapter(pipe, lora(r=2, alpha=4.0), "two")
    randomize(pipe, "one")
    randomize(pipe, "two", seed=1)
    set_adapters(pipe, ["one", "two"], [0.5, 2.0])
    layer = pipe.unet.get_submodule(layer_path)
    one, two = layer.delta("one"), layer.delta("two")
    dense = weight + 0.5 * one.B_out @ one.core.B_in @ one.core.A_in @ one.A_out + 2.0 * (4.0 / 2) * two.B @ two.A
    torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-6, rtol=1e-5)


def test_beside_an_ordinary_lora(pipe: Any, render: Render, tmp_path: Path) -> None:
    """Our layer is innermost: the LoRA keeps its keys, and after deleting ours its images are the same."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "plain")
    only_plain = render(pipe)
    keys = set(pipe.unet.state_dict())
    add_adapter(pipe, nora(r=4, inner_r=2), "one")
    randomize(pipe)
    set_adapters(pipe, ["plain", "one"])
    assert not torch.equal(render(pipe), only_plain)
    both = render(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(render(pipe), both, atol=2e-5, rtol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(render(pipe), both, atol=2e-5, rtol=1e-4)
    delete_adapter(pipe, "one")
    assert set(pipe.unet.state_dict()) == keys
    torch.testing.assert_close(render(pipe), only_plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nora(r=0), "r=0"),
        (lambda: nora(r=2, inner_r=4), "inner_r=4"),
        (lambda: nora(basis="svdd"), "svdd"),  # type: ignore[arg-type]
        (lambda: nora(dropout=1.0), "dropout"),
        (lambda: mor(num_experts=0), "num_experts"),
        (lambda: nora(alpha="8"), "alpha='8'"),  # type: ignore[arg-type]
        (lambda: nora(power=float("nan")), "power=nan"),
    ],
)
def test_bad_config_is_refused_with_its_field(make: Callable[[], AdapterConfig], word: str) -> None:
    with pytest.raises(UserError, match=word):
        make()


@pytest.mark.parametrize("weight", [float("nan"), "0.8", None])
def test_weights_that_are_not_numbers_are_refused(pipe: Any, render: Render, tmp_path: Path, weight: Any) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
    save_adapter(pipe, tmp_path, "one")
    before = render(pipe)
    for call in (
        lambda: set_adapters(pipe, "one", weight),
        lambda: set_adapters(pipe, ["one"], [weight]),
        lambda: load_adapter(pipe, tmp_path, "two", weight=weight),
    ):
        with pytest.raises(UserError, match="is not a finite number"):
            call()
    with pytest.raises(UserError, match="is not a finite number"), mixed_batch(pipe, ["one"], float("nan")):
        pass
    assert torch.equal(render(pipe), before)


def test_bad_use_is_refused_and_leaves_the_pipeline_unchanged(pipe: Any, render: Render) -> None:
    before = render(pipe)
    for call, word in [
        (lambda: add_adapter(pipe, nora(), "a b"), "a b"),
        (lambda: add_adapter(pipe, nora(), "train"), "'train' is an attribute of PyTorch"),
        (lambda: add_adapter(pipe, nora(), "one", ["vae"]), "vae"),
        (lambda: add_adapter(pipe, nora(target_modules=["no_such"]), "one"), "no_such"),
        (lambda: set_adapters(pipe, "ghost"), "ghost"),
        (lambda: delete_adapter(pipe, "ghost"), "ghost"),
        (lambda: save_adapter(pipe, "unused", "ghost"), "ghost"),
        (lambda: save_adapter(pipe, "unused.safetensors"), "is a file name"),
        (lambda: pipe.unet.add_adapter(nora(), "one"), "calibrates"),
    ]:
        with pytest.raises(UserError, match=word):
            call()
    assert torch.equal(render(pipe), before)
