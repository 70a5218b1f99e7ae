"""Spectra of updates against dense linear algebra, and intruder dimensions on constructed weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nora_diffusion import (
    AdapterConfig,
    UserError,
    add_adapter,
    export_lora,
    list_adapters,
    lora,
    mor,
    nora,
    open_pipeline,
    save_adapter,
)
from nora_diffusion.adapters.presets import PRESETS
from nora_diffusion.cli import main
from nora_diffusion.evaluation.spectra import count_intruders, gate_summaries, iter_spectra, spectra
from nora_diffusion.loaders import load_adapter, trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

CONFIGS: dict[str, AdapterConfig] = {
    "nora": nora(r=4, inner_r=2, basis="svd", alpha=8.0, target_modules=["attn", "conv"]),
    "nora-inner-ranks": nora(r=4, inner_r=2, basis="svd", inner_rank_pattern={"to_q": 3}),
    "lora": lora(r=2),
    "lora of full rank": lora(r=64),
    **({"dora": PRESETS["dora"](r=2)} if "dora" in PRESETS else {}),
}


def saved(base: Path, folder: Path, config: AdapterConfig, size: float = 0.3) -> Path:
    pipe: Any = open_pipeline(base)
    torch.manual_seed(0)
    add_adapter(pipe, config, "one", ("unet", "text_encoder"))
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data += size * torch.randn_like(parameter)
    save_adapter(pipe, folder, "one")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_spectra_are_those_of_the_dense_update(tiny_base: Path, tmp_path: Path, name: str) -> None:
    """``dW`` is what merging adds to the weight; its SVD is computed densely."""
    file = saved(tiny_base, tmp_path / "one", CONFIGS[name])
    found = spectra(file, intruders=True)
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, file, "one")
    layers = {
        (component, path): layer
        for component in ("unet", "text_encoder")
        for path, layer in nora_layers(getattr(pipe, component), "one").items()
    }
    assert [(s.component, s.path) for s in found] == list(layers)
    for spectrum, layer in zip(found, layers.values(), strict=True):
        before = layer.base_layer.weight.detach().clone().flatten(1)
        layer.merge()
        update = layer.base_layer.weight.detach().flatten(1) - before
        expected = torch.linalg.svdvals(update.double())
        count = len(spectrum.singular_values)
        assert spectrum.singular_values == pytest.approx(expected[:count].tolist(), rel=2e-3, abs=1e-5)
        assert expected[count:].norm() < 1e-3 * expected.norm()
        assert spectrum.relative == pytest.approx(float(update.norm() / before.norm()), rel=1e-3)
        assert spectrum.stable_rank == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-3)
        cosines = torch.linalg.svd(before)[0].T @ torch.linalg.svd(before + update)[0][:, :10]
        rank = min(before.shape)
        assert spectrum.intruders == int((cosines[:rank].abs().max(0).values < 0.5)[:rank].sum())


def test_a_mixture_is_measured_at_uniform_gates(tiny_base: Path, tmp_path: Path) -> None:
    path = saved(tiny_base, tmp_path / "one", mor(r=2, num_experts=3))
    found = {(s.component, s.path): s for s in spectra(path)}
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, path, "one")
    (name, layer), *_ = nora_layers(pipe.unet, "one").items()
    factors = {k.rpartition(".")[2]: v for k, v in layer.delta("one").state_dict().items()}
    dense = sum(torch.diag(b) @ factors["B"] @ torch.diag(a) @ factors["A"] for a, b in zip(
        factors["a"], factors["b"], strict=True)) / 3  # fmt: skip
    spectrum = found["unet", name]
    assert spectrum.mixture and spectrum.norm == pytest.approx(float(torch.as_tensor(dense).norm()), rel=1e-4)


def test_gate_summaries_leave_the_pipeline_unchanged(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    path = saved(tiny_base, tmp_path / "one", mor(r=2, num_experts=3))
    before = list(pipe.unet.state_dict())
    gates = gate_summaries(path, pipe, ["a sks dog"])
    assert set(gates) == {f"{s.component}.{s.path}" for s in spectra(path)}
    assert all(float(g.gate.sum()) == pytest.approx(1) and len(g.gate) == 3 for g in gates.values())
    assert list(pipe.unet.state_dict()) == before


def test_intruders_are_new_directions() -> None:
    """Sylvester's Hadamard matrix mixes all singular vectors of ``W`` evenly: each cosine is 1 / sqrt(16)."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
    s = torch.linspace(9, 1, 16, dtype=torch.float64)
    weight = u @ torch.diag(s) @ v
    assert count_intruders(weight, torch.zeros_like(weight)) == 0
    # Larger singular values on existing directions are no intruders, in whatever order they are sorted then.
    assert count_intruders(weight, u @ torch.diag(s * torch.rand(16, dtype=s.dtype)) @ v) == 0
    mixed = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        mixed = torch.cat([torch.cat([mixed, mixed], 1), torch.cat([mixed, -mixed], 1)])
    update = 500 * u @ (mixed[:, :2] / 4) @ torch.diag(torch.tensor([2.0, 1.0], dtype=s.dtype)) @ v[:2]
    assert count_intruders(weight, update, top=2) == 2
    assert count_intruders(weight, update, top=2, threshold=0.2) == 0


def test_an_untrained_adapter_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    for spectrum in spectra(saved(tiny_base, tmp_path / "one", CONFIGS["nora"], size=0.0), intruders=True):
        assert (spectrum.norm, spectrum.relative, spectrum.singular_values) == (0, 0, ())
        assert (spectrum.stable_rank, spectrum.intruders) == (0, 0)


def test_the_pipeline_is_left_unchanged(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    path = saved(tiny_base, tmp_path / "one", CONFIGS["nora"])
    before = list(pipe.unet.state_dict())
    steps = iter_spectra(path, pipe)
    _, count = next(steps)
    assert count > 1
    steps.close()
    assert list(pipe.unet.state_dict()) == before


def test_the_command_prints_a_table(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tiny_base, tmp_path / "one", CONFIGS["nora"])
    assert main(["inspect", str(path), "--layers", "--intruders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = [float(line.split()[2]) for line in lines if line.startswith(("unet.", "text_encoder."))]
    assert len(sizes) == len(spectra(path)) and sizes == sorted(sizes, reverse=True)
    assert main(["inspect", str(path), "--layers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert rows[0]["intruders"] is None and len(rows) == len(sizes)


def test_a_plain_lora_is_refused_with_a_remedy(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    path = saved(tiny_base, tmp_path / "one", lora(r=2))
    export_lora(path, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="import"):
        spectra(tmp_path / "plain.safetensors", pipe)
    assert not list_adapters(pipe)
