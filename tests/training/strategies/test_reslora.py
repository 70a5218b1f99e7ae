"""ResLoRA: the paths in training against the formula, and the merged file against what was trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Configure, in_double
from safetensors.torch import load_file
from torch import Tensor, nn

from nora_diffusion import inspect_adapter, load_adapter
from nora_diffusion.adapters import NoraLayer
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.pipelines.components import components, nora_layers
from nora_diffusion.training import train
from nora_diffusion.training.hooks.trained import Layer
from nora_diffusion.training.run.run import Run
from nora_diffusion.training.run.saving import save_adapter
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.strategies.blocks import layers_before, name_in_block
from nora_diffusion.training.strategies.reslora import ResLoRA

LORA = {"method": "lora", "rank": 2, "inner_rank": None, "basis": None, "target_modules": ["attn", "conv", "ff"]}
NORA = {"target_modules": ["attn", "conv"]}
SHORTCUTS = ["input", "block", "middle"]
KINDS = [(LORA, "input"), (LORA, "block"), (LORA, "middle"), (NORA, "input"), (NORA, "middle")]


def layers_of(run: Run) -> dict[Layer, NoraLayer]:
    return {
        (name, path): layer
        for name, module in components(run.pipe).items()
        for path, layer in nora_layers(module, run.adapter).items()
    }


def randomize(run: Run) -> None:
    source = torch.Generator().manual_seed(0)
    for parameter in run.parameters.values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=source))


def pair_of(layer: NoraLayer, run: Run) -> tuple[Tensor, Tensor]:
    """``A`` and ``s B`` of a layer, dense."""
    down, up = layer.delta(run.adapter).pair()  # type: ignore[call-arg]
    return down, layer.states[run.adapter].native_scale * up


def applied(layer: NoraLayer, x: Tensor, weight: Tensor) -> Tensor:
    """A dense weight in the place of the layer's own, without bias."""
    base: Any = layer.base_layer
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight.view(len(weight), *base.weight.shape[1:]), None, base.stride, base.padding)
    return F.linear(x, weight)


