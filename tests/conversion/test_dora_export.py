"""A DoRA as a plain LoRA: the whole update ``m / ||W + s B A|| (W + s B A) - W``, of stated rank and measured error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from safetensors.torch import load_file
from torch import Tensor

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    load_adapter,
    open_pipeline,
    save_adapter,
)
from nora_diffusion.adapters import dora, lora, nora
from nora_diffusion.cli import main
from nora_diffusion.conversion.dora import truncated
from nora_diffusion.pipelines.components import nora_layers

COMPONENTS = ("unet", "text_encoder")
TARGETS = ["attn", "ff", "conv"]


def saved(pipe: Any, config: Any, folder: Path) -> dict[tuple[str, str], Tensor]:
    """Save a random adapter; return the whole update of each projection, by the paper's formula."""
    add_adapter(pipe, config, "one", COMPONENTS)
    randomize(pipe, "one")
    save_adapter(pipe, folder, "one")
    found = {}
    for component in COMPONENTS:
        for path, layer in nora_layers(getattr(pipe, component), "one").items():
            delta = layer.delta("one")
            down, up = (factor.detach().double() for factor in delta.pair())
            weight = layer.base_layer.weight.detach().double().flatten(1)  # type: ignore[operator]
            adapted = weight + config.scale_for(path) * up @ down
            norms = adapted.square().sum(1, keepdim=True).sqrt()
            found[component, path] = delta.m.detach().double()[:, None] / norms * adapted - weight
    delete_adapter(pipe, "one")
    return found


def read(file: Path) -> dict[tuple[str, str], Tensor]:
    """``alpha / r * up @ down`` of each projection in a kohya file, read by hand."""
    tensors, found = load_file(file), {}
    for key in (key for key in tensors if key.endswith(".lora_up.weight")):
        name = key.removesuffix(".lora_up.weight")
        up, down = tensors[key].double().flatten(1), tensors[f"{name}.lora_down.weight"].double().flatten(1)
        component = "unet" if name.startswith("lora_unet_") else "text_encoder"
        path = name.removeprefix("lora_unet_").removeprefix("lora_te_text_model_")
        found[component, path] = tensors[f"{name}.alpha"].double() / down.shape[0] * up @ down
    return found


def relative(found: dict[tuple[str, str], Tensor], expected: dict[tuple[str, str], Tensor]) -> float:
    named = {(component, path.replace(".", "_")): dw for (component, path), dw in expected.items()}
    assert found.keys() == named.keys()
    lost = sum(float((found[key] - dw).square().sum()) for key, dw in named.items())
    return (lost / sum(float(dw.square().sum()) for dw in named.values())) ** 0.5


