"""Files of the related methods: what is stored, one file for every rank, and exports for stock tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from factories import randomize
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    load_adapter,
    save_adapter,
    set_adapters,
    set_rank,
)
from nora_diffusion.adapters import AdapterConfig, dora, dylora, lora, lora_mini, melora, mora, nora, nora_input
from nora_diffusion.cli import main
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

COMPONENTS = ("unet", "text_encoder")
EVERYTHING = ["attn", "ff", "proj", "conv"]
EXPORTED = {
    "dora": lambda: dora(r=3, alpha=6.0, target_modules=EVERYTHING),
    "nora-magnitude": lambda: nora(r=4, inner_r=2, basis="svd", magnitude=True),
    "nora_input": lambda: nora_input(r=4, inner_r=2, alpha=2.0, target_modules=EVERYTHING),
    "nora-inner-ranks": lambda: nora(
        r=4, inner_r=2, alpha=2.0, target_modules=EVERYTHING, inner_rank_pattern={"to_q": 3, "conv1": 1, "q_proj": 4}
    ),
    "lora_mini": lambda: lora_mini(r=4, inner_r=2, target_modules=EVERYTHING),
    "nora-diagonal": lambda: nora(r=4, basis="svd", core="diagonal", trained=["core", "up"]),
    "mora": lambda: mora(r=2, target_modules=EVERYTHING),
    "melora": lambda: melora(r=4, blocks=2, target_modules=EVERYTHING),
    "dylora": lambda: dylora(r=4, target_modules=EVERYTHING),
}


def saved(pipe: Any, config: AdapterConfig, folder: Path) -> Path:
    """Add an adapter with random weights, save it and leave it active."""
    torch.manual_seed(0)
    add_adapter(pipe, config, "one", COMPONENTS)
    for key, parameter in trainable_parameters(pipe, "one").items():
        noise = torch.randn_like(parameter)
        parameter.data.copy_(parameter * (1 + 0.2 * noise) if key.endswith("nora_m") else 0.3 * noise)
    return save_adapter(pipe, folder, "one")


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_the_adapter_in_stock_diffusers(pipe: Any, render: Any, tmp_path: Path, name: str) -> None:
    before = render(pipe)
    saved(pipe, EXPORTED[name](), tmp_path / "dog")
    image = render(pipe)
    assert not torch.allclose(image, before, atol=1e-3)
    delete_adapter(pipe, "one")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors")
    assert report.relative_error < 1e-6
    pipe.load_lora_weights(str(tmp_path / "dog.safetensors"), adapter_name="plain")
    torch.testing.assert_close(render(pipe), image, atol=2e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(render(pipe), before)


def test_every_format_names_the_magnitude_of_a_dora(pipe: Any, tmp_path: Path) -> None:
    saved(pipe, dora(r=3, alpha=6.0, target_modules=EVERYTHING), tmp_path / "dog")
    layers = nora_layers(pipe.unet, "one")
    linear = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    conv = "mid_block.resnets.0.conv1"
    for form, name, shapes in (
        ("diffusers", "unet.{}.lora_magnitude_vector.weight", ((16,), (1, 16, 1, 1))),
        ("kohya", "lora_unet_{}.dora_scale", ((16, 1), (16, 1, 1, 1))),
        ("peft", "base_model.model.{}.lora_magnitude_vector.weight", ((16,), (1, 16, 1, 1))),
    ):
        target = tmp_path / (form if form == "peft" else f"{form}.safetensors")
        report = export_lora(tmp_path / "dog", target, form, dora="magnitude")  # type: ignore[arg-type]
        file = report.path / "unet" / "adapter_model.safetensors" if form == "peft" else report.path
        tensors = load_file(file)
        for path, shape in zip((linear, conv), shapes, strict=True):
            m = tensors[name.format(path.replace(".", "_") if form == "kohya" else path)]
            assert m.shape == shape
            assert torch.equal(m.flatten(), layers[path].delta("one").m)
        assert ("dora_scale" if form == "kohya" else "lora_magnitude_vector") in report.note


def test_a_dora_in_peft(pipe: Any, tmp_path: Path) -> None:
    saved(pipe, dora(r=3, alpha=6.0), tmp_path / "dog")
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = pipe.unet(x, 3, states).sample
        delete_adapter(pipe, "one")
        export_lora(tmp_path / "dog", tmp_path / "peft", format="peft")
        model = PeftModel.from_pretrained(pipe.unet, tmp_path / "peft" / "unet")
        assert model.peft_config["default"].use_dora
        torch.testing.assert_close(model(x, 3, states).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_an_exported_dora_loads_with_its_magnitude(
    pipe: Any, render: Any, tmp_path: Path, form: Literal["diffusers", "kohya", "peft"]
) -> None:
    before = render(pipe)
    saved(pipe, dora(r=3, alpha=6.0, target_modules=["attn", "conv"]), tmp_path / "dog")
    image = render(pipe)
    delete_adapter(pipe, "one")
    target = tmp_path / ("peft" if form == "peft" else "dog.safetensors")
    path = export_lora(tmp_path / "dog", target, form, dora="magnitude").path
    files = [path / component for component in COMPONENTS] if form == "peft" else [path]
    for number, file in enumerate(files):
        load_adapter(pipe, file, f"plain{number}")
    torch.testing.assert_close(render(pipe), image, atol=2e-5, rtol=1e-4)
    for number, _ in enumerate(files):
        delete_adapter(pipe, f"plain{number}")
    assert torch.equal(render(pipe), before)


def test_a_dora_with_a_magnitude_per_input_channel_is_refused(pipe: Any, render: Any, tmp_path: Path) -> None:
    before = render(pipe)
    saved(pipe, dora(r=3), tmp_path / "dog")
    delete_adapter(pipe, "one")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", format="kohya", dora="magnitude")
    tensors = load_file(report.path)
    save_file({k: v.T.contiguous() if "dora" in k else v for k, v in tensors.items()}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="per input channel"):
        load_adapter(pipe, tmp_path / "old.safetensors")
    assert torch.equal(render(pipe), before)


def test_fixed_outer_factors_are_not_stored(pipe: Any, tmp_path: Path) -> None:
    file = saved(pipe, mora(r=2), tmp_path / "dog")
    tensors = load_file(file)
    assert {key.rsplit(".nora_", 1)[1] for key in tensors} == {"R"}
    assert sum(value.numel() for value in tensors.values()) == sum(
        parameter.numel() for parameter in trainable_parameters(pipe, "one").values()
    )
    with pytest.raises(UserError, match="no frozen basis"):
        save_adapter(pipe, tmp_path / "cat", "one", basis="shared")


@pytest.mark.parametrize("name", ["mora", "melora"])
def test_an_export_at_full_rank_reports_its_size(
    pipe: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(pipe, EXPORTED[name](), tmp_path / "dog")
    trained = sum(value.numel() for value in load_file(file).values())
    assert main(["export", str(tmp_path / "dog"), str(tmp_path / "plain.safetensors")]) == 0
    plain = load_file(tmp_path / "plain.safetensors")
    written = sum(value.numel() for value in plain.values())
    found = {value.shape[0] for key, value in plain.items() if key.endswith(("lora_A.weight", ".down.weight"))}
    ranks = f"{min(found)} to {max(found)}" if len(found) > 1 else str(max(found))
    assert written > trained
    assert f"full rank, {ranks}, and {written:,} parameters instead of {trained:,}" in capsys.readouterr().out


def test_one_file_serves_every_rank(pipe: Any, render: Any, tmp_path: Path) -> None:
    """Truncated at loading, later or in an export: always the plain LoRA of the first directions."""
    saved(pipe, dylora(r=4, alpha=8.0), tmp_path / "dog")
    full = render(pipe)
    factors = {path: layer.delta("one") for path, layer in nora_layers(pipe.unet, "one").items()}
    pairs = {path: (delta.A.detach().clone(), delta.B.detach().clone()) for path, delta in factors.items()}
    delete_adapter(pipe, "one")
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    for rank in (1, 3):
        load_adapter(pipe, tmp_path / "dog", "cut", rank=rank)
        image = render(pipe)
        with torch.no_grad():
            output = pipe.unet(x, 3, states).sample
        export_lora(tmp_path / "dog", tmp_path / f"{rank}.safetensors", rank=rank)
        delete_adapter(pipe, "cut")
        add_adapter(pipe, lora(r=rank, alpha=2.0 * rank), "plain")
        for path, layer in nora_layers(pipe.unet, "plain").items():
            layer.delta("plain").A.data.copy_(pairs[path][0][:rank])
            layer.delta("plain").B.data.copy_(pairs[path][1][:, :rank])
        with torch.no_grad():
            torch.testing.assert_close(pipe.unet(x, 3, states).sample, output, atol=1e-6, rtol=1e-5)
        delete_adapter(pipe, "plain")
        pipe.load_lora_weights(str(tmp_path / f"{rank}.safetensors"), adapter_name="exported")
        torch.testing.assert_close(render(pipe), image, atol=2e-5, rtol=1e-4)
        pipe.unload_lora_weights()
    load_adapter(pipe, tmp_path / "dog", "one")
    set_rank(pipe, "one", 3)
    torch.testing.assert_close(render(pipe), image, atol=1e-5, rtol=1e-5)
    file = save_adapter(pipe, tmp_path / "again", "one")
    assert load_file(file).keys() == load_file(tmp_path / "dog" / file.name).keys()
    pipe.fuse_lora()
    torch.testing.assert_close(render(pipe), image, atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="unfuse_lora"):
        set_rank(pipe, "one", 2)
    pipe.unfuse_lora()
    set_rank(pipe, "one")
    torch.testing.assert_close(render(pipe), full, atol=1e-5, rtol=1e-5)


def test_invalid_ranks_are_refused(pipe: Any, render: Any, tmp_path: Path) -> None:
    saved(pipe, dylora(r=4), tmp_path / "dog")
    for rank in (0, 5):
        with pytest.raises(UserError, match="choose 1 to 4"):
            set_rank(pipe, "one", rank)
        with pytest.raises(UserError, match="choose 1 to 4"):
            export_lora(tmp_path / "dog", tmp_path / "x.safetensors", rank=rank)
    delete_adapter(pipe, "one")
    before = render(pipe)
    with pytest.raises(UserError, match="choose 1 to 4"):
        load_adapter(pipe, tmp_path / "dog", rank=5)
    assert torch.equal(render(pipe), before)
    add_adapter(pipe, lora(r=4), "plain")
    with pytest.raises(UserError, match="only an adapter with a rank mask"):
        set_rank(pipe, "plain", 2)
    with pytest.raises(UserError, match="ghost"):
        set_rank(pipe, "ghost", 2)


def test_ranks_are_sampled_while_the_whole_model_trains(pipe: Any) -> None:
    add_adapter(pipe, dylora(r=4), "one")
    add_adapter(pipe, dylora(r=2), "two")
    set_adapters(pipe, ["one", "two"])
    pipe.unet.train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16))
        ranks = [
            {layer.delta(name).sampled_rank for layer in nora_layers(pipe.unet, name).values()}
            for name in ("one", "two")
        ]
        assert [len(group) for group in ranks] == [1, 1]
        seen |= ranks[0]
    assert seen == {1, 2, 3, 4}


def test_a_dora_and_an_ordinary_lora_fuse_together(pipe: Any, tmp_path: Path) -> None:
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    saved(pipe, dora(r=3), tmp_path / "dog")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "plain")
    set_adapters(pipe, ["one", "plain"], [0.6, 1.0])
    with torch.no_grad():
        live = pipe.unet(x, 3, states).sample
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=2e-6, rtol=1e-5)
        pipe.unfuse_lora()
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=2e-6, rtol=1e-5)


def test_a_dora_rescales_only_the_base_weight_while_a_lora_is_fused(pipe: Any) -> None:
    """Live, fused after the LoRA, and again after unfusing: always the sum of both updates."""
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    add_adapter(pipe, dora(r=3, target_modules=["to_q", "conv1"]), "one")
    randomize(pipe)
    lora_config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(lora_config, "plain")
    set_adapters(pipe, ["one", "plain"], [0.6, 1.0])
    with torch.no_grad():
        live = pipe.unet(x, 3, states).sample
        for _ in range(2):
            pipe.fuse_lora(adapter_names=["plain"])
            torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=2e-6, rtol=1e-5)
            pipe.fuse_lora(adapter_names=["one"])
            torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=2e-6, rtol=1e-5)
            pipe.unfuse_lora()
            torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=2e-6, rtol=1e-5)


def test_fusing_a_dora_and_a_lora_on_a_text_encoder_is_refused(pipe: Any) -> None:
    """diffusers fuses a text encoder's LoRA first, so the DoRA would rescale it too."""
    add_adapter(pipe, dora(r=3), "one", ("unet", "text_encoder"))
    randomize(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "plain")
    set_adapters(pipe, ["one", "plain"])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        live = pipe.text_encoder(ids)[0]
        with pytest.raises(UserError, match="magnitude"):
            pipe.fuse_lora(components=["unet", "text_encoder"])
        pipe.unfuse_lora()
        torch.testing.assert_close(pipe.text_encoder(ids)[0], live, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dora_fuses_in_half_precision_and_is_removed_exactly(pipe: Any, dtype: torch.dtype) -> None:
    pipe.to(dtype=dtype)
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    add_adapter(pipe, dora(r=2), "one")
    x, states = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 5, 16, dtype=dtype)
    randomize(pipe)
    with torch.no_grad():
        live = pipe.unet(x, 3, states).sample
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, live, atol=0.1, rtol=0.1)
        pipe.unfuse_lora()
    delete_adapter(pipe, "one")
    assert all(torch.equal(value, weights[key]) for key, value in pipe.unet.state_dict().items())
