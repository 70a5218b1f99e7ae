"""A pipeline with adapters is saved as a folder that opens again, and deleting leaves no trace of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nora_diffusion import add_adapter, delete_adapter, load_adapter, load_base, save_adapter, set_adapters
from nora_diffusion.adapters import AdapterConfig, dora, dylora, lora, mor, nora
from nora_diffusion.loaders import list_adapters, set_rank, trainable_parameters
from nora_diffusion.loaders.tokens import add_tokens
from nora_diffusion.pipelines.components import components, nora_layers

CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=2, inner_r=1, basis="svd"),
    "nora-pattern": lambda: nora(r=2, inner_r=1, basis="svd", target_modules=["attn", "ff", "proj"]),
    "lora": lambda: lora(r=2),
    "dora": lambda: dora(r=2),
    "dylora": lambda: dylora(r=2),
    "mor": lambda: mor(r=2, num_experts=2),
    "mor-prompt": lambda: mor(r=2, num_experts=2, router="prompt+timestep"),
}
SAVED_WITHOUT = "without the adapters"


def adapted(folder: Path, family: str, names: list[str], config: str = "nora") -> Any:
    pipe = tiny_pipeline(family, folder / "files")
    add(pipe, "one", names, config)
    return pipe


def add(pipe: Any, name: str, names: list[str], config: str = "nora") -> None:
    add_adapter(pipe, CONFIGS[config](), name, components=names)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(pipe, name).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for key, value in module.state_dict().items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def reopened(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder)


def traces(pipe: Any) -> list[str]:
    """What adapters leave on a pipeline."""
    found = [f"pipe.{name}" for name in vars(pipe) if name == "_lora_loadable_modules"]
    for component, module in components(pipe).items():
        found += [f"{component}.{path}" for path, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
        found += [f"{component}.{path} hook" for path, m in module.named_modules() if m._forward_pre_hooks]
        found += [f"{component}.{name}" for name in ("save_pretrained", "fuse_qkv_projections") if name in vars(module)]
        found += [f"{component} flag"] if getattr(module, "_hf_peft_config_loaded", False) else []
        found += [f"{component} config"] if getattr(module, "peft_config", None) else []
    return found


@pytest.mark.parametrize(
    "family, names",
    [
        ("sd1", ["unet"]),
        ("sd1", ["text_encoder"]),
        ("sd1", ["unet", "text_encoder"]),
        ("sdxl", ["unet", "text_encoder", "text_encoder_2"]),
        ("sd3", ["transformer", "text_encoder", "text_encoder_3"]),
        ("flux", ["transformer", "text_encoder_2"]),
        ("pixart", ["transformer", "text_encoder"]),
    ],
)
def test_the_folder_opens_again_as_the_base(family: str, names: list[str], tmp_path: Path) -> None:
    base = weights(tiny_pipeline(family, tmp_path / "base"))
    pipe = adapted(tmp_path, family, names)
    live = weights(pipe)
    with pytest.warns(UserWarning, match=f"{SAVED_WITHOUT} one"):
        again = reopened(pipe, tmp_path / "saved")
    assert same(weights(again), base) and not traces(again)
    assert same(weights(pipe), live) and list_adapters(pipe) == {name: ["one"] for name in names}
    delete_adapter(pipe, "one")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*save_pretrained")
        assert same(weights(reopened(pipe, tmp_path / "later")), base)
    assert not traces(pipe)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_method_is_left_out(config: str, tmp_path: Path) -> None:
    base = weights(tiny_pipeline("sd1", tmp_path / "base"))
    pipe = adapted(tmp_path, "sd1", ["unet", "text_encoder"], config)
    assert same(weights(reopened(pipe, tmp_path / "saved")), base)


def test_fused_weights_are_saved(tmp_path: Path) -> None:
    pipe = adapted(tmp_path, "sd1", ["unet"])
    pipe.fuse_lora()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*save_pretrained")
        again = reopened(pipe, tmp_path / "saved")
    layer = next(iter(nora_layers(pipe.unet, "one").items()))
    assert torch.equal(again.unet.get_submodule(layer[0]).weight, layer[1].base_layer.weight)
    pipe.unfuse_lora()
    assert not torch.equal(again.unet.get_submodule(layer[0]).weight, layer[1].base_layer.weight)


def test_after_the_functions_of_diffusers(tmp_path: Path) -> None:
    """They delete adapters without this package's knowledge, and leave empty wrappers."""
    base = weights(tiny_pipeline("sd1", tmp_path / "base"))
    pipe = adapted(tmp_path, "sd1", ["unet", "text_encoder"])
    pipe.delete_adapters("one")
    assert same(weights(reopened(pipe, tmp_path / "deleted")), base)
    pipe = adapted(tmp_path, "sd1", ["unet", "text_encoder"])
    pipe.unload_lora_weights()
    assert same(weights(reopened(pipe, tmp_path / "unloaded")), base)
    pipe = tiny_pipeline("sd1", tmp_path / "files")
    pipe.unet.add_adapter(CONFIGS["nora"](), "one")
    pipe.text_encoder.add_adapter(CONFIGS["nora"](), "one")
    assert same(weights(reopened(pipe, tmp_path / "added")), base)


