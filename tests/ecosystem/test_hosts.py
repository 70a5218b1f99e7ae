"""Copying, pickling, casting and offloading pipelines with adapters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nora_diffusion import (
    AdapterConfig,
    UserError,
    add_adapter,
    delete_adapter,
    load_adapter,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import dora, dylora, lora, mor, nora
from nora_diffusion.attention import set_adapter_processors
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

COMPONENTS = ("unet", "text_encoder")
KINDS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=4, inner_r=2, basis="svd"),
    "dora": lambda: dora(r=2),
    "dylora": lambda: dylora(r=4),
    "mor": lambda: mor(r=4, num_experts=2),
    "mor-prompt+timestep": lambda: mor(r=4, num_experts=2, router="prompt+timestep"),
}
Render = Callable[[Any], torch.Tensor]


@pytest.fixture
def add(pipe: Any) -> Callable[[str], None]:
    """``add(kind)`` adds an adapter of that method with random weights, named ``dog``."""

    def add_kind(kind: str) -> None:
        torch.manual_seed(0)
        add_adapter(pipe, KINDS[kind](), "dog", COMPONENTS)
        for parameter in trainable_parameters(pipe, "dog").values():
            parameter.data += 0.3 * torch.randn(parameter.shape)

    return add_kind


def pickled(module: torch.nn.Module) -> torch.nn.Module:
    """A module after pickling, as another process gets it."""
    content = io.BytesIO()
    torch.save(module, content)
    content.seek(0)
    received: torch.nn.Module = torch.load(content, weights_only=False)
    return received


def assert_same(kind: str, one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal bit for bit; DoRA to rounding, since on some CPUs products of tiny matrices depend on memory alignment."""
    if kind == "dora":
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(one, two)


@pytest.mark.parametrize("copy_module", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_are_independent(
    pipe: Any, render: Render, add: Callable[[str], None], kind: str, copy_module: Callable[[Any], Any]
) -> None:
    add(kind)
    here = render(pipe)
    originals = {component: getattr(pipe, component) for component in COMPONENTS}
    for component, module in originals.items():
        setattr(pipe, component, copy_module(module))
    assert_same(kind, render(pipe), here)
    set_adapters(pipe, "dog", 0.5)
    assert not torch.equal(render(pipe), here)
    for component, module in originals.items():
        setattr(pipe, component, module)
    assert torch.equal(render(pipe), here)


def test_adapters_loaded_in_inference_mode_are_usable_outside(pipe: Any, render: Render, tmp_path: Path) -> None:
    add_adapter(pipe, lora(r=2), "dog", COMPONENTS)
    save_adapter(pipe, tmp_path, "dog")
    delete_adapter(pipe, "dog")
    with torch.inference_mode():
        load_adapter(pipe, tmp_path, "cat")
        pipe.to(torch.float64).to(torch.float32)
    set_adapters(pipe, "cat", 0.5)
    load_adapter(pipe, tmp_path, "cat", hotswap=True)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.isfinite(render(pipe)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting_rounds_the_base_only(pipe: Any, add: Callable[[str], None], kind: str) -> None:
    add(kind)
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 16)
    twin = copy.deepcopy(pipe.unet)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rounded = dict(pipe.unet.named_parameters())
    cast = [name for name, value in twin.named_parameters() if rounded[name].dtype != value.dtype]
    assert cast and not any("nora_" in name for name in cast)
    with torch.no_grad():
        for name in cast:
            twin.get_parameter(name).copy_(rounded[name])
        # A layer with a hook adds the update to its output, the twin's to its weight.
        torch.testing.assert_close(pipe.unet(x, t, states).sample, twin(x, t, states).sample, atol=1e-6, rtol=1e-5)


def test_loading_after_layerwise_casting_is_refused(pipe: Any, tmp_path: Path) -> None:
    add_adapter(pipe, lora(r=2), "dog")
    save_adapter(pipe, tmp_path, "dog")
    delete_adapter(pipe, "dog")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UserError, match="before they are cast to 8 bits"):
        load_adapter(pipe, tmp_path, "dog")


def offload_sequentially(pipe: Any, _: Path) -> None:
    """What ``enable_sequential_cpu_offload`` does, which requires a GPU."""
    from accelerate import cpu_offload

    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)


def offload_leaves(pipe: Any, folder: Path) -> None:
    """Offload to disk, so that weights are absent until they are loaded, also on a CPU."""
    from diffusers.hooks import apply_group_offloading

    here = torch.device("cpu")
    for component in COMPONENTS:
        apply_group_offloading(
            getattr(pipe, component),
            here,
            here,
            offload_type="leaf_level",
            offload_to_disk_path=str(folder / component),
        )


@pytest.mark.parametrize("offload", [offload_sequentially, offload_leaves])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_layers_compute_the_same(
    pipe: Any,
    render: Render,
    add: Callable[[str], None],
    tmp_path: Path,
    kind: str,
    offload: Callable[[Any, Path], None],
) -> None:
    add(kind)
    here = render(pipe)
    offload(pipe, tmp_path)
    torch.testing.assert_close(render(pipe), here, atol=1e-5, rtol=1e-4)
    set_adapter_processors(pipe)
    torch.testing.assert_close(render(pipe), here, atol=1e-5, rtol=1e-4)


def test_group_offloading_includes_loaded_adapters(pipe: Any, render: Render, tmp_path: Path) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2), "dog")
    save_adapter(pipe, tmp_path, "dog")
    delete_adapter(pipe, "dog")
    before, here = render(pipe), torch.device("cpu")
    pipe.unet.enable_group_offload(here, here, offload_type="leaf_level")
    load_adapter(pipe, tmp_path, "dog")
    for layer in nora_layers(pipe.unet, "dog").values():
        holders = [m for m in layer.modules() if m._parameters or m._buffers]
        assert len(holders) == 3  # the projection, the outer pair, the inner pair
        assert all(m._diffusers_hook.get_hook("group_offloading") is not None for m in holders)  # type: ignore[union-attr, operator]
    delete_adapter(pipe, "dog")
    assert torch.equal(render(pipe), before)


def test_offloaded_weights_are_not_read(pipe: Any, tmp_path: Path) -> None:
    add_adapter(pipe, lora(r=2), "dog", COMPONENTS)
    save_adapter(pipe, tmp_path, "dog")
    offload_sequentially(pipe, tmp_path)
    calls = (lambda: load_adapter(pipe, tmp_path, "cat"), lambda: add_adapter(pipe, nora(r=2, inner_r=1), "cat"),
             lambda: save_adapter(pipe, tmp_path, "dog"), pipe.fuse_lora)  # fmt: skip
    for call in calls:
        with pytest.raises(UserError, match=r"offloaded layer by layer: call pipe.remove_all_hooks\(\)"):
            call()
    pipe.remove_all_hooks()
    load_adapter(pipe, tmp_path, "cat")
