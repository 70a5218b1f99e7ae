"""Files of other tools as they are found: other dtypes, layers outside the blocks, whole updates, lost settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from safetensors.torch import save_file
from torch import Tensor

from nora_diffusion import UserError, delete_adapter, inspect_adapter, load_adapter
from nora_diffusion.conversion.import_lora import import_lora
from nora_diffusion.formats.foreign_updates import dense_updates
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import list_adapters
from nora_diffusion.pipelines.components import components, projections

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"
DOWN, UP = (
    torch.randn(2, 16, generator=torch.Generator().manual_seed(0)),
    torch.randn(16, 2, generator=torch.Generator().manual_seed(1)),
)
PAIR = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}
Sizes = dict[str, tuple[int, ...]]


def write(file: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, file)
    return file


def check(pipe: Any, file: Path, expected: dict[tuple[str, str], Tensor]) -> None:
    """The loaded adapter and the dense updates have these values, and nothing is left after deleting."""
    with TensorFile(file) as reader:
        found = {(c, p): dense for c, p, dense in dense_updates(components(pipe), reader)}
    assert found.keys() == expected.keys()
    loaded = load_adapter(pipe, file, "one")
    assert loaded.applied == loaded.total
    for (component, path), dense in expected.items():
        torch.testing.assert_close(found[component, path].float(), dense.flatten(1), rtol=1e-3, atol=1e-4)
        delta = getattr(pipe, component).get_submodule(path).get_delta_weight("one")
        torch.testing.assert_close(delta.flatten(1).float(), dense.flatten(1), rtol=1e-3, atol=1e-4)
    delete_adapter(pipe, "one")
    assert list_adapters(pipe) == {}


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.ones(1, 1, dtype=torch.bfloat16),
        torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0).to(torch.float8_e4m3fn),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}",
)  # fmt: skip
def test_alphas_in_any_dtype(pipe: Any, tmp_path: Path, alpha: Tensor) -> None:
    check(pipe, write(tmp_path / "x.safetensors", PAIR | {f"{KOHYA}.alpha": alpha}), {("unet", QUERY): UP @ DOWN / 2})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_8_bits(pipe: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {key: value.to(dtype) for key, value in PAIR.items()}
    down, up = (value.float() for value in tensors.values())
    check(pipe, write(tmp_path / "x.safetensors", tensors), {("unet", QUERY): up @ down})
    for odd in (float("nan"), -float("nan"), *([float("inf")] if dtype == torch.float8_e5m2 else [])):
        damaged = down.clone()
        damaged[1, 3] = odd
        with pytest.raises(UserError, match=r"lora_down.weight holds NaN or infinity"):
            load_adapter(
                pipe, write(tmp_path / "x.safetensors", tensors | {f"{KOHYA}.lora_down.weight": damaged.to(dtype)})
            )
    write(tmp_path / "x.safetensors", PAIR | {f"{KOHYA}.lora_up.weight": UP.long()})
    with pytest.raises(UserError, match=r"lora_up.weight has the dtype I64, which is not a float dtype"):
        inspect_adapter(tmp_path / "x.safetensors")


CONFIGS: dict[str, tuple[str | None, str]] = {
    "missing": (None, "its scale is unknown"),
    "no alpha": ('{"r": 2}', "its scale is unknown"),
    "another rank": ('{"r": 3, "lora_alpha": 2}', "settings are for rank 3, but the factors of .* have rank 2"),
    "another rank in a pattern": ('{"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 4}}', "settings are for rank 4"),
    "too large": (f'{{"r": 2, "lora_alpha": 2, "x": "{"x" * 2**20}"}}', "larger than 1 MiB"),
    "a key twice": ('{"r": 2, "lora_alpha": 2, "r": 2}', "a key occurs twice"),
    "not UTF-8": ("\udcff", "LoRA settings are damaged"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_scale_that_is_unknown_is_not_guessed(pipe: Any, tmp_path: Path, name: str) -> None:
    """Without its config, a PEFT file would act at another strength."""
    text, message = CONFIGS[name]
    keys = (f"base_model.model.{QUERY}.lora_A.weight", f"base_model.model.{QUERY}.lora_B.weight")
    file = write(tmp_path / "adapter_model.safetensors", dict(zip(keys, PAIR.values(), strict=True)))
    if text is not None:
        (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    for verb in (lambda: load_adapter(pipe, file, "one"), lambda: import_lora(pipe, file, tmp_path / "imported")):
        with pytest.raises(UserError, match=message) as error:
            verb()
        assert str(file) in str(error.value)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    check(pipe, file, {("unet", QUERY): 3 * UP @ DOWN})


def test_the_config_of_a_peft_file_on_the_hub_is_fetched(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    cache.mkdir()
    keys = (f"base_model.model.{QUERY}.lora_A.weight", f"base_model.model.{QUERY}.lora_B.weight")
    write(remote / "adapter_model.safetensors", dict(zip(keys, PAIR.values(), strict=True)))
    (remote / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))

    def download(repository: str, file: str) -> str:
        if not (remote / file).is_file():
            raise EntryNotFoundError(f"404: {file}")
        return str(shutil.copy(remote / file, cache / file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_adapter(pipe, "somebody/dog", "one")
    torch.testing.assert_close(pipe.unet.get_submodule(QUERY).get_delta_weight("one"), 4 * UP @ DOWN)


OTHERS = {
    "oft_blocks": "an OFT adapter", "oft_diag": "an OFT adapter", "boft_R": "a BOFT adapter", "a1.weight": "a GLoRA",
    "w_norm": "the trained weights", "b_norm": "normalization", "diff_b": "a bias", "bias_values": "a trained bias",
    "lora_up.bias": "a trained bias", "on_input": "an IA3 adapter", "weird": "no known",
}  # fmt: skip


@pytest.mark.parametrize("ending", OTHERS)
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_not_read_is_named(tmp_path: Path, ending: str, alone: bool) -> None:
    """Also where all keys begin with ``lora_``, as LyCORIS calls every kind."""
    file = write(tmp_path / "x.safetensors", ({} if alone else PAIR) | {f"{KOHYA}2.{ending}": torch.ones(4, 4)})
    with pytest.raises(UserError, match=rf"belongs to .*{OTHERS[ending]}.*: load the file with the tool that made it"):
        inspect_adapter(file)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_whole_updates_are_imported(pipe: Any, tmp_path: Path, prefix: str) -> None:
    """LyCORIS' "full", which no library loads. Its alpha, if there is one, has no effect."""
    name = prefix + (QUERY.replace(".", "_") if prefix == "lora_unet_" else QUERY)
    dense = torch.randn(16, 16)
    file = write(tmp_path / "x.safetensors", {f"{name}.diff": dense, f"{name}.alpha": torch.tensor(3.0)})
    assert inspect_adapter(file).kind.endswith("full update")
    with pytest.raises(UserError, match=r"whole updates \(diff\).*: convert it with `nora-diffusion import`"):
        load_adapter(pipe, file, "one")
    with TensorFile(file) as reader:
        ((component, path, found),) = dense_updates(components(pipe), reader)
    assert (component, path) == ("unet", QUERY) and torch.equal(found.float(), dense)
    assert import_lora(pipe, file, tmp_path / "imported").layers.keys() == {f"unet.{QUERY}"}
    write(file, {f"{name}.diff": torch.randn(5, 5)})
    with pytest.raises(UserError, match="was made for another base"):
        import_lora(pipe, file, tmp_path / "other")


