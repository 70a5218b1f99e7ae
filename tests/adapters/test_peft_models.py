"""What PEFT promises of every method, on small models: the cases of its own suite of custom models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from nora_diffusion import UserError, add_adapter, save_adapter
from nora_diffusion.adapters import (
    AdapterConfig,
    NoraLayer,
    dora,
    dylora,
    lora,
    lora_mini,
    lora_xs,
    malora,
    melora,
    moe_lora,
    mor,
    mora,
    nora,
    nora_input,
)
from nora_diffusion.adapters.config import Start


class Model(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(2, 4, 3), nn.Linear(16, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.stem(x).flatten(1))))  # type: ignore[no-any-return]


METHODS: dict[str, Callable[..., AdapterConfig]] = {
    "lora": lambda **more: lora(r=2, **more),
    "nora": lambda **more: nora(r=2, inner_r=1, basis="svd", **more),
    "nora-patterns": lambda **more: nora(
        r=2, inner_r=1, basis="svd", alpha=3, rank_pattern={"two": 1}, alpha_pattern={"one": 5.0}, **more
    ),
    "nora-inner-ranks": lambda **more: nora(r=2, inner_r=1, basis="svd", inner_rank_pattern={"one": 2}, **more),
    "nora-random": lambda **more: nora(r=2, inner_r=1, basis="orthogonal", basis_dtype="float32", **more),
    "nora-magnitude": lambda **more: nora(r=2, inner_r=1, basis="svd", magnitude=True, **more),
    "nora_input": lambda **more: nora_input(r=2, inner_r=1, basis="svd", **more),
    "lora_xs": lambda **more: lora_xs(r=2, **more),
    "lora_mini": lambda **more: lora_mini(r=2, inner_r=1, **more),
    "dora": lambda **more: dora(r=2, **more),
    "mora": lambda **more: mora(r=1, **more),
    "melora": lambda **more: melora(r=2, blocks=2, **more),
    "dylora": lambda **more: dylora(r=2, **more),
    "mor": lambda **more: mor(r=2, num_experts=3, **more),
    "moe_lora": lambda **more: moe_lora(r=1, num_experts=3, **more),
    "malora": lambda **more: malora(r=2, inner_r=1, num_experts=3, **more),
}
ROUTED = {"mor", "moe_lora", "malora"}
MERGEABLE = [name for name in METHODS if name not in ROUTED]
TARGETS = {"linear": ["one", "two"], "conv": ["stem", "two"], "pattern": ".*(stem|one)"}


def config_of(method: str, targets: str = "linear", **more: Any) -> AdapterConfig:
    return METHODS[method](target_modules=TARGETS[targets], **more)


def model_of(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "nora_delta" in name or "modules_to_save" in name:
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def adapted(config: AdapterConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = get_peft_model(model_of(dtype), config, **options)  # type: ignore[arg-type]
    randomize(model)
    return model.eval()


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "nora_delta" in name]


@torch.no_grad()
def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(inputs(dtype))  # type: ignore[no-any-return]


# Merging and unloading


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merge_and_unload_returns_the_merged_model(method: str, targets: str) -> None:
    if method == "melora" and targets != "linear":
        pytest.skip("two blocks do not divide the other layers")
    model = adapted(config_of(method, targets))
    before = output(model)
    merged = model.merge_and_unload()
    assert isinstance(merged, Model) and type(merged.one) is nn.Linear and not hasattr(merged, "peft_config")
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not torch.allclose(before, output(model_of()), atol=1e-3)
    torch.testing.assert_close(output(merged), before, atol=1e-5, rtol=1e-4)
    assert isinstance(get_peft_model(merged, config_of(method, targets)), PeftModel)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_unload_returns_the_base_bit_for_bit(method: str) -> None:
    base = adapted(config_of(method)).unload()
    found, expected = base.state_dict(), model_of().state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    assert not base._forward_pre_hooks and vars(base).keys() == vars(model_of()).keys()


@pytest.mark.parametrize("method", sorted(ROUTED))
def test_a_routed_adapter_is_not_merged_away(method: str) -> None:
    model = adapted(config_of(method))
    before = output(model)
    with pytest.raises(UserError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(output(model), before)


def test_merge_and_unload_by_name_and_safely() -> None:
    model = adapted(config_of("nora"))
    model.add_adapter("other", config_of("lora"))
    randomize(model)
    model.set_adapter("other")
    expected = output(model)
    merged = model.merge_and_unload(adapter_names=["other"], safe_merge=True)
    torch.testing.assert_close(output(merged), expected, atol=1e-5, rtol=1e-4)
    broken = adapted(config_of("lora"))
    factors(broken)[0].data.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        broken.merge_and_unload(safe_merge=True)


# Loading and dtypes


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_load_into_empty_memory(method: str, low_cpu: bool, tmp_path: Path) -> None:
    saved = adapted(config_of(method))
    saved.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(model_of(), tmp_path, low_cpu_mem_usage=low_cpu).eval()
    assert torch.equal(output(loaded), output(saved))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu)
    assert loaded.active_adapters == ["default"] and torch.equal(output(loaded), output(saved))
    loaded.set_adapter("other")
    assert torch.equal(output(loaded), output(saved))
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_factors_that_await_their_file_are_on_the_meta_device() -> None:
    base: Any = model_of()
    inject_adapter_in_model(config_of("nora"), base, low_cpu_mem_usage=True)
    assert factors(base) and all(parameter.is_meta for parameter in factors(base))
    assert not base.one.base_layer.weight.is_meta


def test_a_calibrated_basis_is_loaded_through_peft(tmp_path: Path) -> None:
    strengths = {"one": torch.rand(16), "two": torch.rand(6)}
    config = nora(r=2, inner_r=1, target_modules=["one", "two"], start=Start(strengths))
    saved = adapted(config)
    saved.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="low_cpu_mem_usage"):
        PeftModel.from_pretrained(model_of(), tmp_path)
    loaded = PeftModel.from_pretrained(model_of(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(loaded), output(saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_adapter_dtype(method: str, autocast: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = {torch.float32 if autocast else dtype}
    options = {"autocast_adapter_dtype": autocast}
    model = adapted(config_of(method), dtype, **options)
    model.add_adapter("other", config_of(method), **options)
    assert {parameter.dtype for parameter in factors(model)} == expected
    assert output(model, dtype).dtype == dtype and torch.isfinite(output(model, dtype)).all()
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded: Any = PeftModel.from_pretrained(model_of(dtype), tmp_path, low_cpu_mem_usage=low_cpu, **options).eval()
        loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu, **options)
        assert {parameter.dtype for parameter in factors(loaded)} == expected
        assert torch.equal(output(loaded, dtype), output(model, dtype))


def test_the_frozen_basis_keeps_its_bits_on_a_base_of_another_dtype(tmp_path: Path) -> None:
    adapted(config_of("nora")).save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded: Any = PeftModel.from_pretrained(model_of(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu)
        loaded.save_pretrained(tmp_path / str(low_cpu))
        one, two = (
            torch.load(folder, weights_only=True) if folder.suffix == ".bin" else _tensors(folder)
            for folder in (
                tmp_path / "adapter_model.safetensors",
                tmp_path / str(low_cpu) / "adapter_model.safetensors",
            )
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key].float(), two[key].float()) for key in one)


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


# What a layer shows


@pytest.mark.parametrize("method", METHODS)
def test_widths_and_states_of_a_layer(method: str) -> None:
    model = adapted(config_of(method), adapter_name="mine")
    layers = [module for module in model.modules() if isinstance(module, NoraLayer)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(16, 6), (6, 4)]
    r, scaling = layers[0].r, layers[0].scaling
    assert set(r) == set(scaling) == {"mine"} and "mine" in r
    model.delete_adapter("mine")
    assert not r and not scaling and "mine" not in r
    assert not model.peft_config and model.active_adapters == []
    assert torch.equal(output(model.base_model), output(model_of()))


def test_widths_of_a_convolution() -> None:
    layer = adapted(config_of("lora", "conv")).base_model.model.stem
    assert (layer.in_features, layer.out_features) == (2, 4)


@pytest.mark.parametrize("method", METHODS)
def test_deleting_the_active_adapter_activates_another(method: str) -> None:
    model = adapted(config_of(method))
    expected = output(model)
    model.add_adapter("other", config_of(method))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(output(model), expected)


def test_a_merged_adapter_is_not_deleted() -> None:
    model = adapted(config_of("nora"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")


# Modules that are trained as a whole


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save(method: str, tmp_path: Path) -> None:
    config = config_of(method, modules_to_save=["stem"])
    model = adapted(config)
    assert isinstance(model.base_model.model.stem, ModulesToSaveWrapper)
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"stem", "one", "two"}
    expected = output(model)
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded = PeftModel.from_pretrained(model_of(), tmp_path, low_cpu_mem_usage=low_cpu).eval()
        torch.testing.assert_close(output(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(output(model), output(model_of()))
    if method not in ROUTED:
        torch.testing.assert_close(output(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_modules_to_save_given_as_one_name() -> None:
    assert lora(modules_to_save="conv").modules_to_save == ["conv"]
    assert "modules_to_save" not in lora().to_dict()


@pytest.mark.parametrize("value", [3, [3], [""], {"conv": 1}, [None]])
def test_modules_to_save_of_another_type(value: Any) -> None:
    with pytest.raises(UserError, match="modules_to_save"):
        lora(modules_to_save=value)


def test_files_of_adapters_hold_no_whole_modules(pipe: Any, tmp_path: Path) -> None:
    config = nora(r=4, inner_r=2, basis="svd", modules_to_save=["conv_in"])
    with pytest.raises(UserError, match="modules_to_save"):
        add_adapter(pipe, config)
    pipe.unet.add_adapter(config)
    with pytest.raises(UserError, match="modules_to_save"):
        save_adapter(pipe, tmp_path)


# One adapter for each row


@pytest.mark.parametrize("method", METHODS)
def test_adapter_names_are_refused_where_they_would_be_wrong(method: str) -> None:
    model = adapted(config_of(method))
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 5"):
        model(inputs(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="got 1 and 5"):
        model(inputs(), adapter_names=["default"])
    if method not in ROUTED:
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            model(inputs(), adapter_names=["default"] * 5)
        model.unmerge_adapter()
    torch.testing.assert_close(model(inputs(), adapter_names=["default"] * 5), model(inputs()))


# Weighted sums


@pytest.mark.parametrize("weights", [[0.5, 1.5], [-0.5, 0.8], [1, 0]])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("method", [name for name in MERGEABLE if name not in ("dora", "nora-magnitude")])
def test_add_weighted_adapter(method: str, kind: str, weights: list[float]) -> None:
    model = adapted(config_of(method))
    model.add_adapter("other", config_of("nora-random"))
    randomize(model)
    layers = [module for module in model.modules() if isinstance(module, NoraLayer)]
    names = ["default", "other"]
    rank = {"svd_rank": 6} if kind == "svd" else {}
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind, **rank)
    assert model.active_adapters == ["default"]
    for layer in layers:
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in zip(names, weights, strict=True))
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-4)
    model.set_adapter("sum")
    assert torch.isfinite(output(model)).all() and not torch.equal(output(model), output(model_of()))
    model.delete_adapter("sum")


def test_a_weighted_adapter_of_lower_rank_is_the_best_of_that_rank() -> None:
    model = adapted(config_of("lora"))
    model.add_adapter("other", config_of("lora"))
    randomize(model)
    layer = model.base_model.model.one
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "sum", svd_rank=1)
    dense = layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
    u, s, vt = torch.linalg.svd(dense)
    torch.testing.assert_close(layer.get_delta_weight("sum"), s[0] * torch.outer(u[:, 0], vt[0]), atol=1e-5, rtol=1e-4)
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "default_rank")
    assert layer.r["default_rank"] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapters": ["default", "ghost"]}, "ghost"),
        ({"adapters": ["default"]}, "one weight for each"),
        ({"adapters": []}, "one weight for each"),
        ({"weights": [1.0, float("nan")]}, "finite number"),
        ({"weights": [1.0, 1e300]}, "finite number"),
        ({"combination_type": "ties"}, "ties"),
        ({"svd_rank": 1.5}, "svd_rank"),
        ({"adapter_name": "other"}, "exists already"),
        ({"adapters": ["default", "routed"]}, "router"),
    ],
)
def test_weighted_adapters_that_are_refused(change: dict[str, Any], message: str) -> None:
    model = adapted(config_of("lora"))
    model.add_adapter("other", config_of("nora"))
    model.add_adapter("routed", config_of("mor"))
    options = {"adapters": ["default", "other"], "weights": [1.0, 2.0], "adapter_name": "sum"}
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(**(options | change))
    assert set(model.peft_config) == {"default", "other", "routed"}