def test_new_tokens_are_left_out(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    pipe = adapted(tmp_path, "sd1", ["unet"])
    add_tokens(pipe, components(pipe), "one", {"<pet>": {"text_encoder": torch.randn(2, 16)}})
    again = reopened(pipe, tmp_path / "saved")
    assert same(weights(again), weights(base)) and len(again.tokenizer) == len(base.tokenizer) < len(pipe.tokenizer)
    again("a <pet>", num_inference_steps=1, height=16, width=16)
    assert pipe.tokenizer.convert_tokens_to_ids("<pet>") == len(base.tokenizer)


def test_options_of_save_pretrained_arrive(tmp_path: Path) -> None:
    pipe = adapted(tmp_path, "sd1", ["unet", "text_encoder"])
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=False, variant="fp16")
    names = {file.name for file in (tmp_path / "saved" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.bin"}
    assert "max_shard_size" in inspect.signature(pipe.unet.save_pretrained).parameters
    pipe.text_encoder.save_pretrained(tmp_path / "alone")
    assert not list((tmp_path / "alone").glob("adapter*"))


# Ordinary LoRAs


def lora_file(folder: Path, encoder: bool = True) -> Path:
    pipe = tiny_pipeline("sd1", folder / "files")
    for module in [pipe.unet, *([pipe.text_encoder] if encoder else [])]:
        module.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "q_proj"]), "x")
    layers = [
        get_peft_model_state_dict(module, adapter_name="x") for module in (pipe.unet, pipe.text_encoder)[: 1 + encoder]
    ]
    pipe.save_lora_weights(folder / "lora", *layers)
    return folder / "lora" / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("order", [["mine", "lora"], ["lora", "mine"]])
def test_deleting_a_lora_leaves_no_wrapper(order: list[str], tmp_path: Path) -> None:
    base = weights(tiny_pipeline("sd1", tmp_path / "base"))
    file, pipe = lora_file(tmp_path), tiny_pipeline("sd1", tmp_path / "files")
    load_adapter(pipe, file, "lora")
    add(pipe, "mine", ["unet", "text_encoder"])
    with pytest.warns(UserWarning, match=f"{SAVED_WITHOUT} lora, mine"):
        assert same(weights(reopened(pipe, tmp_path / "both")), base)
    delete_adapter(pipe, order[0])
    wrappers = {type(module) for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)}
    assert len(wrappers) == 1 and list_adapters(pipe) == {"unet": [order[1]], "text_encoder": [order[1]]}
    assert same(weights(reopened(pipe, tmp_path / "one")), base)
    delete_adapter(pipe, order[1])
    assert not traces(pipe) and same(weights(pipe), base)
    assert same(weights(reopened(pipe, tmp_path / "none")), base)


def test_a_lora_alone(tmp_path: Path) -> None:
    base = weights(tiny_pipeline("sd1", tmp_path / "base"))
    pipe = tiny_pipeline("sd1", tmp_path / "files")
    load_adapter(pipe, lora_file(tmp_path, encoder=False), "lora")
    assert same(weights(reopened(pipe, tmp_path / "live")), base)
    load_adapter(pipe, lora_file(tmp_path / "other"), "other")
    delete_adapter(pipe, "lora")
    assert same(weights(reopened(pipe, tmp_path / "other" / "live")), base)
    delete_adapter(pipe, "other")
    assert not traces(pipe) and same(weights(pipe), base)


# The functions of diffusers reach a T5


@pytest.mark.parametrize("family, encoder", [("sd3", "text_encoder_3"), ("flux", "text_encoder_2")])
def test_functions_of_diffusers_reach_a_t5(family: str, encoder: str, tmp_path: Path) -> None:
    pipe = adapted(tmp_path, family, ["transformer", encoder])
    assert pipe.get_list_adapters() == {"transformer": ["one"], encoder: ["one"]}
    layers = list(nora_layers(getattr(pipe, encoder), "one").values())
    pipe.set_adapters(["one"], [0.5])
    assert {layer.scaling["one"] for layer in layers} == {0.5}
    pipe.disable_lora()
    assert all(layer.disable_adapters for layer in layers)
    pipe.enable_lora()
    assert not any(layer.disable_adapters for layer in layers)
    pipe.fuse_lora(components=["transformer", encoder])
    assert all(layer.merged for layer in layers)
    pipe.unfuse_lora(components=["transformer", encoder])
    assert not any(layer.merged for layer in layers)
    pipe.delete_adapters("one")
    assert not any(layer.r for layer in layers)
    add(pipe, "two", [encoder])
    set_adapters(pipe, "two", 0.25)
    save_adapter(pipe, tmp_path / "two", "two")
    delete_adapter(pipe, "two")
    assert not traces(pipe)
    load_adapter(pipe, tmp_path / "two", "two", weight=0.25)
    pipe.unload_lora_weights()
    assert not any(isinstance(module, BaseTunerLayer) for module in getattr(pipe, encoder).modules())


# Hooks


@pytest.mark.parametrize("end", ["delete_adapter", "delete_adapters", "unload_lora_weights"])
def test_the_hook_of_dylora_ends_with_its_last_adapter(end: str) -> None:
    pipe = load_base()
    for name in ("one", "two"):
        add_adapter(pipe, dylora(r=2), name)
    add_adapter(pipe, lora(r=2), "plain")
    assert len(pipe.unet._forward_pre_hooks) == 1
    if end == "unload_lora_weights":
        pipe.unload_lora_weights()
    else:
        remove = (lambda name: delete_adapter(pipe, name)) if end == "delete_adapter" else pipe.delete_adapters
        remove("one")
        set_rank(pipe, "two", 1)
        assert len(pipe.unet._forward_pre_hooks) == 1
        remove("two")
    assert not pipe.unet._forward_pre_hooks
    add_adapter(pipe, dylora(r=2), "again")
    assert len(pipe.unet._forward_pre_hooks) == 1
