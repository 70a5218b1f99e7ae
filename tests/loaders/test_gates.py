"""Gate statistics of routed adapters, and their export as a plain LoRA with a fixed gate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nora_diffusion import UserError, add_adapter, delete_adapter, export_lora, save_adapter, set_adapters
from nora_diffusion.adapters import AdapterConfig, mor, nora
from nora_diffusion.adapters.presets import moe_lora
from nora_diffusion.cli import main
from nora_diffusion.loaders import list_adapters, trainable_parameters
from nora_diffusion.loaders.gates import mean_gates, router_summary
from nora_diffusion.pipelines.calibration import Calibration, short_run
from nora_diffusion.pipelines.components import nora_layers

N = 3
PROMPTS = ["a dog on the beach", "a red hat"]
MIXTURES: dict[str, Callable[[], AdapterConfig]] = {
    "mor-token": lambda: mor(r=4, num_experts=N, alpha=8.0),
    "mor-prompt+timestep": lambda: mor(r=4, num_experts=N, router="prompt+timestep", target_modules=["attn", "conv"]),
    "moe-token": lambda: moe_lora(r=2, num_experts=N),
    "moe-prompt": lambda: moe_lora(r=2, num_experts=N, router="prompt"),
}


def randomize(pipe: Any, name: str = "one") -> None:
    generator = torch.Generator().manual_seed(0)
    for key, parameter in trainable_parameters(pipe, name).items():
        size = 1.0 if key.endswith("W_g") else 0.3
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=MIXTURES, ids=str)
def mixture(request: pytest.FixtureRequest, pipe: Any) -> Any:
    add_adapter(pipe, MIXTURES[request.param](), "one", ["unet", "text_encoder"])
    randomize(pipe)
    return pipe


def softmax(logits: Tensor) -> Tensor:
    powers = (logits - logits.max(-1, keepdim=True).values).exp()
    return powers / powers.sum(-1, keepdim=True)


def record_inputs(pipe: Any, key: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A layer, the inputs of its base layer and its router's inputs, recorded over a calibration run."""
    component, path = key.split(".", 1)
    layer = nora_layers(getattr(pipe, component), "one")[path]
    delta, inputs, router_inputs = layer.delta("one"), [], []

    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        x = x.movedim(1, -1) if x.ndim == 4 else x
        inputs.append(x)
        if delta.router == "token":
            router_inputs.append(x.reshape(-1, x.shape[-1]))
        else:
            vectors = delta.router_inputs.vectors
            router_inputs.append(torch.cat([vectors[name].double() for name in delta.router.split("+")], dim=-1))

    handle = layer.base_layer.register_forward_pre_hook(hook)
    set_adapters(pipe, "one")
    short_run(pipe, Calibration(prompts=PROMPTS))
    handle.remove()
    return layer, inputs, router_inputs


def some_keys(keys: Any) -> list[str]:
    return [next(k for k in keys if k.startswith("text_encoder")), next(k for k in keys if "attn2.to_k" in k)]


def test_summary_is_the_mean_over_gates(mixture: Any) -> None:
    summaries = router_summary(mixture, "one", PROMPTS)
    assert set(summaries) == {
        f"{p}.{k}" for p in ("unet", "text_encoder") for k in nora_layers(getattr(mixture, p), "one")
    }
    for key in some_keys(summaries):
        layer, _, router_inputs = record_inputs(mixture, key)
        gates = softmax(torch.cat(router_inputs) @ layer.delta("one").W_g.detach().double().T)
        summary = summaries[key]
        torch.testing.assert_close(summary.gate.double(), gates.mean(0), atol=1e-5, rtol=1e-4)
        entropy = -sum(g * math.log(g) for row in gates.tolist() for g in row if g > 0) / len(gates)
        assert summary.entropy == pytest.approx(entropy, rel=1e-4)
        assert summary.decisions == len(gates)
        assert 0 < summary.sharpness < 1


def test_uniform_router(pipe: Any) -> None:
    add_adapter(pipe, mor(r=4, num_experts=N), "one")
    for key, parameter in trainable_parameters(pipe, "one").items():
        parameter.data.mul_(0 if key.endswith("W_g") else 1)
    for summary in router_summary(pipe, "one", PROMPTS).values():
        torch.testing.assert_close(summary.gate, torch.full((N,), 1 / N))
        assert summary.entropy == pytest.approx(math.log(N))
        assert summary.sharpness == pytest.approx(0, abs=1e-6)


