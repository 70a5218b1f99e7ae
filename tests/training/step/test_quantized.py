"""A frozen base in int8: basis and file use the original weights, the adapter trains as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, assert_same_run, journal
from safetensors.torch import load_file
from torch import nn

from nora_diffusion import load_adapter, open_pipeline
from nora_diffusion.errors import UserError
from nora_diffusion.training import train
from nora_diffusion.training.many.subjects import train_subjects
from nora_diffusion.training.run import run as building
from nora_diffusion.training.run.steps import Stepper

INT8 = {"quantize_base": "int8", "gradient_checkpointing": True}


def test_it_needs_torchao_the_original_weights_and_checkpointing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="excludes DoRA's magnitude"):
        train(configure(**INT8, magnitude=True))
    with pytest.raises(UserError, match="--quantize_base needs --gradient_checkpointing"):
        train(configure(quantize_base="int8"))
    monkeypatch.setattr("nora_diffusion.training.settings.checks.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"needs the package torchao.*nora-diffusion\[quantize\]"):
        train(configure(**INT8))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Stepper]:
    """Steppers of the runs in a test."""
    pytest.importorskip("torchao")
    found: list[Stepper] = []
    original = Stepper.run_steps
    monkeypatch.setattr(Stepper, "run_steps", lambda self: (found.append(self), original(self))[1])
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_are_quantized_and_factors_are_not(
    precision: str, configure: Configure, tmp_path: Path, seen: list[Stepper]
) -> None:
    changes: dict[str, Any] = {"mixed_precision": precision, "target_modules": ["attn", "ff"], "max_train_steps": 5}
    plain = train(configure(**changes, output_dir=str(tmp_path / "plain"))).adapter_path
    small = train(configure(**changes, **INT8)).adapter_path
    model = seen[1].run.pipe.unet
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".nora_" not in name}
    true = dict(open_pipeline(str(configure().pretrained_model_name_or_path)).unet.named_parameters())
    for name, layer in linear.items():
        weight: Any = layer.weight
        assert weight.qdata.dtype == torch.int8
        whole = true[name.replace(".base_layer", "") + ".weight"]
        step = whole.abs().amax(dim=1, keepdim=True) / 127
        off = (weight.dequantize().float() - whole).abs() / step
        assert off.max() < {"no": 0.51, "bf16": 2}[precision]  # bf16 rounds the weights and their scale as well
    assert all(parameter.dtype == torch.float32 for parameter in seen[1].run.parameters.values())
    one, other = load_file(plain), load_file(small)
    frozen = [key for key in one if key.endswith("_out")]
    assert frozen and all(torch.equal(one[key], other[key]) for key in frozen)  # from the original weights
    losses = [torch.tensor([row[1] for row in journal(path.parent)]) for path in (plain, small)]
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.02 * losses[0].max()
    moved = [key for key in one if key not in frozen and one[key].any()]
    # Together: AdamW's first steps follow the signs of gradients, and those of a single small factor may be rounding.
    both = [torch.cat([factors[key].flatten() for key in moved]) for factors in (one, other)]
    assert torch.nn.functional.cosine_similarity(*both, 0) > 0.99


@pytest.mark.parametrize("method", ["nora", "mora", "mor"])
def test_the_file_fits_the_original_base_and_the_run_resumes_bit_for_bit(
    method: str, configure: Configure, tmp_path: Path, seen: list[Stepper]
) -> None:
    none = {} if method == "nora" else {"inner_rank": None, "basis": None}
    changes: dict[str, Any] = {**INT8, **none, "method": method, "validation_prompt": "a sks dog", "num_experts": None}
    whole = train(configure(**changes, output_dir=str(tmp_path / "whole"))).adapter_path
    train(configure(**changes, max_train_steps=2))
    again = train(configure(**changes, resume_from_checkpoint="latest")).adapter_path
    assert_same_run(whole.parent, again.parent, last=3)
    assert (whole.parent / "samples/step-000003-0.png").exists()
    base = open_pipeline(str(configure().pretrained_model_name_or_path))
    loaded = load_adapter(base, whole)
    assert loaded.applied == loaded.total
    with pytest.raises(UserError, match="quantize_base: 'int8' -> None"):
        train(configure(**{**changes, "quantize_base": None}, resume_from_checkpoint="latest", max_train_steps=4))


def test_several_subjects_share_a_quantized_base(
    configure: Configure, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    entries = [{"name": name, "instance_data_dir": str(photos)} for name in ("one", "two")]
    (tmp_path / "s.yaml").write_text(json.dumps(entries))
    placed: list[bool] = []
    original = building.add_new_adapter

    def add_new_adapter(config: Any, pipe: Any, *rest: Any) -> Any:
        placed.append(any(hasattr(m.weight, "qdata") for m in pipe.unet.modules() if isinstance(m, nn.Linear)))
        return original(config, pipe, *rest)

    monkeypatch.setattr(building, "add_new_adapter", add_new_adapter)
    results = train_subjects(configure(**INT8, subjects=str(tmp_path / "s.yaml"), instance_data_dir=None))
    assert len(results) == 2 and placed == [False, False]
