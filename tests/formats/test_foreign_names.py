"""One LoRA under the names of every tool that saves such files: each computes the same."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from safetensors.torch import save_file
from torch import Tensor

from nora_diffusion import UserError, delete_adapter, inspect_adapter, load_adapter, open_pipeline, set_adapters
from nora_diffusion.conversion.import_lora import import_lora
from nora_diffusion.formats.foreign_updates import dense_updates
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import list_adapters
from nora_diffusion.pipelines.components import components, projections, tuner_layers

ATTENTION = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$")
ORIGINAL = {
    "down_blocks.0.attentions.0.": "input_blocks.1.1.", "mid_block.attentions.0.": "middle_block.1.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.", "up_blocks.1.attentions.1.": "output_blocks.3.1.",
}  # fmt: skip
"""Stability AI's names for the blocks of the tiny base that have attention."""
Pairs = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""``(down, up)`` by component and path."""


@pytest.fixture(scope="module")
def pairs(tiny_base: Path) -> Pairs:
    """A random LoRA of rank 2 on the attention of UNet and text encoder, and on two feed-forward layers."""
    pipe, found = open_pipeline(tiny_base), {}
    generator = torch.Generator().manual_seed(0)
    for component, module in components(pipe).items():
        for path, layer in projections(module).items():
            if re.search(r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj|fc1|ff\.net\.2)$", path):
                d_out, d_in = layer.weight.shape  # type: ignore[union-attr,misc]
                down = torch.randn(2, int(d_in), generator=generator)  # type: ignore[arg-type]
                up = torch.randn(int(d_out), 2, generator=generator)  # type: ignore[arg-type]
                found[component, path.removeprefix("text_model.")] = down, up
    return found


def original(path: str) -> str:
    return next((new + path.removeprefix(old) for old, new in ORIGINAL.items() if path.startswith(old)), path)


def long(component: str, path: str) -> str:
    return path if component == "unet" else f"text_model.{path}"


def old_diffusers(component: str, path: str) -> str:
    """``attn1.processor.to_q_lora`` and ``q_proj.lora_linear_layer``, as the first training scripts wrote."""
    if component == "unet" and ATTENTION.search(path):
        return f"unet.{ATTENTION.sub(lambda m: f'.processor.{m[1].removesuffix(chr(46) + chr(48))}_lora', path)}"
    return f"unet.{path}.lora" if component == "unet" else f"text_encoder.text_model.{path}.lora_linear_layer"


def oldest_text_encoder(component: str, path: str) -> str:
    """``self_attn.to_q_lora`` of the text encoder, before ``lora_linear_layer``."""
    path = path.replace("out_proj", "to_out")
    path = re.sub(r"([qkv])_proj$", r"to_\1", path)
    return old_diffusers("unet", path) if component == "unet" else f"text_encoder.text_model.{path}_lora"


def underscores(prefix: dict[str, str]) -> Callable[[str, str], str]:
    return lambda component, path: f"{prefix[component]}_{long(component, path).replace('.', '_')}"


def comfy(component: str, path: str) -> str:
    if component == "unet":
        return f"diffusion_model.{original(path)}"
    return f"text_encoders.clip_l.transformer.text_model.{path}"


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMS: dict[str, tuple[Callable[[str, str], str], tuple[str, str]]] = {
    "diffusers": (lambda c, p: f"{c}.{long(c, p)}", AB),
    "adapter name": (lambda c, p: f"{c}.{long(c, p)}", ("lora_A.default.weight", "lora_B.default.weight")),
    "another adapter name": (lambda c, p: f"{c}.{p}", ("lora_A.my-dog_1.weight", "lora_B.my-dog_1.weight")),
    "without weight": (lambda c, p: f"{c}.{long(c, p)}", ("lora_A", "lora_B")),
    "peft inside": (lambda c, p: f"{c}.base_model.model.{long(c, p)}", AB),
    "peft inside with a name": (
        lambda c, p: f"{c}.base_model.model.{p}", ("lora_A.default.weight", "lora_B.default.weight"),
    ),
    "processors": (old_diffusers, ("down.weight", "up.weight")),
    "oldest text encoder": (oldest_text_encoder, ("down.weight", "up.weight")),
    "nested": (lambda c, p: f"{c}.{long(c, p)}", ("lora.down.weight", "lora.up.weight")),
    "kohya": (underscores({"unet": "lora_unet", "text_encoder": "lora_te"}), DOWN_UP),
    "onetrainer": (underscores({"unet": "lora_unet", "text_encoder": "lora_te1"}), DOWN_UP),
    "simpletuner": (underscores({"unet": "lycoris", "text_encoder": "lora_te1"}), DOWN_UP),
    "comfyui": (comfy, DOWN_UP),
    "onetrainer for comfyui": (comfy, AB),
    "whole model": (lambda c, p: f"{'model.' if c == 'unet' else ''}{comfy(c, p)}", DOWN_UP),
}  # fmt: skip


def write(file: Path, pairs: Pairs, form: str, alpha: bool = False, **more: Tensor) -> Path:
    name, (a, b) = FORMS[form]
    tensors: dict[str, Tensor] = {}
    for (component, path), (down, up) in pairs.items():
        module = name(component, path)
        tail = "_lora" if module.endswith("_lora") else ".lora" if module.endswith((".lora", "_layer")) else ""
        tensors |= {f"{module}.{a}": down.clone(), f"{module}.{b}": up.clone()}
        if alpha:
            tensors[f"{module.removesuffix(tail)}.alpha"] = torch.tensor(1.0)
    save_file(tensors | more, file)
    return file


def check(pipe: Any, file: Path, pairs: Pairs, scale: float = 1.0) -> None:
    """Every projection has ``scale * up @ down``, both as a dense update and in the loaded adapter."""
    assert inspect_adapter(file).r == 2
    with TensorFile(file) as reader:
        found = {(c, p.removeprefix("text_model.")): dense for c, p, dense in dense_updates(components(pipe), reader)}
    assert found.keys() == pairs.keys()
    loaded = load_adapter(pipe, file, "one")
    assert loaded.applied == loaded.total
    for (component, path), (down, up) in pairs.items():
        expected = scale * up.double().flatten(1) @ down.double().flatten(1)
        torch.testing.assert_close(found[component, path], expected, rtol=1e-6, atol=1e-9)
        modules = dict(components(pipe)[component].named_modules())
        layer = modules.get(path) or modules[f"text_model.{path}"]
        delta = layer.get_delta_weight("one").flatten(1).double()
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    delete_adapter(pipe, "one")


@pytest.mark.parametrize("form", FORMS)
def test_the_names_of_every_tool_are_read(pipe: Any, pairs: Pairs, tmp_path: Path, form: str) -> None:
    check(pipe, write(tmp_path / "x.safetensors", pairs, form), pairs)


@pytest.mark.parametrize("form", ["comfyui", "onetrainer for comfyui", "simpletuner", "kohya", "diffusers"])
def test_alphas_are_read_beside_any_names(pipe: Any, pairs: Pairs, tmp_path: Path, form: str) -> None:
    check(pipe, write(tmp_path / "x.safetensors", pairs, form, alpha=True), pairs, 0.5)


def test_names_without_a_component_are_those_of_the_unet(pipe: Any, pairs: Pairs, tmp_path: Path) -> None:
    unet = {key: value for key, value in pairs.items() if key[0] == "unet"}
    tensors = {}
    for (component, path), (down, up) in unet.items():
        name = old_diffusers(component, path).removeprefix("unet.")
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    check(pipe, tmp_path / "x.safetensors", unet)


@pytest.mark.parametrize("block", [1, 2])
def test_dylora_of_lycoris_is_put_together(pipe: Any, pairs: Pairs, tmp_path: Path, block: int) -> None:
    tensors = {}
    for (component, path), (down, up) in pairs.items():
        name = FORMS["kohya"][0](component, path)
        for number in range(2 // block):
            rows = slice(number * block, (number + 1) * block)
            tensors[f"{name}.down_list.{number}"] = down[rows].clone()
            tensors[f"{name}.up_list.{number}"] = up[:, rows].clone()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    assert inspect_adapter(tmp_path / "x.safetensors").kind == "kohya DyLoRA"
    check(pipe, tmp_path / "x.safetensors", pairs, 0.5)
    name = FORMS["kohya"][0](*next(iter(pairs)))
    tensors[f"{name}.down_list.7"] = tensors[f"{name}.down_list.0"].clone()
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"blocks down_list are incomplete .*copy it again"):
        inspect_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("flat", [("down", "up"), ("up",)], ids=["both", "as LyCORIS writes its DyLoRA"])
def test_factors_of_convolutions_may_be_matrices(pipe: Any, tmp_path: Path, flat: tuple[str, ...]) -> None:
    layer = projections(pipe.unet)["conv_in"]
    d_out, c, height, width = layer.weight.shape  # type: ignore[union-attr,misc]
    down, up = torch.randn(2, c * height * width), torch.randn(int(d_out), 2)  # type: ignore[operator,arg-type]
    pairs = {("unet", "conv_in"): (down, up)}
    name = "lora_unet_conv_in"
    stored = down if "down" in flat else down.view(2, c, height, width)
    save_file({f"{name}.lora_down.weight": stored, f"{name}.lora_up.weight": up}, tmp_path / "x.safetensors")
    check(pipe, tmp_path / "x.safetensors", pairs)


@pytest.mark.parametrize("whole", [True, False])
def test_lokr_in_tucker_form(pipe: Any, tmp_path: Path, whole: bool) -> None:
    """The Kronecker product of a core in Tucker form, as LyCORIS writes it, is that of the dense formula."""
    name, path = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1"
    d_out, d_in = projections(pipe.unet)[path].weight.shape[:2]  # type: ignore[union-attr,index]
    out, inner = int(d_out) // 2, int(d_in) // 2  # type: ignore[arg-type]
    w1, t2 = torch.randn(2, 2), torch.randn(2, 2, 3, 3)
    w2_a, w2_b = torch.randn(2, out), torch.randn(2, inner)
    w2 = torch.einsum("ijkl,ip,jr->prkl", t2, w2_a, w2_b)
    factors = {"lokr_w2": w2} if whole else {"lokr_t2": t2, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}
    tensors = {"lokr_w1": w1, "alpha": torch.tensor(1.0)} | factors
    save_file({f"{name}.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    expected = torch.zeros(int(d_out), int(d_in), 3, 3)  # type: ignore[arg-type]
    for i in range(2):
        for j in range(2):
            expected[i * out : (i + 1) * out, j * inner : (j + 1) * inner] = w1[i, j] * w2
    expected *= 1.0 if whole else 0.5
    with TensorFile(tmp_path / "x.safetensors") as reader:
        ((_, _, dense),) = dense_updates(components(pipe), reader)
    torch.testing.assert_close(dense.float(), expected.flatten(1), rtol=1e-4, atol=1e-5)
    try:
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    except UserError as error:  # PEFT decomposes layers of this size in another way
        assert str(error).endswith("convert it with `nora-diffusion import`")
        assert import_lora(pipe, tmp_path / "x.safetensors", tmp_path / "imported").layers
    else:
        delta = pipe.unet.get_submodule(path).get_delta_weight("one")
        torch.testing.assert_close(delta.flatten(1), expected.flatten(1), rtol=1e-4, atol=1e-5)
        delete_adapter(pipe, "one")


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_onetrainers_bundled_embeddings_are_loaded(tmp_path: Path, model: str) -> None:
    pipe = tiny_pipeline(model, tmp_path / "base")
    if model == "sdxl":
        pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer)
    encoders = {"clip_l": pipe.text_encoder} | ({"clip_g": pipe.text_encoder_2} if model == "sdxl" else {})
    path = next(p for p in projections(pipe.unet) if p.endswith("attn1.to_q"))
    d_out, d_in = projections(pipe.unet)[path].weight.shape  # type: ignore[union-attr,misc]
    vectors = {
        f"bundle_emb.<my.dog>.{name}": torch.randn(2, encoder.get_input_embeddings().embedding_dim)
        for name, encoder in encoders.items()
    }
    tensors = {
        f"unet.{path}.lora_A.weight": torch.randn(2, int(d_in)),  # type: ignore[arg-type]
        f"unet.{path}.lora_B.weight": torch.randn(int(d_out), 2),  # type: ignore[arg-type]
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors | vectors, file)
    info = inspect_adapter(file)
    assert info.trigger == "<my.dog>" and "with the embeddings of <my.dog>" in info.note
    imported = import_lora(pipe, file, tmp_path / "imported")
    assert "the embeddings of <my.dog> are not imported" in imported.note
    loaded = load_adapter(pipe, file, "one")
    assert loaded.applied == loaded.total == 2 + len(vectors)
    for key, value in vectors.items():
        encoder = encoders[key.rpartition(".")[2]]
        table, tokenizer = encoder.get_input_embeddings().weight, pipe.tokenizer
        tokenizer = pipe.tokenizer_2 if key.endswith("clip_g") else tokenizer
        ids = tokenizer.convert_tokens_to_ids(["<my.dog>", "<my.dog>_1"])
        torch.testing.assert_close(table[ids].detach(), value)
    before = {name: len(pipe.tokenizer) for name in encoders}
    with pytest.raises(UserError, match="already has the token"):
        load_adapter(pipe, file, "two")
    assert "two" not in str(list_adapters(pipe)) and before == {name: len(pipe.tokenizer) for name in encoders}
    save_file(tensors | {"bundle_emb.<x>.clip_l_out": torch.randn(1, 16)}, file)
    with pytest.raises(UserError, match="which diffusers cannot load"):
        load_adapter(pipe, file, "three")


ODD: list[Any] = [
    "8", "x", [8], {"a": 8}, True, 2.5, -1, 0, 10**30, None.__class__.__name__, [[]], {"r": {"r": 1}}, "\u0000", 1e300,
]  # fmt: skip


@pytest.mark.parametrize("where", ["config", "metadata"])
@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"])
def test_odd_settings_are_a_sentence(pipe: Any, tmp_path: Path, field: str, where: str) -> None:
    path = next(p for p in projections(pipe.unet) if p.endswith("attn1.to_q"))
    d_out, d_in = projections(pipe.unet)[path].weight.shape  # type: ignore[union-attr,misc]
    a, b = torch.randn(2, int(d_in)), torch.randn(int(d_out), 2)  # type: ignore[arg-type]
    prefix = "base_model.model." if where == "config" else "unet."
    name = "adapter_model.safetensors" if where == "config" else "x.safetensors"
    tensors = {f"{prefix}{path}.lora_A.weight": a, f"{prefix}{path}.lora_B.weight": b}
    refused = 0
    for value in ODD:
        settings = {"r": 2, "lora_alpha": 2, field: value}
        metadata = {} if where == "config" else {
            "lora_adapter_metadata": json.dumps({f"unet.{key}": setting for key, setting in settings.items()})
        }  # fmt: skip
        save_file(tensors, tmp_path / name, metadata)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        try:
            load_adapter(pipe, tmp_path / name, "one")
        except UserError as error:
            assert str(tmp_path / name) in str(error) and str(error).isprintable()
            refused += 1
        else:
            delete_adapter(pipe, "one")
    assert refused >= len(ODD) - 4


def test_patterns_of_other_tools_match_as_in_peft(pipe: Any, tmp_path: Path) -> None:
    path = next(p for p in projections(pipe.unet) if p.endswith("attn1.to_q"))
    d_out, d_in = projections(pipe.unet)[path].weight.shape  # type: ignore[union-attr,misc]
    a, b = torch.randn(2, int(d_in)), torch.randn(int(d_out), 2)  # type: ignore[arg-type]
    save_file(
        {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    for pattern, scale in {"to_q": 3.0, r".*attn1\.to_q": 3.0, "attn2": 1.0, f"^{re.escape(path)}$": 3.0}.items():
        settings = {"r": 2, "lora_alpha": 2, "alpha_pattern": {pattern: 6}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with TensorFile(tmp_path / "adapter_model.safetensors") as reader:
            ((_, _, dense),) = dense_updates({"unet": pipe.unet}, reader)
        torch.testing.assert_close(dense.float(), scale * b @ a)
    settings = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="LoRA settings are damaged"):
        load_adapter(pipe, tmp_path / "adapter_model.safetensors", "one")


REFUSALS = {
    "a factor twice": {"unet.mid_block.a.lora_A.weight": (2, 4), "unet.mid_block.a.lora.down.weight": (2, 4)},
    "an empty factor": {"unet.mid_block.a.lora_A.weight": (0, 4), "unet.mid_block.a.lora_B.weight": (4, 0)},
    "no component": {"blocks.0.a.lora_A.weight": (2, 4), "blocks.0.a.lora_B.weight": (4, 2)},
    "two ranks": {"unet.mid_block.a.lora_A.weight": (2, 4), "unet.mid_block.a.lora_B.weight": (4, 3)},
    "lokr that does not fit": {"lora_unet_mid_block_resnets_0_conv1.lokr_w1": (3, 3),
                               "lora_unet_mid_block_resnets_0_conv1.lokr_w2": (5, 5, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_whole_sentences(pipe: Any, tmp_path: Path, name: str) -> None:
    save_file({key: torch.ones(shape) for key, shape in REFUSALS[name].items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    text = str(error.value)
    assert text.startswith(str(tmp_path)) and "\n" not in text and not text.endswith((",", ":", "..."))


T5_NAMES: dict[str, tuple[Callable[[str], str], tuple[str, str]]] = {
    "sd-scripts, OneTrainer": (lambda path: f"lora_te3_{path.replace('.', '_')}", DOWN_UP),
    "ComfyUI, OneTrainer": (lambda path: f"text_encoders.t5xxl.transformer.{path}", AB),
}
"""Names of a T5's layers that do not depend on its place in the pipeline."""
PLACES = {"sd3": "text_encoder_3", "flux": "text_encoder_2", "pixart": "text_encoder"}
T5_FORMS = [(model, form) for model in PLACES for form in (*T5_NAMES, "diffusers", "kohya")]


