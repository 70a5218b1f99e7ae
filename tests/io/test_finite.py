"""No file is written that no loader accepts: values beyond the dtype are refused on every way to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nora_diffusion import UserError, add_adapter, export_lora, inspect_adapter, load_adapter, save_adapter
from nora_diffusion.adapters.presets import dora, lora, nora
from nora_diffusion.formats.pack_writing import create_pack
from nora_diffusion.io.tensors import file_bytes
from nora_diffusion.loaders import trainable_parameters

BEYOND = 65520.0
"""The smallest value that fp16 rounds to infinity."""
SENTENCE = r"cannot write .*safetensors: \S+ has values beyond 65504, the largest of fp16: save it as bf16 or fp32"


def with_value(pipe: Any, value: float, config: Any) -> str:
    """Add an adapter with ``value`` in one factor, for which a plain LoRA has it too; return its key."""
    add_adapter(pipe, config, "big")
    parameters = trainable_parameters(pipe, "big")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
        key = next(key for key in parameters if key.endswith((".nora_B", ".nora_B_in")))
        parameters[key][0, 0] = value
    return key


@pytest.mark.parametrize("config", [lora(4), nora(4, 2, basis="svd"), dora(4)], ids=["lora", "nora", "dora"])
@pytest.mark.parametrize("basis", ["own", "shared"])
def test_an_adapter_beyond_fp16(config: Any, basis: Any, pipe: Any, tmp_path: Path) -> None:
    if basis == "shared" and not config.frozen_outer:
        pytest.skip("it has no basis")
    key = with_value(pipe, BEYOND, config)
    with pytest.raises(UserError, match=SENTENCE) as refused:
        save_adapter(pipe, tmp_path / "big", "big", dtype="fp16", basis=basis)
    assert key in str(refused.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for dtype in ("bf16", "fp32", None):
        saved = save_adapter(pipe, tmp_path / f"{dtype}", "big", dtype=dtype, basis=basis)
        load_adapter(pipe, saved, f"as-{dtype}")
    assert load_file(tmp_path / "fp32/nora_adapter.safetensors")[key][0, 0] == BEYOND


def test_the_largest_value_of_fp16_is_saved(pipe: Any, tmp_path: Path) -> None:
    key = with_value(pipe, 65519.0, lora(4))
    assert load_file(save_adapter(pipe, tmp_path, "big", dtype="fp16"))[key][0, 0] == 65504


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_is_not_finite(value: float, pipe: Any, tmp_path: Path) -> None:
    key = with_value(pipe, value, lora(4))
    with pytest.raises(UserError, match=f"{key} holds NaN or infinity: train with a lower learning rate"):
        save_adapter(pipe, tmp_path / "big", "big")
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_an_export_beyond_fp16(format: Any, pipe: Any, tmp_path: Path) -> None:
    with_value(pipe, BEYOND, lora(4))
    saved = save_adapter(pipe, tmp_path / "adapter", "big")
    target = tmp_path / "export" / ("" if format == "peft" else "lora.safetensors")
    with pytest.raises(UserError, match=SENTENCE):
        export_lora(saved, target, format, "fp16")
    assert not [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    export_lora(saved, target, format, "bf16")


def test_a_pack_and_what_comes_out_of_it(pipe: Any, tmp_path: Path) -> None:
    """A file of another program, which was written with infinity, is not packed."""
    with_value(pipe, 2.0, nora(4, 2, basis="svd"))
    saved = save_adapter(pipe, tmp_path / "good", "big", dtype="fp16")
    tensors, info = load_file(saved), inspect_adapter(saved)
    key = next(key for key in tensors if key.endswith(".nora_B_in"))
    tensors[key][0, 0] = BEYOND  # infinity
    from nora_diffusion.formats.adapter_info import dump_info

    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad/nora_adapter.safetensors", {"nora": dump_info(info)})
    with pytest.raises(UserError, match="holds NaN or infinity"):
        create_pack(tmp_path / "zoo.nora_pack.safetensors", [tmp_path / "bad"])


VALUES: dict[str, tuple[Callable[[], torch.Tensor], bool]] = {
    "fp16": (lambda: torch.tensor([65504.0]).half(), True),
    "fp16, too large": (lambda: torch.tensor([1e5]).half(), False),
    "bf16, too large": (lambda: torch.tensor([3.4e38]).bfloat16(), False),
    "bf16": (lambda: torch.tensor([1e38]).bfloat16(), True),
    "negative": (lambda: torch.tensor([0.0, -7e4]).half(), False),
    "fp64 to fp32": (lambda: torch.tensor([1e39], dtype=torch.float64).float(), False),
    "NaN in fp16": (lambda: torch.tensor([float("nan")]).half(), False),
    "empty": (lambda: torch.zeros(0, 4), True),
    "whole numbers": (lambda: torch.tensor([2**62]), True),
    "not contiguous": (lambda: torch.ones(3, 4).T, True),
}


@pytest.mark.parametrize(("make", "fits"), VALUES.values(), ids=VALUES.keys())
def test_values(make: Callable[[], torch.Tensor], fits: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if not fits:
        with pytest.raises(UserError, match=f"cannot write {path}: w h"):
            file_bytes(path, {"w": make()}, {})
    else:
        path.write_bytes(file_bytes(path, {"w": make()}, {}))
        assert load_file(path)["w"].equal(make())
