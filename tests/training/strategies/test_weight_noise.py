"""Flat-LoRA and HaLoRA: gradients under noise against the dense formula, and frozen weights that are never changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Configure, assert_same_run, in_double
from torch import Tensor, nn

from nora_diffusion.adapters import NoraLayer
from nora_diffusion.pipelines.components import components, without_adapters
from nora_diffusion.training import train
from nora_diffusion.training.run.run import Run
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.step.seeds import derive
from nora_diffusion.training.strategies import flat, halora
from nora_diffusion.training.strategies.weight_noise import weights_replaced

LORA = {"method": "lora", "rank": 2, "inner_rank": None, "basis": None}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "target_modules": ["attn", "conv"], "alpha": 3.0},
    "nora": {"alpha": 2.0},
    "one-sided": {"method": "nora_input"},
    "text encoder": {**LORA, "train_text_encoder": True},
    "gradient checkpointing": {**LORA, "train_text_encoder": True, "gradient_checkpointing": True},
    "prior": {**LORA, "with_prior_preservation": True, "class_prompt": "a dog", "prior_preservation": "frozen"},
}


def layers_of(run: Run) -> dict[str, NoraLayer]:
    return {
        f"{name}.{path}": layer
        for name, module in components(run.pipe).items()
        for path, layer in module.named_modules()
        if isinstance(layer, NoraLayer)
    }


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight for name, layer in layers_of(run).items()}


def randomize(run: Run) -> None:
    source = torch.Generator().manual_seed(0)
    for parameter in run.parameters.values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=source))


def expected_noise(run: Run, strategy: str, step: int, steps: int) -> dict[str, Tensor]:
    """``e`` of each layer by the formula, from dense weights."""
    source = torch.Generator().manual_seed(derive(run.config.seed, "weight noise", step))
    noise = {}
    for name, layer in layers_of(run).items():
        weight = layer.base_layer.weight.detach()
        down, up = layer.delta(run.adapter).pair()  # type: ignore[call-arg]
        merged = weight.flatten(1) + layer.states[run.adapter].native_scale * (up @ down).detach()
        n = torch.randn(merged.shape, generator=source, dtype=merged.dtype)
        if strategy == "flat":
            sigma = 0.05 * (1 - math.cos(math.pi * step / steps)) / 2
            noise[name] = sigma / math.sqrt(merged.shape[1]) * merged.norm(dim=1, keepdim=True) * n
        else:
            noise[name] = 0.02 * weight.abs().max() * n
        noise[name] = noise[name].view_as(weight)
    return noise


@pytest.mark.parametrize("strategy", ["flat", "halora"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_gradients_are_those_of_noisy_weights(
    strategy: str, method: dict[str, Any], ready: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against noise that is added to the frozen weights by hand, but not to the base that preserves the class."""
    in_double(monkeypatch.setattr)
    monkeypatch.setattr(halora, "PENALTY", 0.0)
    stepper = ready(**method, strategy=strategy, max_train_steps=8)
    run = stepper.run
    randomize(run)
    before = {name: weight.detach().clone() for name, weight in weights_of(run).items()}
    stepper.backward(5, 0)
    found = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}  # type: ignore[union-attr]
    after = weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.optimizer.zero_grad()
    noise = expected_noise(run, strategy, 5, 8)

    def noisy_outside_of_the_base(adds: float) -> None:
        for name, weight in weights_of(run).items():
            weight.data.copy_(before[name] + adds * noise[name])

    def base_alone(modules: Any) -> Any:
        """The prediction of the base is made with its own weights."""
        context = without_adapters(modules)

        class Clean:
            def __enter__(self) -> None:
                noisy_outside_of_the_base(0.0)
                context.__enter__()

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)
                noisy_outside_of_the_base(1.0)

        return Clean()

    monkeypatch.setattr("nora_diffusion.training.run.batches.without_adapters", base_alone)
    noisy_outside_of_the_base(1.0)
    torch.autograd.backward(stepper.batches.loss(5))
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(parameter.grad, found[name], rtol=1e-7, atol=1e-13)
    assert any(gradient.any() for gradient in found.values())


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_weights_are_restored_after_errors(error: type[BaseException], ready: Callable[..., Stepper]) -> None:
    stepper = ready(**LORA, strategy="flat", max_train_steps=4, target_modules=["attn", "conv"])
    run = stepper.run
    weights = weights_of(run)
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    last = list(layers_of(run).values())[-1]

    def fail(*_: Any) -> None:
        assert last.base_layer.weight is not weights[list(weights)[-1]]
        raise error

    handle = last.base_layer.register_forward_hook(fail)
    with pytest.raises(error):
        stepper.backward(2, 0)
    handle.remove()
    assert all(weights_of(run)[name] is weight for name, weight in weights.items())
    assert all(torch.equal(weight, copies[name]) for name, weight in weights.items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(run).values())


