"""Hotswapping: weights are replaced in place, modules stay, and compiled models are not recompiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nora_diffusion import UserError, add_adapter, delete_adapter, export_lora, load_adapter, save_adapter, set_adapters
from nora_diffusion.adapters import AdapterConfig, dylora, mor, nora, nora_input
from nora_diffusion.loaders import trainable_parameters

COMPONENTS = ("unet", "text_encoder")


def make(pipe: Any, folder: Path, config: AdapterConfig, seed: int, components: Any = COMPONENTS, **save: Any) -> Path:
    """Save an adapter with random weights, and delete it from the pipeline."""
    torch.manual_seed(seed)
    add_adapter(pipe, config, folder.name, components)
    for parameter in trainable_parameters(pipe, folder.name).values():
        parameter.data.normal_(std=0.3)
    save_adapter(pipe, folder, folder.name, **save)
    delete_adapter(pipe, folder.name)
    return folder


def outputs(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, 3, states).sample, pipe.text_encoder(torch.arange(12).view(2, 6)).last_hidden_state


def modules(pipe: Any) -> dict[str, int]:
    return {
        f"{component}.{name}": id(m) for component in COMPONENTS for name, m in getattr(pipe, component).named_modules()
    }


def tensors(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{k}": v.clone()
        for component in COMPONENTS
        for k, v in getattr(pipe, component).state_dict().items()
    }


IN_BASIS = [preset(r=4, inner_r=2, basis="svd") for preset in (nora, nora_input)]


@pytest.mark.parametrize("kind", [*IN_BASIS, mor(r=4, num_experts=3)], ids=lambda config: config.method)
def test_hotswap_equals_loading(pipe: Any, tmp_path: Path, kind: AdapterConfig) -> None:
    dog = make(pipe, tmp_path / "dog", kind, 1, info={"trigger": "sks"})
    kind.alpha = 2.0
    cat = make(pipe, tmp_path / "cat", kind, 2, info={"trigger": "zwx"})
    load_adapter(pipe, cat, "pet", weight=0.5)
    wanted = outputs(pipe)
    delete_adapter(pipe, "pet")
    load_adapter(pipe, dog, "pet")
    before = modules(pipe)
    loaded = load_adapter(pipe, cat, "pet", hotswap=True, weight=0.5)
    assert (loaded.applied, loaded.trigger) == (loaded.total, "zwx")
    assert modules(pipe) == before
    assert all(torch.equal(a, b) for a, b in zip(outputs(pipe), wanted, strict=True))
    again = save_adapter(pipe, tmp_path / "again", "pet")  # config and description were replaced too
    assert again.read_bytes() == (cat / again.name).read_bytes()


REFUSED: dict[str, tuple[str, AdapterConfig, tuple[str, ...]]] = {
    "shape": ("the loaded one", nora(r=4, inner_r=3, basis="svd"), COMPONENTS),
    "inner ranks": ("the loaded one", nora(r=4, inner_r=2, basis="svd", inner_rank_pattern={"to_q": 1}), COMPONENTS),
    "structure": ("trained|core", mor(r=4, num_experts=3), COMPONENTS),
    "targets": (
        "different projections",
        nora(r=4, inner_r=2, basis="svd", target_modules=["to_q", "q_proj"]),
        COMPONENTS,
    ),
    "components": ("text_encoder", nora(r=4, inner_r=2, basis="svd"), ("unet",)),
    "basis": ("shares the basis", nora(r=4, inner_r=2, basis="orthogonal"), COMPONENTS),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_mismatches_are_refused_without_changes(pipe: Any, tmp_path: Path, fault: str) -> None:
    words, config, components = REFUSED[fault]
    dog = make(pipe, tmp_path / "dog", nora(r=4, inner_r=2, basis="svd"), 1)
    other = make(pipe, tmp_path / "other", config, 2, components)
    load_adapter(pipe, dog, "dog")
    load_adapter(pipe, dog, "twin")  # shares the basis
    before = tensors(pipe)
    with pytest.raises(UserError, match=words):
        load_adapter(pipe, other, "dog", hotswap=True)
    after = tensors(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(UserError, match="no adapter 'cat'"):
        load_adapter(pipe, dog, "cat", hotswap=True)
    pipe.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        load_adapter(pipe, dog, "dog", hotswap=True)


@pytest.mark.parametrize("config", IN_BASIS, ids=lambda config: config.method)
def test_shared_basis_is_in_memory_once(pipe: Any, tmp_path: Path, config: AdapterConfig) -> None:
    names = ["dog", "cat", "owl"]
    files = [make(pipe, tmp_path / name, config, i, basis="shared") for i, name in enumerate(names)]

    def frozen() -> tuple[int, int]:
        named = [n for component in COMPONENTS for n in getattr(pipe, component).named_buffers(remove_duplicate=False)]
        found = [buffer for name, buffer in named if "nora_" in name]
        return len(found), len({b.data_ptr() for b in found})

    for count, (name, file) in enumerate(zip(names, files, strict=True), start=1):
        load_adapter(pipe, file, name)
        total, distinct = frozen()
        assert total == count * distinct
    for dtype in (torch.float64, torch.float32):
        pipe.to(dtype=dtype)
        assert frozen() == (total, distinct)
    before = outputs(pipe)
    delete_adapter(pipe, "cat")
    assert frozen() == (2 * distinct, distinct)
    load_adapter(pipe, files[1], "cat")
    set_adapters(pipe, names)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs(pipe), before, strict=True))


@pytest.mark.slow
def test_nothing_is_recompiled(pipe: Any, tmp_path: Path) -> None:
    """Neither another adapter nor another weight recompiles; a trivial backend counts the graphs."""
    config = nora(r=4, inner_r=2, basis="svd")
    dog = make(pipe, tmp_path / "dog", config, 1)
    config.alpha = 6.0
    cat = make(pipe, tmp_path / "cat", config, 2)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    load_adapter(pipe, dog, "pet", weight=0.7)
    torch._dynamo.reset()
    eager = pipe.unet, pipe.text_encoder
    compiled = [torch.compile(component, backend=backend) for component in eager]

    def run(compile_them: bool) -> tuple[torch.Tensor, ...]:
        pipe.unet, pipe.text_encoder = compiled if compile_them else eager
        return outputs(pipe)

    run(True)
    count = len(graphs)
    assert count > 0
    for change in (
        lambda: load_adapter(pipe, cat, "pet", hotswap=True),
        lambda: set_adapters(pipe, "pet", 0.3),
        lambda: load_adapter(pipe, dog, "pet", hotswap=True, weight=1.4),
        lambda: set_adapters(pipe, "pet", 0.0),
    ):
        change()
        found, wanted = run(True), run(False)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
        pipe.unet, pipe.text_encoder = compiled
    assert len(graphs) == count
    run(False)
    torch._dynamo.reset()


def test_hotswap_resets_the_rank(pipe: Any, tmp_path: Path) -> None:
    dog, cat = (make(pipe, tmp_path / name, dylora(r=4), seed) for seed, name in enumerate(("dog", "cat")))
    load_adapter(pipe, cat, "pet")
    wanted = outputs(pipe)
    delete_adapter(pipe, "pet")
    load_adapter(pipe, dog, "pet", rank=1)
    load_adapter(pipe, cat, "pet", hotswap=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(pipe), wanted, strict=True))


def test_files_of_other_tools_are_not_hotswapped(pipe: Any, tmp_path: Path) -> None:
    dog = make(pipe, tmp_path / "dog", nora(r=4, inner_r=2, basis="svd"), 1)
    export_lora(dog, tmp_path / "plain.safetensors")
    load_adapter(pipe, dog, "pet")
    before = outputs(pipe)
    for option in ({"hotswap": True}, {"rank": 2}):
        with pytest.raises(UserError, match=f"{next(iter(option))} works with adapters of this toolkit only"):
            load_adapter(pipe, tmp_path / "plain.safetensors", "pet", **option)
    assert all(torch.equal(a, b) for a, b in zip(outputs(pipe), before, strict=True))


def test_loading_keeps_requires_grad_of_an_adapter_in_training(pipe: Any, tmp_path: Path) -> None:
    dog = make(pipe, tmp_path / "dog", nora(r=4, inner_r=2, basis="svd"), 1)
    export_lora(dog, tmp_path / "plain.safetensors")
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "mine")
    mine = set(map(id, trainable_parameters(pipe, "mine").values()))
    load_adapter(pipe, dog, "dog")
    load_adapter(pipe, tmp_path / "plain.safetensors", "plain")
    set_adapters(pipe, ["mine", "dog"])
    delete_adapter(pipe, "dog")
    requiring_grad = {
        id(p) for component in COMPONENTS for p in getattr(pipe, component).parameters() if p.requires_grad
    }
    assert requiring_grad & mine == mine
    assert not any(p.requires_grad for k, p in pipe.unet.named_parameters() if "lora_" in k or ".dog." in k)
