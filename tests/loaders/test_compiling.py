"""A prepared model: no change of its adapters compiles it again, and it computes what an unprepared model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    list_adapters,
    load_adapter,
    mixed_batch,
    open_pipeline,
    prepare_for_compile,
    save_adapter,
    set_adapters,
    set_rank,
)
from nora_diffusion.adapters import AdapterConfig, NoraLayer, dora, dylora, lora, mor, nora
from nora_diffusion.loaders import trainable_parameters

BOTH = ["attn", "conv"]
KINDS: dict[str, AdapterConfig] = {
    "dog": nora(r=4, inner_r=2, basis="svd", target_modules=BOTH),
    "wolf": nora(r=4, inner_r=2, basis="svd", target_modules=BOTH),
    "cat": nora(r=4, inner_r=2, basis="svd"),
    "hat": lora(r=2, target_modules=BOTH),
    "mor": mor(r=2, num_experts=2),
    "dora": dora(r=2),
    "dylora": dylora(r=6),
}
Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters with random weights; ``dog``, ``wolf`` and ``cat`` have one basis."""
    pipe, folder = open_pipeline(tiny_base), tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        add_adapter(pipe, config, name)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=0.3)
        save_adapter(pipe, folder / name, name)
        delete_adapter(pipe, name)
    export_lora(folder / "cat", folder / "plain.safetensors")
    return folder


def output(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    x, states = x.to(pipe.unet.dtype), states.to(pipe.unet.dtype)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor(3), states, **options).sample  # type: ignore[no-any-return]


def same(pipe: Any, plain: Any, **options: Any) -> None:
    torch.testing.assert_close(output(pipe, **options), output(plain, **options), atol=1e-5, rtol=1e-5)


CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "load": lambda pipe, files: load_adapter(pipe, files / "dog", "dog"),
    "load another": lambda pipe, files: load_adapter(pipe, files / "cat", "cat", activate=False),
    "switch": lambda pipe, _: set_adapters(pipe, "cat"),
    "both": lambda pipe, _: set_adapters(pipe, ["dog", "cat"], [0.5, 1.5]),
    "load a third": lambda pipe, files: load_adapter(pipe, files / "hat", "hat", weight=0.7),
    "weights": lambda pipe, _: set_adapters(pipe, ["dog", "cat", "hat"], [0.3, -0.6, 1.1]),
    "none": lambda pipe, _: set_adapters(pipe, []),
    "diffusers": lambda pipe, _: pipe.set_adapters(["hat", "dog"], [0.2, 0.8]),
    "off": lambda pipe, _: pipe.disable_lora(),
    "on": lambda pipe, _: pipe.enable_lora(),
    "hotswap": lambda pipe, files: load_adapter(pipe, files / "wolf", "dog", hotswap=True, weight=0.9),
    "blocks": lambda pipe, _: set_adapters(pipe, ["dog", "hat"], [{"unet": {"up": 0.0, "mid": 0.5}}, 1.0]),
    "delete": lambda pipe, _: delete_adapter(pipe, "hat"),
    "delete all": lambda pipe, _: [delete_adapter(pipe, name) for name in ("dog", "cat")],
    "load again": lambda pipe, files: load_adapter(pipe, files / "cat", "again"),
}
"""Changes of the adapters, one after the other."""


def counted(graphs: list[Any], backend: str) -> Callable[..., Any]:
    """A backend of ``torch.compile`` that counts its graphs."""
    inner = torch._dynamo.lookup_backend(backend)

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return inner(graph, inputs)  # type: ignore[no-any-return]

    return counting


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "backend", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "inductor"))]
)
def test_changes_of_adapters(pipe: Any, tiny_base: Path, files: Path, backend: str | None) -> None:
    """Outputs are those of an unprepared model; one graph, without a break, serves them all."""
    plain, graphs = open_pipeline(tiny_base), list[Any]()
    prepare_for_compile(pipe, max_rank=6, target_modules=BOTH)
    if backend is not None:
        part = pipe.unet.mid_block if backend == "inductor" else pipe.unet  # inductor takes minutes for all of it
        part.compile(fullgraph=True, backend=counted(graphs, backend))
    same(pipe, plain)
    for name, change in CHANGES.items():
        change(pipe, files)
        change(plain, files)
        same(pipe, plain)
        assert len(graphs) == (backend is not None), name


def loaded(pipe: Any, files: Path, *names: str) -> Any:
    for name in names:
        load_adapter(pipe, files / name, name)
    return pipe


def test_what_no_pair_can_hold_is_added_beside_it(pipe: Any, tiny_base: Path, files: Path) -> None:
    plain = loaded(open_pipeline(tiny_base), files, "dog", "mor", "dora", "hat")
    prepare_for_compile(pipe, 6, BOTH)
    same(loaded(pipe, files, "dog", "mor", "dora", "hat"), plain)
    for names in (["mor"], ["dora", "hat"]):
        set_adapters(pipe, names)
        set_adapters(plain, names)
        same(pipe, plain)


SITUATIONS: dict[str, Change] = {
    "fused": lambda pipe: pipe.fuse_lora(adapter_names=["dog"]),
    "fused and unfused": lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora()),
    "cast": lambda pipe: pipe.to(torch.float64),
    "cast twice": lambda pipe: (pipe.to(torch.float16), pipe.to(torch.float32)),
    "training": lambda pipe: pipe.unet.train(),
    "trained": lambda pipe: trained(pipe),
}