def test_error_of_a_fixed_gate(mixture: Any) -> None:
    """Compare with the dense formula on the inputs of the run."""
    found = mean_gates(mixture, "one", PROMPTS)
    assert found.prompts == 2 and found.gates.keys() == found.output_error.keys() == found.change_error.keys()
    for key in some_keys(found.gates):
        layer, inputs, router_inputs = record_inputs(mixture, key)
        delta, e = layer.delta("one"), layer.delta("one").experts
        experts = [
            torch.diag(e.b[i]) @ e.B @ torch.diag(e.a[i]) @ e.A if hasattr(e, "a") else
            e.B[:, 2 * i : 2 * i + 2] @ e.A[2 * i : 2 * i + 2]
            for i in range(N)
        ]  # fmt: skip
        stack = torch.stack(experts).detach().double() * layer.states["one"].native_scale
        fixed = torch.einsum("n,noi->oi", found.gates[key].double(), stack)
        error = output = change = 0.0
        for x, c in zip(inputs, router_inputs, strict=True):
            gates = softmax(c @ delta.W_g.detach().double().T)
            gates = gates.view(*x.shape[:-1], N) if delta.router == "token" else gates.unsqueeze(1)
            dy = torch.einsum("...n,noi,...i->...o", gates, stack, x)
            base = layer.base_layer
            y = x @ base.weight.double().T + (0 if base.bias is None else base.bias.double()) + dy
            error += float((x @ fixed.T - dy).square().sum())
            output += float(y.square().sum())
            change += float(dy.square().sum())
        assert found.output_error[key] == pytest.approx(math.sqrt(error / output), rel=1e-3)
        assert found.change_error[key] == pytest.approx(math.sqrt(error / change), rel=1e-3)


def test_measuring_does_not_change_the_pipeline(mixture: Any) -> None:
    add_adapter(mixture, nora(r=4, inner_r=2, basis="svd"), "two")
    set_adapters(mixture, ["one", "two"], [0.4, 0.7])
    parameter = next(iter(trainable_parameters(mixture, "one").values()))
    parameter.requires_grad_(True)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = mixture.unet(x, 3, states).sample
        mean_gates(mixture, "one", PROMPTS)
        assert torch.equal(mixture.unet(x, 3, states).sample, before)
    assert parameter.requires_grad


def test_export_requires_a_gate_option(mixture: Any, tmp_path: Path) -> None:
    file = save_adapter(mixture, tmp_path / "one", "one")
    add_adapter(mixture, nora(r=4, inner_r=2, basis="svd"), "two")
    plain = save_adapter(mixture, tmp_path / "two", "two")
    out = tmp_path / "lora.safetensors"
    for call, word in [
        (lambda: export_lora(file, out), "gate='mean'"),
        (lambda: export_lora(file, out, gate="median", pipe=mixture), "gate='mean'"),  # type: ignore[arg-type]
        (lambda: export_lora(file, out, gate="mean"), "as pipe"),
        (lambda: export_lora(plain, out, gate="mean", pipe=mixture), "no gate"),
    ]:
        with pytest.raises(UserError, match=word):
            call()
    assert not out.exists()


@pytest.mark.parametrize("mixture", ["mor-prompt+timestep", "moe-token"], indirect=True)
def test_exported_mean_gate_in_diffusers(mixture: Any, tmp_path: Path) -> None:
    """The exported file, loaded by diffusers, equals the mixture with gates fixed at their mean."""
    file = save_adapter(mixture, tmp_path, "one")
    fixed_pipe = copy.deepcopy(mixture)
    before = list_adapters(mixture)
    report = export_lora(file, tmp_path / "lora.safetensors", gate="mean", pipe=mixture, calibration=PROMPTS)
    assert list_adapters(mixture) == before
    assert report.gates is not None and report.gates.prompts == 2
    assert 0 < max(report.gates.output_error.values()) < max(report.gates.change_error.values())
    assert "2 prompts" in report.note
    for component in ("unet", "text_encoder"):
        for path, layer in nora_layers(getattr(fixed_pipe, component), "one").items():
            delta = layer.delta("one")
            down, up = delta.pair(report.gates.gates[f"{component}.{path}"])
            dense = layer.states["one"].native_scale * (up @ down)
            layer.base_layer.weight.data += dense.detach().view_as(layer.base_layer.weight)
    set_adapters(fixed_pipe, [])
    stock = copy.deepcopy(mixture)
    delete_adapter(stock, "one")
    stock.load_lora_weights(str(report.path), adapter_name="plain")
    x, states, ids = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(
            stock.unet(x, 3, states).sample, fixed_pipe.unet(x, 3, states).sample, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(stock.text_encoder(ids)[0], fixed_pipe.text_encoder(ids)[0], atol=1e-5, rtol=1e-4)


def test_export_command(pipe: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_adapter(pipe, mor(r=2, num_experts=N, router="prompt"), "one")
    randomize(pipe)
    file, out = str(save_adapter(pipe, tmp_path, "one")), tmp_path / "lora.safetensors"
    assert main(["export", file, str(out)]) == 2
    assert "gate='mean'" in capsys.readouterr().err and not out.exists()
    words = ["--gate", "mean", "--base", str(tiny_base), "--calibration_prompts", *PROMPTS]
    assert main(["export", file, str(out), *words]) == 0
    assert "mean over 2 prompts: relative error" in capsys.readouterr().out and out.is_file()


def test_adapters_without_a_router_are_refused(pipe: Any) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
    with pytest.raises(UserError, match="has no router"):
        router_summary(pipe, "one")
    with pytest.raises(UserError, match="not in the pipeline"):
        router_summary(pipe, "ghost")