@pytest.mark.parametrize(("method", "shortcut"), KINDS)
def test_layers_compute_the_formula(
    method: dict[str, Any], shortcut: str, ready: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the layers themselves got and gave in a pass; the previous layer by the order in which they ran."""
    in_double(monkeypatch.setattr)
    run = (stepper := ready(**method, strategy="reslora", shortcut=shortcut)).run
    randomize(run)
    ran: list[tuple[Layer, Tensor, Tensor]] = []
    layers = layers_of(run)
    with ExitStack() as stack, run.hooks.around_pass(0), torch.no_grad():
        for key, layer in layers.items():
            handle = layer.register_forward_hook(lambda _, x, y, key=key: ran.append((key, x[0], y)))
            stack.callback(handle.remove)
        stepper.batches.loss(0)
    kinds: dict[Any, tuple[Layer, Tensor]] = {}
    paths = 0
    for key, x, y in ran:
        layer, base = layers[key], layers[key].base_layer
        down, up = pair_of(layer, run)
        expected = base(x) + applied(layer, x, up @ down)
        kind = name_in_block(key[1]), base.weight.shape
        if kind in kinds:
            earlier, x_before = kinds[kind]
            down_before, up_before = pair_of(layers[earlier], run)
            if shortcut == "block":
                expected = expected + applied(layer, x, up_before @ down_before)
                paths += 1
            elif x_before.shape == x.shape:
                given = down if shortcut == "input" else down_before
                expected = expected + applied(layers[earlier], x_before, up @ given)
                paths += 1
        kinds[kind] = key, x
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    assert 0 < paths < len(ran)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_gradients_are_slopes_of_the_loss(
    shortcut: str, ready: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with gradient checkpointing, and in a trained text encoder: the paths cross the checkpoints."""
    in_double(monkeypatch.setattr)
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        settings = {**LORA, "train_text_encoder": True, "gradient_checkpointing": checkpointing}
        where = str(tmp_path / str(checkpointing))
        stepper = ready(**settings, strategy="reslora", shortcut=shortcut, output_dir=where)
        run = stepper.run
        randomize(run)
        stepper.backward(0, 0)
        found.append({n: p.grad.clone() for n, p in run.parameters.items()})  # type: ignore[union-attr]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-14)
    source, h = torch.Generator().manual_seed(1), 1e-6
    directions = {n: torch.randn(p.shape, generator=source, dtype=p.dtype) for n, p in run.parameters.items()}
    losses = []
    for side in (h, -2 * h):
        for name, parameter in run.parameters.items():
            parameter.data.add_(directions[name], alpha=side)
        with run.hooks.around_pass(0):
            losses.append(float(stepper.batches.loss(0).detach()))
    slope = sum(float((found[0][name] * directions[name]).sum()) for name in directions)
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize(("method", "shortcut"), KINDS)
def test_the_saved_adapter_does_what_samples_show(
    method: dict[str, Any], shortcut: str, ready: Callable[..., Stepper], tmp_path: Path
) -> None:
    """And of the block shortcut, also what was trained."""
    stepper = ready(**method, strategy="reslora", shortcut=shortcut, alpha=3.0)
    run = stepper.run
    randomize(run)
    stepper.backward(0, 0)
    with run.hooks.around_pass(0), torch.no_grad():
        trained = float(stepper.batches.loss(0))
    with run.hooks.as_saved(), torch.no_grad():
        shown = float(stepper.batches.loss(0))
    with torch.no_grad():
        plain = float(stepper.batches.loss(0))
    save_adapter(run.pipe, tmp_path / "saved", run.adapter, finish=run.hooks.finish)
    delete_adapter(run.pipe, run.adapter)
    load_adapter(run.pipe, tmp_path / "saved", "saved")
    for module in run.plan.components.values():
        module.train()
    with torch.no_grad():
        saved = float(stepper.batches.loss(0))
    assert saved == pytest.approx(shown, rel=1e-5) and abs(plain - saved) > 1e-4 * saved
    assert (saved == pytest.approx(trained, rel=1e-5)) == (shortcut == "block")


def test_the_estimate_is_the_ratio_of_mean_norms(ready: Callable[..., Stepper]) -> None:
    run = (stepper := ready(**LORA, strategy="reslora", shortcut="middle")).run
    randomize(run)
    (hook,) = run.hooks.hooks
    assert isinstance(hook, ResLoRA)
    layers, norms = layers_of(run), {}
    for step in range(3):
        with ExitStack() as stack:
            for key, layer in layers.items():

                def record(module: Any, x: Any, key: Layer = key) -> None:
                    down = pair_of(module, run)[0]
                    image = module.contract(x[0], down).detach()
                    norms.setdefault(key, []).append((float(image.norm()), image.shape))

                stack.callback(layer.register_forward_pre_hook(record).remove)
            stepper.backward(step, 0)
    shares = hook.shares()
    for key, share in shares.items():
        earlier = hook.before.get(key)
        linked = earlier is not None and norms[earlier][0][1] == norms[key][0][1]
        mean = {k: sum(norm for norm, _ in norms[k]) for k in (key, earlier) if k is not None}
        expected = mean[earlier] / mean[key] if linked else 0.0  # type: ignore[index]
        assert share == pytest.approx(expected, rel=1e-4)
    assert any(shares.values()) and not all(shares.values())


def test_block_ranks_add_up_in_the_file(configure: Configure) -> None:
    settings = {**LORA, "target_modules": ["attn"], "train_text_encoder": True, "alpha": 3.0}
    path = train(configure(**settings, strategy="reslora")).adapter_path
    info, tensors = inspect_adapter(path), load_file(path)
    ranks = {key.removesuffix(".nora_A"): len(value) for key, value in tensors.items() if key.endswith("nora_A")}
    assert set(ranks.values()) == {2, 4} and info.r == 4
    for component, axes in info.axes.items():
        own = {k.removeprefix(f"{component}."): rank for k, rank in ranks.items() if k.startswith(f"{component}.")}
        assert all(axes.rank_for(p) == rank and axes.scale_for(p) == pytest.approx(1.5) for p, rank in own.items())


def test_names_and_order_of_layers() -> None:
    names = {
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": "transformer_blocks.attn1.to_out.0",
        "down_blocks.0.attentions.1.proj_in": "attentions.proj_in",
        "mid_block.resnets.1.conv1": "resnets.conv1",
        "single_transformer_blocks.12.attn.to_q": "single_transformer_blocks.attn.to_q",
        "transformer_blocks.3.ff.net.0.proj": "transformer_blocks.ff.net.0.proj",
        "transformer_blocks.3.ff_context.net.0.proj": "transformer_blocks.ff_context.net.0.proj",
        "encoder.layers.3.self_attn.q_proj": "layers.self_attn.q_proj",
        "conv_in": "conv_in",
    }
    assert {path: name_in_block(path) for path in names} == names

    def of(component: str, *paths: str, width: int = 4) -> dict[Layer, NoraLayer]:
        return {(component, path): NoraLayer(nn.Linear(4, width)) for path in paths}

    q = "attentions.0.transformer_blocks.0.attn1.to_q"
    layers = of("unet", f"down_blocks.0.{q}", f"up_blocks.0.{q}", f"up_blocks.1.{q}", f"mid_block.{q}")
    layers |= of("unet", f"down_blocks.1.{q}", width=5) | of("text_encoder", f"down_blocks.0.{q}")
    before = layers_before(layers)
    assert {key[1][:10]: earlier[1][:10] for key, earlier in before.items()} == {
        "mid_block.": "down_block", "up_blocks.": "up_blocks.",
    }  # fmt: skip
    assert before["unet", f"up_blocks.0.{q}"] == ("unet", f"mid_block.{q}") and len(before) == 3