def t5_names(model: str, form: str) -> tuple[Callable[[str], str], tuple[str, str]]:
    place = PLACES[model]
    number = place.removeprefix("text_encoder").removeprefix("_") or "1"
    return {
        "diffusers": (lambda path: f"{place}.{path}", AB),
        "kohya": (lambda path: f"lora_te{number}_{path.replace('.', '_')}", DOWN_UP),
        **T5_NAMES,
    }[form]


@pytest.mark.parametrize("model, form", T5_FORMS)
def test_layers_of_a_t5_are_loaded(tmp_path: Path, model: str, form: str) -> None:
    """diffusers' loader ignores them. Ranks, alphas and the other components of a file are as in any LoRA."""
    pipe = tiny_pipeline(model, tmp_path)
    name, (a, b) = t5_names(model, form)
    encoder, tensors, expected = getattr(pipe, PLACES[model]), {}, {}
    for number, (path, layer) in enumerate(projections(encoder).items()):
        down, up = torch.randn(1 + number % 2, layer.in_features), torch.randn(layer.out_features, 1 + number % 2)  # type: ignore[arg-type]
        tensors |= {f"{name(path)}.{a}": down, f"{name(path)}.{b}": up, f"{name(path)}.alpha": torch.tensor(1.0)}
        expected[path] = up @ down / len(down)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    block = "lora_transformer_transformer_blocks_0_attn1_to_q" if model == "pixart" else (
        "lora_transformer_transformer_blocks_0_attn_to_q"
    )  # fmt: skip
    save_file(tensors | {f"{block}.lora_down.weight": down, f"{block}.lora_up.weight": up}, tmp_path / "x.safetensors")
    loaded = load_adapter(pipe, tmp_path / "x.safetensors", "one", weight=0.5)
    assert loaded.applied == loaded.total == len(tensors) + 2
    assert list_adapters(pipe) == {"transformer": ["one"], PLACES[model]: ["one"]}
    modules = dict(encoder.named_modules())
    for path, dense in expected.items():
        torch.testing.assert_close(modules[path].get_delta_weight("one"), 0.5 * dense)
    set_adapters(pipe, "one", 2.0)
    assert {layer.scaling["one"] for layer in tuner_layers(encoder)} == {2.0}
    delete_adapter(pipe, "one")
    assert list_adapters(pipe) == {} and not list(tuner_layers(encoder))


