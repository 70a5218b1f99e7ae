"""The balance loss of mixtures, against autograd on the dense formula."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import randomize
from runs import Configure

from nora_diffusion import UserError, add_adapter, load_adapter, router_summary
from nora_diffusion.adapters import malora, milora, moe_lora, mor
from nora_diffusion.adapters.targets import block_of
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.training import check, train
from nora_diffusion.training.hooks.balance import BalanceLoss, balance

CONFIGS = {
    "token": lambda: malora(r=4, inner_r=2, num_experts=3, target_modules=["attn", "ff", "proj"]),
    "prompt": lambda: moe_lora(r=2, num_experts=3, router="prompt"),
    "timestep": lambda: mor(r=4, num_experts=2, router="timestep", target_modules=["attn", "conv"], dropout=0.5),
}


def oracle(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    gates = torch.softmax(x.flatten(0, -2) @ router.T, -1)
    return len(router) * gates.mean(0).square().sum()


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 5), (3, 2, 2, 5)], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    x, router = torch.randn(shape, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    loss, gradient = balance(x, router.detach())
    expected = oracle(x, router)
    (wanted,) = torch.autograd.grad(expected, [router])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, wanted)


def test_loss_is_one_for_equal_shares_and_n_for_one_expert() -> None:
    x = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(balance(x, 50 * torch.eye(3, dtype=torch.float64))[0], x.new_tensor(1.0))
    one = torch.zeros(3, 3, dtype=torch.float64)
    one[0] = 50
    torch.testing.assert_close(balance(x, one)[0], x.new_tensor(3.0))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_routers_get_the_gradient_of_the_mean_over_layers(pipe: Any, name: str, checkpointing: bool) -> None:
    add_adapter(pipe, CONFIGS[name](), "one")
    randomize(pipe)
    pipe.unet.train()
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    layers = nora_layers(pipe.unet, "one")
    hook = BalanceLoss(SimpleNamespace(layers={("unet", k): v for k, v in layers.items()}, adapter="one"), 0.5)  # type: ignore[arg-type]
    inputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def read(layer: Any, args: Any) -> None:
            x = args[0] if args[0].ndim == 3 or name != "token" else args[0].movedim(1, -1)
            inputs.setdefault(path, layer.delta("one").router_input(x).detach())

        return read

    handles = [layer.register_forward_pre_hook(keep(path)) for path, layer in layers.items()]
    x, states = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    with hook.around_pass(0):
        loss = pipe.unet(x, torch.tensor([1, 5, 9]), states).sample.square().mean()
        penalty = hook.penalty(0)
        assert penalty is not None
        (loss + penalty).backward()
    for handle in handles:
        handle.remove()
    found = {path: layer.delta("one").W_g.grad.clone() for path, layer in layers.items()}
    pipe.unet.zero_grad()
    pipe.unet(x, torch.tensor([1, 5, 9]), states).sample.square().mean().backward()
    routers = {path: layer.delta("one").W_g for path, layer in layers.items()}
    expected = 0.5 * sum(oracle(inputs[path], router) for path, router in routers.items()) / len(layers)
    torch.testing.assert_close(penalty.detach(), expected.detach())
    if name != "timestep":  # dropout differs between the two passes
        expected.backward()
        for path, router in routers.items():
            torch.testing.assert_close(found[path], router.grad, atol=1e-6, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_high_weight_evens_the_gates_out(configure: Configure, pipe: Any, tmp_path: Path) -> None:
    sharpness = []
    for weight in (0.0, 100.0):
        config = configure(
            method="moe_lora", inner_rank=None, basis=None, num_experts=3, learning_rate=0.1, max_train_steps=8,
            balance_loss_weight=weight, output_dir=str(tmp_path / f"run{weight:g}"),
        )  # fmt: skip
        name = f"one{weight:g}"
        load_adapter(pipe, train(config).adapter_path, name)
        gates = [layer.gate for layer in router_summary(pipe, name).values()]
        sharpness.append(sum(float(len(gate) * gate.square().sum() - 1) for gate in gates) / len(gates))
    assert sharpness[1] < 0.5 * sharpness[0]


def test_balance_without_experts_is_refused(configure: Configure) -> None:
    with pytest.raises(UserError, match="no effect with --method nora: it balances the experts of mor, moe_lora"):
        check(configure(balance_loss_weight=0.1))
    check(configure(balance_loss_weight=0.0))


@pytest.mark.parametrize("top_k", [0, 2])
def test_the_modules_of_a_block_are_balanced_once(pipe: Any, top_k: int) -> None:
    add_adapter(pipe, milora(r=2, top_k=top_k), "one")
    randomize(pipe)
    layers = nora_layers(pipe.unet, "one")
    hook = BalanceLoss(SimpleNamespace(layers={("unet", k): v for k, v in layers.items()}, adapter="one"), 1.0)  # type: ignore[arg-type]
    states = torch.randn(3, 5, 16)
    with hook.around_pass(0):
        pipe.unet(torch.randn(3, 4, 8, 8), 3, states)
        penalty = hook.penalty(0)
    assert penalty is not None
    penalty.backward()
    found = {path: layer.delta("one").W_g.grad.clone() for path, layer in layers.items()}
    pipe.unet.zero_grad()
    blocks: dict[str, list[torch.Tensor]] = {}
    for path, layer in layers.items():
        blocks.setdefault(block_of(path), []).append(layer.delta("one").W_g)
    losses = []
    for rows in blocks.values():
        gates = torch.softmax(states.mean(1) @ torch.cat(rows).T, -1)
        used = torch.zeros_like(gates).scatter(1, gates.topk(top_k, 1).indices, 1 / top_k) if top_k else gates
        losses.append(len(rows) * (used.mean(0) * gates.mean(0)).sum())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(penalty.detach(), expected.detach())
    expected.backward()
    for path, layer in layers.items():
        torch.testing.assert_close(found[path], layer.delta("one").W_g.grad, atol=1e-6, rtol=1e-4)