def test_a_magnitude_that_fits_nothing_is_damaged(pipe: Any, tmp_path: Path) -> None:
    for shape in ((), (3, 5), (1, 1)):
        file = write(tmp_path / "x.safetensors", PAIR | {f"{KOHYA}.dora_scale": torch.ones(shape)})
        with pytest.raises(UserError, match="fits neither its rows nor its columns: copy it again"):
            load_adapter(pipe, file, "one")


def test_tokens_in_any_script(pipe: Any, tmp_path: Path) -> None:
    vectors = torch.randn(1, 16)
    file = write(tmp_path / "x.safetensors", {"<猫>": vectors})
    assert inspect_adapter(file).trigger == "<猫>"
    load_adapter(pipe, file)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[pipe.tokenizer.convert_tokens_to_ids("<猫>")][None], vectors)
    for name, token in (("clip_l", "mine"), ("a\x1bb", None), ("a\u2028b", None)):
        write(tmp_path / "mine.safetensors", {name: vectors})
        if token is None:
            with pytest.raises(UserError, match="unprintable characters"):
                inspect_adapter(tmp_path / "mine.safetensors")
        else:
            assert inspect_adapter(tmp_path / "mine.safetensors").trigger == token


OUTSIDE = {
    "flux": {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
    },
    "sd3": {
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "joint_blocks.0.context_block.adaLN_modulation.1": "transformer_blocks.0.norm1_context.linear",
    },
}  # fmt: skip
SWAPPED = {
    "flux": {"final_layer.adaLN_modulation.1": "norm_out.linear"},
    "sd3": {
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "joint_blocks.1.context_block.adaLN_modulation.1": "transformer_blocks.1.norm1_context.linear",
    },
}
"""Shift and scale, which diffusers has as scale and shift."""