@pytest.mark.parametrize("prefix", ["lora_te3_", "text_encoder_3."])
def test_a_t5_that_the_pipeline_lacks_is_named(tmp_path: Path, prefix: str) -> None:
    pipe = tiny_pipeline("sd3", tmp_path)
    pipe.text_encoder_3 = None
    path = f"{prefix}encoder.block.0.layer.0.SelfAttention.q"
    path = path.replace(".", "_") if prefix == "lora_te3_" else path
    tensors = {f"{path}.lora_down.weight": torch.ones(1, 32), f"{path}.lora_up.weight": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="which this pipeline does not have: open a base with it"):
        load_adapter(pipe, tmp_path / "x.safetensors", "one")


def test_a_file_may_add_components_to_an_adapter(tmp_path: Path) -> None:
    """The projections of each file are counted, not those of all components that hold the name."""
    pipe = tiny_pipeline("sd3", tmp_path)
    for prefix, shape in (
        ("lora_transformer_transformer_blocks_0_attn_to_q", 16),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 16),
    ):
        save_file(
            {f"{prefix}.lora_down.weight": torch.ones(1, shape), f"{prefix}.lora_up.weight": torch.ones(16, 1)},
            tmp_path / "x.safetensors",
        )
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    assert list_adapters(pipe) == {"transformer": ["one"], "text_encoder": ["one"]}