def trained(pipe: Any) -> None:
    pipe.unet.train()
    with torch.no_grad():
        for parameter in trainable_parameters(pipe, "dog").values():
            parameter.mul_(-2)
    pipe.unet.eval()


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(pipe: Any, tiny_base: Path, files: Path, name: str) -> None:
    plain = loaded(open_pipeline(tiny_base), files, "dog", "hat")
    prepare_for_compile(loaded(pipe, files, "dog"), 6, BOTH)
    loaded(pipe, files, "hat")
    SITUATIONS[name](pipe)
    SITUATIONS[name](plain)
    same(pipe, plain)


def test_it_works_beside_the_rest(pipe: Any, tiny_base: Path, files: Path) -> None:
    """Beside a scale of the call, mixed batches, copies and an ordinary LoRA; the LoRA's removal leaves it prepared."""
    plain = loaded(open_pipeline(tiny_base), files, "dog", "hat")
    prepare_for_compile(pipe, 6, BOTH)
    loaded(pipe, files, "dog", "hat")
    same(pipe, plain, cross_attention_kwargs={"scale": 0.7})
    with mixed_batch(pipe, ["hat", None]), mixed_batch(plain, ["hat", None]):
        same(pipe, plain)
    same(copy.deepcopy(pipe), plain)
    for one in (pipe, plain):
        load_adapter(one, files / "plain.safetensors", "plain", weight=0.6)
    same(pipe, plain)
    for one in (pipe, plain):
        delete_adapter(one, "plain")
    same(pipe, plain)
    assert all(layer.nora_fixed for layer in pipe.unet.modules() if isinstance(layer, NoraLayer))


TOO_MUCH: dict[str, Callable[[Any, Path], object]] = {
    "set_adapters": lambda pipe, _: set_adapters(pipe, ["cat", "hat"]),
    "by block": lambda pipe, _: set_adapters(pipe, ["cat", "hat"], [{"unet": {"up": 0.5}}, 1.0]),
    "load": lambda pipe, files: load_adapter(pipe, files / "dog", "dog"),
    "hotswap": lambda pipe, files: load_adapter(pipe, files / "cat", "cat", hotswap=True),
    "add": lambda pipe, _: add_adapter(pipe, lora(r=2), "new"),
    "set_rank": lambda pipe, _: set_rank(pipe, "dylora", 3),
    "prepare": lambda pipe, _: prepare_for_compile(pipe, 2, BOTH),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_rank_changes_nothing(pipe: Any, files: Path, name: str) -> None:
    prepare_for_compile(pipe, 3, BOTH)
    load_adapter(pipe, files / "cat", "cat", activate=False)
    load_adapter(pipe, files / "hat", "hat")
    load_adapter(pipe, files / "dylora", "dylora", rank=1)
    before, known = output(pipe), list_adapters(pipe)
    most = 2 if name == "prepare" else 3
    with pytest.raises(UserError, match=rf"unet\.\S+: .* rank \d, but the model was prepared for {most}"):
        TOO_MUCH[name](pipe, files)
    assert list_adapters(pipe) == known
    assert torch.equal(output(pipe), before)
    assert all(layer.nora_fixed.serves for layer in pipe.unet.modules() if isinstance(layer, NoraLayer))  # type: ignore[union-attr]


def test_adapters_in_one_basis_need_its_rank(pipe: Any, files: Path) -> None:
    prepare_for_compile(pipe, 4)
    for number in range(4):
        load_adapter(pipe, files / "cat", f"cat{number}")
    with torch.no_grad():
        assert {layer.nora_fixed.rank for layer in pipe.unet.modules() if isinstance(layer, NoraLayer)} == {4}  # type: ignore[union-attr]


def test_layers_outside_are_refused(pipe: Any, files: Path) -> None:
    prepare_for_compile(pipe, 6)
    loaded(pipe, files, "cat")
    before = output(pipe)
    with pytest.raises(UserError, match=r"'dog' adapts .*conv.*, for which the UNet2DConditionModel was not prepared"):
        load_adapter(pipe, files / "dog", "dog")
    assert list_adapters(pipe) == {"unet": ["cat"]}
    assert torch.equal(output(pipe), before)


def test_the_preparation_can_be_removed(pipe: Any, files: Path) -> None:
    def kinds(model: nn.Module) -> dict[str, type]:
        return {path: type(module) for path, module in model.named_modules()}

    bare, before = kinds(pipe.unet), output(pipe)
    prepare_for_compile(pipe, 6, BOTH)
    assert torch.equal(output(pipe), before) and kinds(pipe.unet) != bare
    assert not any("nora" in key for key in pipe.unet.state_dict())
    loaded(pipe, files, "cat")
    adapted = output(pipe)
    prepare_for_compile(pipe, None)
    torch.testing.assert_close(output(pipe), adapted)
    delete_adapter(pipe, "cat")
    assert kinds(pipe.unet) == bare and torch.equal(output(pipe), before)


def test_a_lora_that_diffusers_loads_is_alone_active(tiny_base: Path, files: Path) -> None:
    pipe, plain = open_pipeline(tiny_base), open_pipeline(tiny_base)
    prepare_for_compile(pipe, 16, BOTH)
    for one in (pipe, plain):
        load_adapter(one, files / "dog", "dog")
        one.load_lora_weights(str(files / "plain.safetensors"), adapter_name="plain")
    same(pipe, plain)