CONFIGS = {
    "dora": lambda: dora(r=3, alpha=6.0, target_modules=TARGETS),
    "dora-attention": lambda: dora(r=2, target_modules=["attn"]),
    "dora-patterns": lambda: dora(r=2, rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 5.0}),
    "nora-magnitude": lambda: nora(r=4, inner_r=2, basis="svd", magnitude=True, target_modules=TARGETS),
    "dylora-magnitude": lambda: lora(r=3, magnitude=True, rank_mask=True, target_modules=["attn"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_kohya_export_of_a_dora_is_a_plain_lora(pipe: Any, tmp_path: Path, name: str) -> None:
    """Opened by the name in the file; every projection is within 1%, and the report states ranks and error."""
    expected = saved(pipe, CONFIGS[name](), tmp_path / "dog")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", "kohya")
    found = read(report.path)
    assert relative(found, expected) == pytest.approx(report.lost, rel=1e-3)
    assert report.lost < 0.01
    assert not [key for key in load_file(report.path) if "dora" in key]
    assert f"to {report.rank}" in report.note or f"rank {report.rank}:" in report.note
    assert f"{report.lost:.1e} at weight 1" in report.note


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_a_plain_dora_of_full_rank_gives_the_same_image(pipe: Any, tmp_path: Path, render: Any, form: Any) -> None:
    saved(pipe, dora(r=2, target_modules=TARGETS), tmp_path / "dog")
    load_adapter(pipe, tmp_path / "dog", "dog")
    expected = render(pipe)
    delete_adapter(pipe, "dog")
    target = tmp_path / ("peft" if form == "peft" else "plain.safetensors")
    report = export_lora(tmp_path / "dog", target, form, dora="plain", pipe=pipe, rank=1000)
    assert report.lost < 1e-5
    files = [report.path / component for component in COMPONENTS] if form == "peft" else [report.path]
    for number, file in enumerate(files):
        load_adapter(pipe, file, f"plain{number}")
    torch.testing.assert_close(render(pipe), expected, atol=1e-4, rtol=1e-3)


def test_a_rank_truncates_and_the_error_is_measured(pipe: Any, tmp_path: Path) -> None:
    expected = saved(pipe, dora(r=2, target_modules=["attn"]), tmp_path / "dog")
    errors = []
    for rank in (1, 4, 8, 16):
        report = export_lora(tmp_path / "dog", tmp_path / f"{rank}.safetensors", "kohya", rank=rank, pipe=pipe)
        assert report.rank <= rank
        assert relative(read(report.path), expected) == pytest.approx(report.lost, rel=1e-3, abs=1e-6)
        errors.append(report.lost)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 > 1e-4 > errors[-1]
    with pytest.raises(UserError, match="rank"):
        export_lora(tmp_path / "dog", tmp_path / "x.safetensors", "kohya", rank=0, pipe=pipe)


def test_truncation_is_the_optimum_of_eckart_and_young() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up, m = (torch.randn(shape, generator=generator).double() for shape in ((9, 7), (2, 7), (9, 2), (9,)))
    m = m.abs() + 1
    adapted = weight + up @ down
    dense = (m / adapted.norm(dim=1))[:, None] * adapted - weight
    s = torch.linalg.svdvals(dense)
    for rank in (1, 3, 7):
        a, b, exact = truncated(weight.float(), down, up, m, rank)
        assert (a.shape, b.shape) == ((rank, 7), (9, rank))
        assert float((exact() - dense).abs().max()) < 1e-5
        assert float((b @ a - dense).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-5)
    a, b, _ = truncated(weight, down, up, m, None)
    assert (b @ a - dense).norm() <= 0.01 * dense.norm()
    a, b, _ = truncated(weight, torch.zeros(2, 7).double(), up, weight.norm(dim=1), None)  # an untrained DoRA
    assert a.shape[0] == 1 and float((b @ a).abs().max()) < 1e-9


def test_the_magnitude_is_written_if_wanted_and_the_note_names_the_clients(pipe: Any, tmp_path: Path) -> None:
    saved(pipe, dora(r=2), tmp_path / "dog")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", "kohya", dora="magnitude")
    assert any(key.endswith(".dora_scale") for key in load_file(report.path))
    assert all(client in report.note for client in ("ComfyUI", "Forge", "AUTOMATIC1111", "sd-scripts"))
    report = export_lora(tmp_path / "dog", tmp_path / "two.safetensors")
    assert any("lora_magnitude_vector" in key for key in load_file(report.path))
    assert all(client in report.note for client in ("diffusers", "PEFT", "ComfyUI"))
    assert "PEFT computes" in export_lora(tmp_path / "dog", tmp_path / "peft", "peft").note


def test_what_cannot_be_exported_is_refused(pipe: Any, tiny_base: Path, tmp_path: Path) -> None:
    saved(pipe, dora(r=2), tmp_path / "dog")
    with pytest.raises(UserError, match=r"dora='x' is unknown"):
        export_lora(tmp_path / "dog", tmp_path / "x.safetensors", dora="x")  # type: ignore[arg-type]
    other = open_pipeline(tiny_base)
    for parameter in other.unet.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(UserError, match="was made for the base"):
        export_lora(tmp_path / "dog", tmp_path / "x.safetensors", "kohya", pipe=other)
    add_adapter(pipe, lora(r=2), "two")
    save_adapter(pipe, tmp_path / "lora", "two")
    with pytest.raises(UserError, match="has no magnitude: remove dora='plain'"):
        export_lora(tmp_path / "lora", tmp_path / "x.safetensors", dora="plain")
    pipe.fuse_lora()
    with pytest.raises(UserError, match="fused"):
        export_lora(tmp_path / "dog", tmp_path / "x.safetensors", "kohya", pipe=pipe)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_base_that_cannot_be_opened_is_named(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(pipe, dora(r=2), tmp_path / "dog")

    def missing(base: str) -> Any:
        raise UserError(f"no base at {base}")

    monkeypatch.setattr("nora_diffusion.conversion.dora.open_pipeline", missing)
    with pytest.raises(UserError, match="needs the weights of its base: give the base, or export the magnitude"):
        export_lora(tmp_path / "dog", tmp_path / "x.safetensors", "kohya")
    export_lora(tmp_path / "dog", tmp_path / "x.safetensors", "kohya", dora="magnitude")


def test_the_command_exports_a_dora(
    pipe: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(pipe, dora(r=2), tmp_path / "dog")
    words = ["export", str(tmp_path / "dog"), str(tmp_path / "x.safetensors"), "--format", "kohya"]
    assert main([*words, "--rank", "4"]) == 0
    assert "a DoRA as a plain LoRA of rank 4: ||dW_file - dW|| / ||dW|| =" in capsys.readouterr().out
    assert main([*words, "--base", str(tiny_base)]) == 0
    assert main([*words, "--dora", "magnitude"]) == 0
    assert "dora_scale" in capsys.readouterr().out
