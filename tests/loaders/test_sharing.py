"""Adapters that copy the basis of another adapter instead of computing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_random_pipeline
from safetensors.torch import load_file

from nora_diffusion import (
    UserError,
    add_adapter,
    create_pack,
    delete_adapter,
    inspect_adapter,
    load_adapter,
    open_pipeline,
    save_adapter,
)
from nora_diffusion.adapters import AdapterConfig, lora, lora_mini, lora_xs, nora, nora_input
from nora_diffusion.adapters.deltas import bases as bases_module
from nora_diffusion.loaders import list_adapters, trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

COMPONENTS = ["unet", "text_encoder"]
METHODS = {
    "nora": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=["attn", "conv"]),
    "awsvd": lambda: nora(r=4, inner_r=2),
    "nora_input": lambda: nora_input(r=4, inner_r=2, basis="svd", target_modules=["attn", "conv"]),
    "inner-ranks": lambda: nora(r=4, inner_r=2, basis="svd", inner_rank_pattern={"to_q": 3, "q_proj": 1}),
    "lora_xs": lambda: lora_xs(r=4),
    "random": lambda: lora_mini(r=4, inner_r=2),
}


def save_one(pipe: Any, config: AdapterConfig, folder: Path, name: str = "one", components: Any = COMPONENTS) -> Path:
    add_adapter(pipe, config, name, components)
    file = save_adapter(pipe, folder / name, name)
    delete_adapter(pipe, name)
    return file


@pytest.mark.parametrize("method", METHODS)
def test_copied_basis_is_equal_bit_for_bit(
    method: str, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_one(pipe, METHODS[method](), tmp_path)
    torch.manual_seed(5)

    def computed(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a basis was computed")

    for kind in bases_module.BASES:
        monkeypatch.setitem(bases_module.BASES, kind, computed)
    monkeypatch.setattr("nora_diffusion.loaders.add.activation_strengths", computed)
    add_adapter(pipe, METHODS[method](), "two", COMPONENTS, basis_from=first.parent)
    assert all(p.requires_grad for p in trainable_parameters(pipe, "two").values())
    second = save_adapter(pipe, tmp_path / "two", "two")
    digest = inspect_adapter(first).basis_sha256
    assert len(digest) == 64 and inspect_adapter(second).basis_sha256 == digest
    pack = create_pack(tmp_path / "both.nora_pack.safetensors", {"one": first, "two": second})
    (basis,) = (tmp_path / "bases").iterdir()
    frozen = {key: value for key, value in load_file(first).items() if key.endswith(("nora_A_out", "nora_B_out"))}
    assert basis.stem == digest and load_file(basis).keys() == frozen.keys()
    load_adapter(pipe, f"{pack}#two", "three")
    ours, theirs = (dict(trainable_parameters(pipe, name)) for name in ("two", "three"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_one_side_of_a_basis_can_be_copied(pipe: Any, tmp_path: Path) -> None:
    """One-sided NoRA takes ``A_out`` from a NoRA; a NoRA needs both."""
    first = save_one(pipe, METHODS["nora"](), tmp_path)
    add_adapter(pipe, METHODS["nora_input"](), "two", COMPONENTS, basis_from=first)
    second = load_file(save_adapter(pipe, tmp_path / "two", "two"))
    copied = [key for key in second if key.endswith("nora_A_out")]
    assert copied and all(torch.equal(second[key], load_file(first)[key]) for key in copied)
    with pytest.raises(UserError, match="freezes fewer factors than method 'nora'"):
        add_adapter(pipe, METHODS["nora"](), "three", COMPONENTS, basis_from=tmp_path / "two")


def test_basis_computed_in_another_precision_differs(pipe: Any, tmp_path: Path) -> None:
    """This is why a basis can be copied."""
    first = save_one(pipe, METHODS["nora"](), tmp_path)
    pipe.to(torch.bfloat16)
    second = save_one(pipe, METHODS["nora"](), tmp_path, "two")
    assert inspect_adapter(first).basis_sha256 != inspect_adapter(second).basis_sha256
    with pytest.raises(UserError, match=r"has another basis than .*basis_from"):
        create_pack(tmp_path / "both.nora_pack.safetensors", {"one": first, "two": second})


@pytest.mark.parametrize(
    ("config", "components", "words"),
    [
        (nora(r=2, inner_r=2, basis="svd"), COMPONENTS, "r = 4, but this adapter would have r = 2"),
        (nora(r=4, inner_r=2, basis="awsvd"), COMPONENTS, "basis = svd, but this adapter would have basis = awsvd"),
        (nora(r=4, inner_r=2, basis="svd"), ["unet"], "only .* adapts text_encoder"),
        (nora(r=4, inner_r=2, basis="svd", target_modules=["attn", "ff"]), COMPONENTS, "only the new adapter adapts"),
        (lora(r=4), COMPONENTS, "'lora' has no frozen basis"),
    ],
)
def test_mismatched_basis_is_refused(
    config: AdapterConfig, components: list[str], words: str, pipe: Any, tmp_path: Path
) -> None:
    first = save_one(pipe, nora(r=4, inner_r=2, basis="svd"), tmp_path)
    with pytest.raises(UserError, match=words):
        add_adapter(pipe, config, "two", components, basis_from=first)
    assert not list_adapters(pipe) and not nora_layers(pipe.unet, "two")


def test_other_bases_and_adapters_without_a_basis_are_refused(pipe: Any, tmp_path: Path) -> None:
    first = save_one(pipe, nora(r=4, inner_r=2, basis="svd"), tmp_path)
    plain = save_one(pipe, lora(r=4), tmp_path, "plain")
    other = open_pipeline(tiny_random_pipeline(tmp_path / "other", seed=7))
    with pytest.raises(UserError, match="was made for"):
        add_adapter(other, nora(r=4, inner_r=2, basis="svd"), "two", COMPONENTS, basis_from=first)
    with pytest.raises(UserError, match="has no frozen basis"):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "two", COMPONENTS, basis_from=plain)
    assert not list_adapters(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("basis_dtype", ["float16", "bfloat16", "float32"])
def test_saving_returns_the_loaded_tensors(basis_dtype: str, dtype: torch.dtype, pipe: Any, tmp_path: Path) -> None:
    """fp16 cannot represent all bf16 values, nor bf16 all fp16 values."""
    config = nora(r=4, inner_r=2, basis="svd", target_modules=["attn", "conv"], basis_dtype=basis_dtype)
    first = save_one(pipe, config, tmp_path)
    pipe.to(dtype)
    load_adapter(pipe, first, "again")
    assert pipe.unet(torch.zeros(1, 4, 8, 8, dtype=dtype), 1, torch.zeros(1, 4, 16, dtype=dtype)).sample.dtype == dtype
    before, after = load_file(first), load_file(save_adapter(pipe, tmp_path / "again", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("file", "name"),
    [("nora", "adapter_nora"), ("a", "adapter_a"), ("0", "adapter_0"), ("keys", "adapter_keys"),
     ("my_lora_x", "my_lora-x"), ("my dog", "my_dog")],
)  # fmt: skip
def test_file_names_that_are_not_adapter_names(file: str, name: str, pipe: Any, tmp_path: Path) -> None:
    first = save_one(pipe, nora(r=4, inner_r=2, basis="svd"), tmp_path)
    first.parent.rename(tmp_path / file)
    assert load_adapter(pipe, tmp_path / file).name == name