@pytest.mark.parametrize(
    "prefix", ["lora_te3_encoder_block_0_layer_0_SelfAttention_", "lora_te1_text_model_encoder_layers_0_self_attn_"]
)
def test_magnitudes_of_some_projections_are_refused(tmp_path: Path, prefix: str) -> None:
    """PEFT would give the others magnitudes of its own, and so another update than the file's."""
    pipe = tiny_pipeline("sd3", tmp_path)
    width, ends = (32, "qk") if "te3" in prefix else (16, ("q_proj", "k_proj"))
    tensors = {}
    for end in ends:
        tensors |= {
            f"{prefix}{end}.lora_down.weight": torch.ones(1, width),
            f"{prefix}{end}.lora_up.weight": torch.ones(16, 1),
        }
    save_file(tensors | {f"{prefix}{ends[0]}.dora_scale": torch.ones(16, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"only 1 of the 2 projections of the text_encoder\w* have a magnitude"):
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    assert list_adapters(pipe) == {}


FUSED = {
    "flux": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "single_blocks.1.linear1": [
            *(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.1.proj_mlp"
        ],
        "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
    },
    "sd3": {
        "joint_blocks.1.x_block.attn.qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
        "joint_blocks.0.context_block.attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    },
}  # fmt: skip
"""Layers of the original transformers, and the projections that are their output rows in this order."""


@pytest.mark.parametrize("model", FUSED)
@pytest.mark.parametrize("kohya", [True, False])
def test_layers_of_the_original_transformers_are_split(tmp_path: Path, model: str, kohya: bool) -> None:
    """The updates of the projections, one below the other, are the update of the layer in the file."""
    pipe = tiny_pipeline(model, tmp_path)
    layers, tensors, dense = projections(pipe.transformer), {}, {}
    for name, paths in FUSED[model].items():
        weights: list[Any] = [layers[path].weight for path in paths]
        down = torch.randn(2, weights[0].shape[1])
        up = torch.randn(sum(len(weight) for weight in weights), 2)
        key = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        dense[name] = 0.5 * up @ down
    save_file(tensors, tmp_path / "x.safetensors")
    load_adapter(pipe, tmp_path / "x.safetensors", "one")
    for name, paths in FUSED[model].items():
        found: list[Any] = [pipe.transformer.get_submodule(path) for path in paths]
        assert torch.allclose(torch.cat([layer.get_delta_weight("one") for layer in found]), dense[name], atol=1e-5)
    assert sum("one" in layer.r for layer in tuner_layers(pipe.transformer)) == sum(map(len, FUSED[model].values()))


@pytest.mark.parametrize(
    ("model", "factors", "message"),
    [
        ("sd3", {"lora_down": (1, 16), "lora_up": (48, 1)}, "as the model's original code does"),
        ("flux", {"lora_down": (1, 16), "lora_up": (7, 1)}, "has 7 output rows, this pipeline's projections have 48"),
        ("flux", {"lokr_w1": (2, 2), "lokr_w2": (24, 8)}, "only a plain LoRA can be split"),
    ],
)
def test_layers_of_the_original_transformers_that_cannot_be_split_are_refused(
    tmp_path: Path, model: str, factors: dict[str, tuple[int, int]], message: str
) -> None:
    name, ending = "lora_unet_double_blocks_0_img_attn_qkv", ".weight" if "lora_up" in factors else ""
    save_file({f"{name}.{f}{ending}": torch.ones(shape) for f, shape in factors.items()}, tmp_path / "x.safetensors")
    pipe = tiny_pipeline(model, tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    assert list_adapters(pipe) == {}


def test_a_lora_for_a_unet_is_not_for_a_transformer(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 7), f"{name}.lora_up.weight": torch.ones(7, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="was made for another base: this pipeline has no down_blocks_0"):
        load_adapter(tiny_pipeline("flux", tmp_path), tmp_path / "x.safetensors", "one")
