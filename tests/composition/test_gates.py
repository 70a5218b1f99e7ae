"""Gates over frozen adapters (MoLE), against the formula with dense updates."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize, write_photos
from runs import assert_equal_tensors
from torch import Tensor, nn

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    inspect_adapter,
    load_adapter,
    mix_files,
    mixed_batch,
    open_pipeline,
    router_summary,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import lora, mor, mora, nora
from nora_diffusion.composition.mixing import mix_gated
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.training.gates.learn import GateConfig, learn_gates
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.settings.config import TrainConfig
from nora_diffusion.training.signals import Interrupted

CONFIGS = {
    "dog": lambda: nora(r=6, inner_r=3, alpha=3.0, basis="svd", target_modules=["attn", "conv"]),
    "cat": lambda: lora(r=2, alpha=6.0, target_modules=["attn", "ff"]),
    "toy": lambda: mora(r=1, target_modules=["attn"]),
}
WEIGHTS = {"dog": 0.5, "cat": 1.0, "toy": 2.0}


@pytest.fixture
def parts(pipe: Any, tmp_path: Path) -> list[tuple[str, float]]:
    """Three adapters of different methods, ranks and layers, as files and loaded."""
    for seed, (name, make) in enumerate(CONFIGS.items()):
        add_adapter(pipe, make(), name)
        randomize(pipe, name, seed=seed)
        info = {"trigger": f"{name}x", "class_word": name, "instance_prompt": f"a {name}x {name}"}
        save_adapter(pipe, tmp_path / name, name, info=info)
    return [(str(tmp_path / name), weight) for name, weight in WEIGHTS.items()]


def dense_parts(pipe: Any) -> dict[str, list[Tensor | None]]:
    """``w_i dW_i`` of each adapter by layer, in fp64; ``None`` where it does not adapt the layer."""
    found: dict[str, list[Tensor | None]] = {}
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        for path, layer in nora_layers(pipe.unet, name).items():
            scale = layer.states[name].native_scale
            down, up = layer.delta(name).pair()
            update = weight * scale * (up.double() @ down.double())
            found.setdefault(path, [None] * len(WEIGHTS))[number] = update.detach()
    return found


def contracted(layer: Any, x: Tensor, update: Tensor) -> Tensor:
    """``E x`` with channels last."""
    base = layer.base_layer
    if isinstance(base, nn.Linear):
        return x @ update.T
    weight = update.view(base.weight.shape)
    return nn.functional.conv2d(x, weight, None, base.stride, base.padding, base.dilation).movedim(1, -1)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("router", ["pooled_outputs", "outputs"])
def test_each_layer_has_the_gate_of_the_formula(
    pipe: Any, parts: list[tuple[str, float]], tmp_path: Path, router: Any, grad: bool
) -> None:
    """``g = softmax(w . norm(concat(E_i x)))`` with ``w`` the row of the router in the space of all outputs."""
    dense = dense_parts(pipe)
    mix_gated(parts, tmp_path / "mix", router)
    load_adapter(pipe, tmp_path / "mix", "gated")
    for name in WEIGHTS:
        delete_adapter(pipe, name)
    pipe.unet.double()
    randomize(pipe, "gated", seed=5)
    assert {name.rpartition("_")[2] for name in trainable_parameters(pipe, "gated")} == {"g"}
    layers = nora_layers(pipe.unet, "gated")
    assert layers.keys() == dense.keys()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        layer.register_forward_hook(lambda _, args, y, path=path: seen.__setitem__(path, (args[0], y)))
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 4, 8, 8), (2, 5, 16)))
    with torch.set_grad_enabled(grad):
        pipe.unet(x, 3, states)
    kernels = set()
    for path, layer in layers.items():
        entered, left = seen[path]
        delta: Any = layer.delta("gated")
        outputs = [None if update is None else contracted(layer, entered, update) for update in dense[path]]
        shape = next(y.shape for y in outputs if y is not None)
        filled = [torch.zeros(shape, dtype=torch.float64) if y is None else y for y in outputs]
        whole = torch.cat(filled, -1)
        normed = whole / whole.norm(dim=-1, keepdim=True)
        n, r = len(filled), delta.experts.r
        w = torch.zeros(n, n * shape[-1], dtype=torch.float64)  # the router, in the space of all outputs
        for i in range(n):
            columns = slice(i * r, (i + 1) * r)
            w[:, i * shape[-1] : (i + 1) * shape[-1]] = delta.W_g[:, columns] @ delta.experts.B_out[:, columns].T
        if router == "pooled_outputs":
            normed = normed.flatten(1, -2).mean(1).view(-1, *[1] * (len(shape) - 2), n * shape[-1])
        gates = torch.softmax(normed @ w.T, -1)
        dy = sum(gates[..., [i]] * y for i, y in enumerate(filled))
        expected = layer.base_layer(entered) + layer.channels_first(dy)
        torch.testing.assert_close(left, expected, atol=2e-5, rtol=1e-4)  # the file is in fp32
        kernels.add(type(layer.base_layer).__name__)
    assert kernels == {"Linear", "Conv2d"}


def test_it_starts_at_equal_shares(pipe: Any, render: Any, parts: list[tuple[str, float]], tmp_path: Path) -> None:
    report = mix_gated(parts, tmp_path / "mix", "pooled_outputs")
    mix_files([(path, weight / 3) for path, weight in parts], tmp_path / "sum", "cat")
    for name in WEIGHTS:
        delete_adapter(pipe, name)
    load_adapter(pipe, tmp_path / "sum", "sum")
    expected = render(pipe)
    delete_adapter(pipe, "sum")
    load_adapter(pipe, tmp_path / "mix", "gated")
    torch.testing.assert_close(render(pipe), expected, atol=1e-4, rtol=1e-3)
    info = report.info
    assert info.trigger == "dogx, catx, toyx" and info.method == "mole"
    assert [part["sha256"] for part in info.extra["mix"]["parts"]] == [inspect_adapter(p).sha256 for p, _ in parts]
    assert info.trained_parameters == sum(p.numel() for p in trainable_parameters(pipe, "gated").values())


def test_it_behaves_as_any_adapter(pipe: Any, render: Any, parts: list[tuple[str, float]], tmp_path: Path) -> None:
    """Weights, mixed batches, saving, fixed gates."""
    mix_gated(parts, tmp_path / "mix", "pooled_outputs")
    before = render(pipe)
    for name in WEIGHTS:
        delete_adapter(pipe, name)
    base = render(pipe)
    load_adapter(pipe, tmp_path / "mix", "gated")
    randomize(pipe, "gated", seed=3)
    image = render(pipe)
    assert not torch.equal(image, base) and not torch.equal(image, before)
    set_adapters(pipe, "gated", 0.0)
    assert torch.equal(render(pipe), base)
    set_adapters(pipe, "gated")
    with pytest.warns(UserWarning, match="stays live"):
        pipe.fuse_lora()
    assert torch.equal(render(pipe), image)
    pipe.unfuse_lora()
    add_adapter(pipe, lora(r=2), "other")
    randomize(pipe, "other", seed=9)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        alone = []
        for name in ("gated", "other"):
            set_adapters(pipe, name)
            alone.append(pipe.unet(x, 3, states).sample)
        with mixed_batch(pipe, ["gated", "other"]):
            mixed = pipe.unet(x, 3, states).sample
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), atol=1e-5, rtol=1e-4)
    summary = router_summary(pipe, "gated", ["a dog", "a cat"])
    assert all(abs(float(layer.gate.sum()) - 1) < 1e-5 and len(layer.gate) == 3 for layer in summary.values())
    save_adapter(pipe, tmp_path / "again", "gated")
    delete_adapter(pipe, "gated")
    delete_adapter(pipe, "other")
    assert torch.equal(render(pipe), base)
    load_adapter(pipe, tmp_path / "again", "gated")
    torch.testing.assert_close(render(pipe), image, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="gate='mean'"):
        export_lora(tmp_path / "again", tmp_path / "plain.safetensors")
    report = export_lora(tmp_path / "again", tmp_path / "plain.safetensors", gate="mean", pipe=pipe)
    assert report.rank > 0


@pytest.fixture
def gates(pipe: Any, parts: list[tuple[str, float]], tmp_path: Path, tiny_base: Path) -> Any:
    """``gates(**changes)``: the settings of three steps on three photos."""
    photos = write_photos(tmp_path / "photos")
    for photo in photos.iterdir():
        photo.with_suffix(".txt").write_text("a dogx dog next to a catx cat")
    training = TrainConfig(pretrained_model_name_or_path=str(tiny_base), mixed_precision="no", train_batch_size=2)

    def build(**changes: Any) -> GateConfig:
        adapters = [f"{path}:{weight}" for path, weight in parts]
        values: dict[str, Any] = {"output": str(tmp_path / "mix"), "images": str(photos), "steps": 3,
                                  "training": training}  # fmt: skip
        return GateConfig(adapters, **{**values, **changes})

    return build


@pytest.mark.parametrize("gate", ["image", "position"])
def test_only_gates_are_learned(gates: Any, parts: list[tuple[str, float]], tmp_path: Path, gate: Any) -> None:
    from safetensors.torch import load_file

    result = learn_gates(gates(gate=gate))
    one, other = load_file(result.adapter_path), load_file(tmp_path / "mix" / "parts" / "nora_adapter.safetensors")
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) != key.endswith("W_g"), key
    info = inspect_adapter(result.adapter_path)
    assert info.trigger == "dogx, catx, toyx" and info.extra["mix"]["mode"] == "gated"
    assert len(info.extra["mix"]["parts"]) == 3
    card = (tmp_path / "mix" / "README.md").read_text()
    assert "## Mixed by `gated`" in card and "| rank |" not in card and info.extra["mix"]["parts"][0]["sha256"] in card


def test_an_interrupted_run_goes_on_to_the_same_gates(
    gates: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn_gates(gates(output=str(tmp_path / "whole"))).adapter_path
    update = Updates._update

    def interrupted(self: Updates, step: int) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "_update", interrupted)
        with pytest.raises(Interrupted):
            learn_gates(gates())
    again = learn_gates(gates()).adapter_path
    assert_equal_tensors(whole, again)


def test_it_is_learned_from_prompts_and_goes_on(
    gates: Any, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nora_diffusion.pipelines.base.OTHER_STEPS", 2)
    prompts = ["a dogx dog", "dogx dog, catx cat"]
    config = gates(images=None, prompts=prompts, num=2)
    said: list[str] = []
    learn_gates(config, said.append)
    drawn = sorted((tmp_path / "mix" / "images").iterdir())
    assert [file.name for file in drawn] == [
        f"{n:03d}-{i:02d}.{kind}" for n in range(2) for i in range(2) for kind in ("png", "txt")
    ]
    assert drawn[1].read_text() == prompts[0] and "4 images were drawn" in said[0]
    before = [file.read_bytes() for file in drawn]
    said.clear()
    learn_gates(gates(images=None, prompts=prompts, num=2, steps=4), said.append)
    assert [file.read_bytes() for file in drawn] == before and "0 images were drawn" in said[0]
    with pytest.raises(UserError, match="holds gates of other adapters or another kind"):
        learn_gates(gates(images=None, prompts=prompts, num=2, gate="image"))
    with pytest.raises(UserError, match="holds images of other prompts"):
        learn_gates(gates(images=None, prompts=prompts[::-1], num=2))


def test_the_balance_loss_is_that_of_the_mean_gates(pipe: Any, parts: list[tuple[str, float]], tmp_path: Path) -> None:
    from types import SimpleNamespace

    from nora_diffusion.training.hooks.balance import GateShares

    mix_gated(parts, tmp_path / "mix", "outputs")
    load_adapter(pipe, tmp_path / "mix", "gated", activate=False)
    set_adapters(pipe, "gated")
    randomize(pipe, "gated", seed=3)
    layers = nora_layers(pipe.unet, "gated")
    gates: dict[str, Tensor] = {}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda own, args, path=path: gates.__setitem__(path, own.delta("gated").gates(args[0], own.contract))
        )
    hook = GateShares(SimpleNamespace(layers={("unet", k): v for k, v in layers.items()}, adapter="gated"), 0.5)  # type: ignore[arg-type]
    for parameter in trainable_parameters(pipe, "gated").values():
        parameter.requires_grad_(True)
    with hook.around_pass(0):
        pipe.unet(torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 16))
        penalty = hook.penalty(0)
    assert penalty is not None and penalty.requires_grad
    q = torch.stack([gate.flatten(0, -2).mean(0) for gate in gates.values()]).mean(0)
    torch.testing.assert_close(penalty, -0.5 * q.log().sum())
    penalty.backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(pipe, "gated").values())


def test_what_cannot_be_gated_is_refused(pipe: Any, parts: list[tuple[str, float]], tmp_path: Path, gates: Any) -> None:
    add_adapter(pipe, mor(r=2, num_experts=2), "routed")
    save_adapter(pipe, tmp_path / "routed", "routed")
    add_adapter(pipe, lora(r=2), "text", ("unet", "text_encoder"))
    save_adapter(pipe, tmp_path / "text", "text")
    for adapters, words in [
        (parts[:1], "give at least two"),
        ([*parts, (str(tmp_path / "routed"), 1.0)], "is a routed adapter"),
        ([*parts, (str(tmp_path / "text"), 1.0)], "change text_encoder and unet"),
        ([*parts, (str(tmp_path / "missing"), 1.0)], "missing"),
    ]:
        with pytest.raises(UserError, match=words):
            mix_gated(adapters, tmp_path / "no", "outputs")
        assert not (tmp_path / "no").exists()
    for config, words in [
        (gates(prompts=["a dog"]), "give either prompts"),
        (gates(images=None), "give either prompts"),
        (gates(gate="layer"), "gate='layer' is unknown"),
        (gates(training=TrainConfig(rank=4)), "--rank has no effect with --gates_of"),
    ]:
        with pytest.raises(UserError, match=words):
            learn_gates(config)
    mix_gated(parts, tmp_path / "mix2", "outputs")
    with pytest.raises(UserError, match="is a routed adapter"):
        mix_files([(str(tmp_path / "mix2"), 1.0), parts[0]], tmp_path / "no")


def test_a_new_adapter_has_no_frozen_experts(tiny_base: Path) -> None:
    from nora_diffusion import AdapterConfig

    config = AdapterConfig(experts="frozen", router="outputs", num_experts=2, core="none", basis="kaiming")
    with pytest.raises(UserError, match="are trained adapters"):
        add_adapter(open_pipeline(tiny_base), config, "one")
    with pytest.raises(UserError, match="frozen experts have a gate that reads their outputs"):
        AdapterConfig(experts="frozen", router="token", num_experts=2, core="none", basis="kaiming")
