"""Names and metadata of exported LoRAs: those that diffusers and ComfyUI, sd-scripts and AUTOMATIC1111 look for."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from diffusers import UNet2DConditionModel
from factories import randomize
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from nora_diffusion import add_adapter, create_pack, export_lora, load_adapter, save_adapter
from nora_diffusion.adapters import nora
from nora_diffusion.conversion.lora_layouts import WRITERS, architecture
from nora_diffusion.conversion.lora_metadata import _thumbnail
from nora_diffusion.conversion.plain_pair import PlainPair
from nora_diffusion.formats.adapter_file import inspect_adapter
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.formats.foreign_names import original_name
from nora_diffusion.io import tensors
from nora_diffusion.pipelines.components import components, projections

ALL = ["attn", "ff", "proj", "conv", "linear_1", "linear_2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj"]

ENCODERS = ["text_encoder", "text_encoder_2"]


def contents(file: Path) -> tuple[set[str], dict[str, str], bytes]:
    with safe_open(file, "pt") as reader:
        keys, metadata = set(reader.keys()), reader.metadata()
    data = file.read_bytes()
    return keys, metadata, data[8 + int.from_bytes(data[:8], "little") :]


def saved(model: str, folder: Path, targets: list[str], names: list[str] | None = None) -> Any:
    pipe = tiny_pipeline(model, folder / "base")
    config = nora(r=2, inner_r=1, basis="svd", target_modules=targets)
    add_adapter(pipe, config, "one", names or list(components(pipe)))
    randomize(pipe, "one")
    save_adapter(pipe, folder / "dog", "one", info={"trigger": "sks", "license": "MIT", "instance_prompt": "a sks dog"})
    return pipe


def comfy_names(pipe: Any) -> set[str]:
    """What ComfyUI calls a LoRA's modules: a diffusers path with ``.processor`` before ``to_`` and no ``.0`` after it;
    of a text encoder, only the linear layers of its blocks."""
    found = set()
    for path in projections(pipe.unet):
        found.add("unet." + path.replace(".to_", ".processor.to_").removesuffix(".0" if ".to_out.0" in path else "!"))
    for name in ("text_encoder", "text_encoder_2"):
        paths = projections(getattr(pipe, name)) if getattr(pipe, name, None) is not None else ()
        found |= {f"{name}.text_model.{p.removeprefix('text_model.')}" for p in paths if "encoder.layers" in p}
    return found


COMFY_SUFFIXES = ("_lora.down.weight", "_lora.up.weight", ".lora.down.weight", ".lora.up.weight", ".lora_A.weight",
                  ".lora_B.weight")  # fmt: skip


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_the_diffusers_export_has_names_that_comfyui_reads(tmp_path: Path, model: str) -> None:
    pipe = saved(model, tmp_path, ALL[:8] if model == "sdxl" else ALL[:4])
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors")
    known = comfy_names(pipe)
    keys = contents(report.path)[0]
    modules = {key: next((key.removesuffix(s) for s in COMFY_SUFFIXES if key.endswith(s)), "") for key in keys}
    assert {key for key, module in modules.items() if module not in known} == set()
    assert len(keys) == 2 * len(set(modules.values())) > 20


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_what_is_exported_loads_again(tmp_path: Path, model: str, form: Any) -> None:
    saved(model, tmp_path, ALL)
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", form)
    fresh = tiny_pipeline(model, tmp_path / "fresh")
    loaded = load_adapter(fresh, report.path, "one")
    assert loaded.applied == loaded.total == report.keys


SDXL = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0":
        "input_blocks_4_1_transformer_blocks_1_attn1_to_out_0",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k": "output_blocks_2_1_transformer_blocks_0_attn2_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.1.proj_out": "output_blocks_4_1_proj_out",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
}  # fmt: skip
"""SDXL's modules under sd-scripts' names, written by hand."""


def test_names_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=8, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
        )  # fmt: skip
    paths = list(projections(unet))
    assert set(SDXL) <= set(paths)
    names = {path: original_name(path, 2, paths) for path in paths}
    assert None not in names.values() and len(set(names.values())) == len(paths)
    assert {path: str(names[path]).replace(".", "_") for path in SDXL} == SDXL


@pytest.mark.parametrize("names", [["unet"], ["unet", "text_encoder", "text_encoder_2"]])
def test_a_kohya_export_for_sdxl_names_stabilitys_blocks(tmp_path: Path, names: list[str]) -> None:
    saved("sdxl", tmp_path, ["attn"], names)
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", "kohya")
    keys, metadata, _ = contents(report.path)
    unet = [key for key in keys if key.startswith("lora_unet_")]
    assert all(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_\d+_", key) for key in unet)
    prefixes = {key.split("_text_model")[0] for key in keys if "text_model" in key}
    assert prefixes == ({"lora_te1", "lora_te2"} if len(names) > 1 else set())
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_a_kohya_export_for_sd_1_and_2_keeps_diffusers_blocks(tmp_path: Path, model: str) -> None:
    saved(model, tmp_path, ["attn"])
    keys, metadata, _ = contents(export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", "kohya").path)
    assert all(re.match(r"lora_(unet_(down|mid|up)_block|te_text_model)", key) for key in keys)
    assert not metadata["ss_base_model_version"].startswith("sdxl_")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(0\.self_attn\.out_proj|1\.mlp\.fc2)"])
def test_attentions_of_clip_g_are_whole(tmp_path: Path, targets: Any) -> None:
    """A1111 applies one only if the file has q, k, v and out: those that are not adapted are zero."""
    pipe = tiny_pipeline("sdxl", tmp_path / "base")
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd", target_modules=targets), "one", ENCODERS)
    randomize(pipe, "one")
    save_adapter(pipe, tmp_path / "dog", "one")
    tensors = load_file(export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", "kohya").path)
    update = {key: value @ tensors[key.replace("_up", "_down")] for key, value in tensors.items() if "lora_up" in key}
    found = {
        tuple(re.split("_text_model_encoder_layers_|_self_attn_|_proj", key)[:3]) for key in update if "attn" in key
    }
    adapted = ("q", "v") if isinstance(targets, list) else ("out",)
    layers = ("0", "1") if isinstance(targets, list) else ("0",)
    assert found == {("lora_te1", layer, name) for layer in layers for name in adapted} | {
        ("lora_te2", layer, name) for layer in layers for name in ("q", "k", "v", "out")
    }
    assert {key for key, value in update.items() if value.any()} == {
        key for key in update if "_mlp_" in key or any(f"_{name}_proj" in key for name in adapted)
    }
    loaded = load_adapter(tiny_pipeline("sdxl", tmp_path / "fresh"), tmp_path / "dog.safetensors", "one")
    assert loaded.applied == loaded.total == len(tensors)


def test_attentions_of_clip_h_are_whole_too(tmp_path: Path) -> None:
    one = PlainPair("text_encoder", "encoder.layers.3.self_attn.v_proj", torch.ones(2, 1024), torch.ones(1024, 2), None)
    WRITERS["kohya"](tmp_path / "x.safetensors", AdapterInfo(components={"text_encoder": {}}), [one], torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    assert {key for key in tensors if key.endswith("lora_up.weight")} == {
        f"lora_te_text_model_encoder_layers_3_self_attn_{name}_proj.lora_up.weight" for name in ("q", "k", "v", "out")
    }
    assert sum(bool(value.any()) for key, value in tensors.items() if "lora_" in key.split(".")[1]) == 2


def pair(path: str, width: int, component: str = "unet") -> PlainPair:
    return PlainPair(component, path, torch.zeros(1, width), torch.zeros(8, 1), None)


def test_the_architecture_follows_from_what_is_adapted() -> None:
    one = AdapterInfo(components={"unet": {}})
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert architecture(one, [pair(key, 768)]) == "sd1"
    assert architecture(one, [pair(key, 1024)]) == "sd2"
    assert architecture(one, [pair(key, 2048)]) == "sdxl"
    assert architecture(one, [pair(key, 32), pair("encoder.layers.0.self_attn.q_proj", 16, "text_encoder")]) == "sdxl"
    assert architecture(one, [pair(key.replace("blocks.0.attn2", "blocks.1.attn1"), 640)]) == "sdxl"
    assert architecture(one, [pair("add_embedding.linear_1", 2816)]) == "sdxl"
    named = AdapterInfo(components={"unet": {}}, base="stabilityai/stable-diffusion-xl-base-1.0")
    assert architecture(named, [pair("mid_block.resnets.0.conv1", 1280)]) == "sdxl"


def test_blocks_of_a_real_sdxl_are_counted_even_if_few_are_adapted(tmp_path: Path) -> None:
    """A LoRA of ``up_blocks.0.attentions.1`` alone (B-LoRA) shows only one layer of its block."""
    one = PlainPair("unet", "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", torch.ones(1, 640),
                    torch.ones(640, 1), None)  # fmt: skip
    WRITERS["kohya"](tmp_path / "x.safetensors", AdapterInfo(components={"unet": {}}), [one], torch.float32)
    assert contents(tmp_path / "x.safetensors")[0] == {
        f"lora_unet_output_blocks_3_1_transformer_blocks_1_attn1_to_q.{factor}"
        for factor in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_metadata_for_model_browsers(tmp_path: Path, form: Any) -> None:
    pipe = saved("sdxl", tmp_path, ["attn"], ["unet"])
    Image.new("RGB", (600, 300), (200, 30, 30)).save(tmp_path / "dog" / "preview.png")
    _, metadata, data = contents(export_lora(tmp_path / "dog", tmp_path / "My dog.safetensors", form).path)
    assert metadata["modelspec.title"] == "My dog"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.usage_hint"] == "a sks dog"
    assert metadata["modelspec.license"] == "MIT"
    assert metadata["modelspec.sai_model_spec"].startswith("1.0")
    assert metadata["modelspec.implementation"]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    kind, _, encoded = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64" and json.loads(metadata["ssmd_cover_images"]) == [encoded]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.size == (256, 128) and abs(image.getpixel((9, 9))[0] - 200) < 10  # type: ignore[index]
    if form == "kohya":
        assert metadata["ss_network_module"] == "networks.lora"
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("1", "1.0")
        assert metadata["ss_output_name"] == "My dog" and metadata["ss_v2"] == "False"
        assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
        assert "sks" in metadata["ss_tag_frequency"]
    del pipe


def test_equal_exports_are_equal_files_serialized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors itself writes metadata in random order."""
    saved("sdxl", tmp_path, ["attn"], ["unet"])
    serialized: list[int] = []
    monkeypatch.setattr(tensors, "save", lambda *args: serialized.append(1) or save(*args))
    one, two = (export_lora(tmp_path / "dog", tmp_path / f"{n}/x.safetensors", "kohya").path for n in (1, 2))
    assert Path(one).read_bytes() == Path(two).read_bytes()
    assert len(serialized) == 2


def test_thumbnails_come_from_the_preview_the_pack_or_the_last_sample(tmp_path: Path) -> None:
    saved("sdxl", tmp_path, ["attn"], ["unet"])
    folder = tmp_path / "dog"
    assert _thumbnail(inspect_adapter(folder)) == b""
    samples = folder / "samples" / "step-10"
    samples.mkdir(parents=True)
    Image.new("L", (32, 32), 200).save(samples / "0.png")
    assert _thumbnail(inspect_adapter(folder)).startswith(b"\xff\xd8\xff")
    (folder / "preview.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert _thumbnail(inspect_adapter(folder)) == b""
    Image.new("RGBA", (32, 32)).save(folder / "preview.png")
    pack = create_pack(tmp_path / "x.nora_pack.safetensors", {"dog": folder})
    assert _thumbnail(inspect_adapter(f"{pack}#dog")).startswith(b"\xff\xd8\xff")