def test_noise_is_drawn_once_for_each_step(ready: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[Tensor]] = []
    original = weights_replaced
    monkeypatch.setattr(halora, "weights_replaced", lambda w: (drawn.append(list(w.values())), original(w))[1])
    stepper = ready(**LORA, strategy="halora", gradient_accumulation_steps=2)
    stepper.step(0)
    stepper.step(1)
    same = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(drawn)]
    assert same == [True, False, True]


def test_flat_noise_rises_from_none_to_all() -> None:
    assert flat.rising(0, 10) == 0 and flat.rising(5, 10) == pytest.approx(0.5) and flat.rising(10, 10) == 1


def test_norms_are_spectral_with_their_exact_gradient() -> None:
    """Against the norm of a dense product, also for a factor of zeros and for one rank."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    dense = torch.linalg.matrix_norm(matrices @ matrices.mT, ord=2)
    (expected,) = torch.autograd.grad(dense.sum(), matrices)
    found = halora.spectral_norms(matrices)
    torch.testing.assert_close(found, dense)
    (gradient,) = torch.autograd.grad(found.sum(), matrices)
    torch.testing.assert_close(gradient, expected)
    assert not halora.spectral_norms(torch.zeros(1, 2, 3)).any()
    row = torch.randn(1, 1, 5)
    torch.testing.assert_close(halora.spectral_norms(row), row.square().sum().view(1))


def test_penalty_is_added_once_for_each_step(ready: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halora, "PENALTY", 0.5)
    monkeypatch.setattr(halora, "SIGMA", 0.0)
    method = {**LORA, "gradient_accumulation_steps": 2}
    stepper = ready(**method, strategy="halora")
    run = stepper.run
    randomize(run)
    for micro in range(2):
        stepper.backward(0, micro)
    found = {name: parameter.grad for name, parameter in run.parameters.items()}
    run.optimizer.zero_grad(set_to_none=True)
    pairs = [layer.delta(run.adapter) for layer in layers_of(run).values()]
    norms = [torch.linalg.matrix_norm(m @ m.T, ord=2) for p in pairs for m in (p.A, p.B.T)]  # type: ignore[union-attr]
    loss = sum(stepper.batches.loss(0, micro) for micro in range(2)) / 2 + 0.5 * sum(norms) / len(pairs)
    torch.autograd.backward(loss)
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_replaced_weight_serves_while_adapters_are_on(ready: Callable[..., Stepper]) -> None:
    run = ready(**LORA, target_modules=["to_q", "to_k"]).run
    path, layer = next(iter(layers_of(run).items()))
    assert isinstance(layer.base_layer, nn.Linear), path
    x, weight = torch.randn(2, layer.in_features), torch.randn_like(layer.base_layer.weight)
    clean = layer(x)
    with weights_replaced({layer: weight}), torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias))
        with without_adapters(run.plan.components):
            torch.testing.assert_close(layer(x), clean)
    assert torch.equal(layer(x), clean)


@pytest.mark.parametrize("strategy", ["flat", "halora"])
def test_runs_repeat_bit_for_bit(strategy: str, configure: Configure, tmp_path: Path) -> None:
    one, other = (
        train(configure(**LORA, strategy=strategy, output_dir=str(tmp_path / name))).adapter_path.parent
        for name in ("one", "other")
    )
    assert_same_run(one, other, last=3)
