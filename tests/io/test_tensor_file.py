"""Tensors as they stand in a file: the same values, the same hash and the same damage as torch sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nora_diffusion import UserError
from nora_diffusion.io.tensor_file import BLOCK, RawTensor, TensorFile, raw_hash, require_finite
from nora_diffusion.io.tensors import all_finite, named_hash

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


def raw(value: torch.Tensor, tmp_path: Path) -> RawTensor:
    """A tensor, written and read."""
    save_file({"w": value}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as reader:
        return reader.raw("w")


@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_hash(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    value = torch.randint(0, 100, shape).to(dtype)
    found = raw(value, tmp_path)
    assert found.shape == shape and found.is_finite()
    assert found.tensor().dtype == dtype and found.tensor().equal(value)
    assert raw_hash({"b": found, "a": found}) == named_hash({"a": value, "b": value})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 6])
def test_what_is_not_finite(dtype: torch.dtype, place: int, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    for odd in (
        float("nan"),
        -float("nan"),
        float("inf"),
        -float("inf"),
        largest,
        -largest,
        torch.finfo(dtype).tiny / 2,
    ):
        value = torch.zeros(2 * BLOCK + 7, dtype=dtype)
        value[place] = odd
        found = raw(value, tmp_path)
        assert found.is_finite() == all_finite(value) == (abs(odd) <= largest)
    with pytest.raises(UserError, match="x: w holds NaN or infinity"):
        require_finite({"ok": raw(torch.ones(1), tmp_path), "w": raw(torch.tensor([float("nan")]), tmp_path)}, "x")


def test_rows_read_their_bytes_only(tmp_path: Path) -> None:
    value = torch.arange(40.0).view(8, 5)
    save_file({"w": value}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as reader:
        before = reader.bytes_read
        assert reader.rows("w", 2, 4).tensor().equal(value[2:4])
        assert reader.bytes_read - before == 2 * 5 * 4
        assert reader.rows("w", 8, 8).tensor().shape == (0, 5)
        with pytest.raises(UserError, match="rows 7 to 9 of w do not exist"):
            reader.rows("w", 7, 9)