@pytest.mark.parametrize("model", OUTSIDE)
@pytest.mark.parametrize("kohya", [True, False])
def test_all_layers_of_the_original_transformers(tmp_path: Path, model: str, kohya: bool) -> None:
    pipe, tensors, expected = tiny_pipeline(model, tmp_path), {}, {}
    layers = projections(pipe.transformer)
    for name, path in (OUTSIDE[model] | SWAPPED[model]).items():
        weight: Any = layers[path].weight
        down, up = torch.randn(2, weight[0].numel()), torch.randn(len(weight), 2)
        key = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        first, second = up.chunk(2)
        expected["transformer", path] = (torch.cat([second, first]) if name in SWAPPED[model] else up) @ down
    check(pipe, write(tmp_path / "x.safetensors", tensors), expected)


XLABS = {
    "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.processor.qkv_lora2": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": [f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"],
    "single_blocks.1.processor.proj_lora": ["single_transformer_blocks.1.proj_out"],
}
BARE = {
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "single_transformer_blocks.0.proj_mlp": ["single_transformer_blocks.0.proj_mlp"],
    "transformer_blocks.0.attn.to_q": ["transformer_blocks.0.attn.to_q"],
}


@pytest.mark.parametrize("names", [XLABS, BARE], ids=["XLabs", "no component"])
def test_names_of_the_first_flux_loras(tmp_path: Path, names: dict[str, list[str]]) -> None:
    pipe, tensors, expected = tiny_pipeline("flux", tmp_path), {}, {}
    layers = projections(pipe.transformer)
    for name, paths in names.items():
        weights: list[Any] = [layers[path].weight for path in paths]
        down, up = torch.randn(2, weights[0].shape[1]), torch.randn(sum(map(len, weights)), 2)
        a, b = ("down", "up") if names is XLABS else ("lora_A", "lora_B")
        tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": up}
        parts = up.split([len(weight) for weight in weights])
        expected |= {("transformer", path): part @ down for path, part in zip(paths, parts, strict=True)}
    check(pipe, write(tmp_path / "x.safetensors", tensors), expected)


@pytest.mark.parametrize("prefix", ["lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."])
@pytest.mark.parametrize("others", [True, False])
def test_the_text_projection_of_sdxl(tmp_path: Path, prefix: str, others: bool) -> None:
    """diffusers' loader knows the layers of attention and MLP only."""
    pipe, tensors, expected = tiny_pipeline("sdxl", tmp_path), {}, {}
    for path in ["text_projection"] + ["text_model.encoder.layers.0.self_attn.q_proj"] * others:
        weight: Any = projections(pipe.text_encoder_2)[path].weight
        down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
        name = prefix + (path.replace(".", "_") if prefix == "lora_te2_" else path)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        expected["text_encoder_2", path] = up @ down
    check(pipe, write(tmp_path / "x.safetensors", tensors), expected)
