"""Other tools' files, made by those tools: recognized, loaded, projected onto a basis, or refused with a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from factories import randomize
from peft import LoHaConfig, LoHaModel, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    inspect_adapter,
    load_adapter,
    open_pipeline,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import lora, lora_xs, nora, nora_input
from nora_diffusion.adapters.deltas.bases import BASES
from nora_diffusion.conversion.import_lora import import_lora, project
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.formats.foreign import PEFT_CONFIG, PEFT_FILE
from nora_diffusion.formats.foreign_updates import dense_updates
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import list_adapters, trainable_parameters
from nora_diffusion.pipelines.components import canonical, components, projections

TARGETS = ["to_q", "to_v", "conv1"]
Make = Callable[[Any, Path], Path]


def state(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{component}.{key}": value.clone()
        for component in ("unet", "text_encoder")
        for key, value in getattr(pipe, component).state_dict().items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def randomize_module(module: Any) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)


def diffusers_lora(pipe: Any, folder: Path) -> Path:
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    return folder


def kohya(targets: list[str]) -> Make:
    def make(pipe: Any, folder: Path) -> Path:
        add_adapter(pipe, nora(r=4, inner_r=2, alpha=2.0, basis="svd", target_modules=targets), "one")
        randomize(pipe)
        save_adapter(pipe, folder / "nora", "one")
        export_lora(folder / "nora", folder / "cat.safetensors", format="kohya")
        return folder / "cat.safetensors"

    return make


def by_peft(config: Any) -> Make:
    def make(pipe: Any, folder: Path) -> Path:
        model = get_peft_model(pipe.unet, config)
        randomize_module(model)
        model.save_pretrained(folder)
        return folder

    return make


def as_lycoris(config: Any) -> Make:
    """PEFT's factors with the names and alphas of LyCORIS."""

    def make(pipe: Any, folder: Path) -> Path:
        model = get_peft_model(pipe.unet, config)
        randomize_module(model)
        tensors = {}
        for key, value in get_peft_model_state_dict(model).items():
            path, _, factor = key.removeprefix("base_model.model.").rpartition(".")
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.{factor}"] = value.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(config.alpha))
        save_file(tensors, folder / "cat.safetensors")
        return folder / "cat.safetensors"

    return make


FILES: dict[str, tuple[Make, str]] = {
    "diffusers": (diffusers_lora, "diffusers LoCon"),
    "kohya": (kohya(["to_q", "to_k"]), "kohya LoRA"),
    "kohya-conv": (kohya(["attn", "ff", "proj", "conv"]), "kohya LoCon"),
    "peft": (by_peft(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, alpha_pattern={"to_v": 12})), "PEFT LoCon"),
    "peft-loha": (by_peft(LoHaConfig(r=3, alpha=6, target_modules=TARGETS)), "PEFT LoHa"),
    "lycoris-loha": (as_lycoris(LoHaConfig(r=2, alpha=1, target_modules=TARGETS)), "kohya LoHa"),
    "lycoris-loha-tucker": (
        as_lycoris(LoHaConfig(r=2, alpha=1, target_modules=TARGETS, use_effective_conv2d=True)), "kohya LoHa",
    ),
    "peft-lokr": (by_peft(LoKrConfig(r=1, alpha=2, target_modules=TARGETS)), "PEFT LoKr"),
    "peft-lokr-both": (by_peft(LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_both=True)), "PEFT LoKr"),
    "peft-lokr-factor": (by_peft(LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_factor=2)), "PEFT LoKr"),
    "lycoris-lokr": (as_lycoris(LoKrConfig(r=1, alpha=2, target_modules=TARGETS)), "kohya LoKr"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Every file, with the output of the tool that made it."""
    found = {}
    for name, (make, _) in FILES.items():
        torch.manual_seed(len(found))
        pipe, folder = open_pipeline(tiny_base), tmp_path_factory.mktemp(name)
        path = make(pipe, folder)
        pipe.unet.eval()
        found[name] = path, output(pipe)
    return found


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states = pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0]
    return pipe.unet(torch.randn(1, 4, 8, 8, generator=generator), 3, states).sample


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_tools_load(pipe: Any, made: dict[str, tuple[Path, Tensor]], name: str) -> None:
    path, expected = made[name]
    info = inspect_adapter(path)
    assert info.kind == FILES[name][1]
    with pytest.raises(UserError, match="file of another tool"):
        _ = info.configs
    before, plain = state(pipe), output(pipe)
    loaded = load_adapter(pipe, path, "cat")
    assert loaded.applied == loaded.total > 0
    torch.testing.assert_close(output(pipe), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)
    set_adapters(pipe, "cat", 0.0)
    torch.testing.assert_close(output(pipe), plain)
    delete_adapter(pipe, "cat")
    assert same({k.replace(".base_layer", ""): v for k, v in state(pipe).items()}, before)


@pytest.mark.parametrize("name", FILES)
def test_dense_updates_are_those_of_the_tool(tiny_base: Path, made: dict[str, tuple[Path, Tensor]], name: str) -> None:
    """Adding ``dW`` to the plain weights gives the output of the tool that made the file."""
    pipe, (path, expected) = open_pipeline(tiny_base), made[name]
    with TensorFile(Path(inspect_adapter(path).path)) as reader:
        for component, module, dense in dense_updates(components(pipe), reader):
            weight = getattr(pipe, component).get_submodule(module).weight
            weight.data += dense.view(weight.shape).float()
    torch.testing.assert_close(output(pipe), expected, atol=1e-5, rtol=1e-4)


ORIGINAL_NAMES = {
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
}  # fmt: skip
"""The tiny SDXL's modules under the names of Stability AI's code, written by hand."""


@pytest.fixture(scope="module")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Tensor]]:
    """A pipeline, its folder, and an adapter's tensors under the names that kohya's trainer uses for SDXL."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = tiny_pipeline("sdxl", folder / "base")
    config = nora(r=4, inner_r=2, basis="svd", target_modules=["attn", "ff", "conv1"])
    add_adapter(pipe, config, "one", ("unet", "text_encoder", "text_encoder_2"))
    randomize(pipe)
    save_adapter(pipe, folder / "nora", "one")
    delete_adapter(pipe, "one")
    export_lora(folder / "nora", folder / "kohya.safetensors", format="kohya")
    tensors = load_file(folder / "kohya.safetensors")
    assert not any("down_blocks" in key or "mid_block" in key for key in tensors)
    save_file({in_diffusers(key): value for key, value in tensors.items()}, folder / "diffusers.safetensors")
    return pipe, folder, tensors


def in_diffusers(key: str) -> str:
    """Our export's key with the module named as in diffusers."""
    for path, original in ORIGINAL_NAMES.items():
        key = key.replace(f"lora_unet_{original.replace('.', '_')}_", f"lora_unet_{path.replace('.', '_')}_")
    return key.replace("_in_layers_2.", "_conv1.")


def test_kohya_files_for_sdxl_are_imported(sdxl_file: Any, tmp_path: Path) -> None:
    """The updates under Stability AI's names are those of the file under diffusers' names."""
    pipe, folder, tensors = sdxl_file
    save_file(tensors, tmp_path / "sgm.safetensors")
    found = []
    for file in (folder / "diffusers.safetensors", tmp_path / "sgm.safetensors"):
        with TensorFile(file) as reader:
            found.append(
                {(component, path): dense for component, path, dense in dense_updates(components(pipe), reader)}
            )
    assert found[0].keys() == found[1].keys() and all(torch.equal(dense, found[1][k]) for k, dense in found[0].items())
    config = nora(r=4, inner_r=2, basis="svd", target_modules=["attn"])
    assert import_lora(pipe, tmp_path / "sgm.safetensors", tmp_path / "back", config).lost < 1e-5
    assert list_adapters(pipe) == {}


def test_kohya_files_for_sdxl_load_and_are_checked(sdxl_file: Any, tmp_path: Path) -> None:
    """Both sets of names load the same update; NaN is refused before diffusers is called."""
    pipe, folder, tensors = sdxl_file
    save_file(tensors, tmp_path / "sgm.safetensors")
    load_adapter(pipe, tmp_path / "sgm.safetensors", "cat")
    with TensorFile(tmp_path / "sgm.safetensors") as reader:
        for component, path, dense in dense_updates(components(pipe), reader):
            layer = getattr(pipe, component).get_submodule(path)
            torch.testing.assert_close(layer.get_delta_weight("cat").flatten(1), dense.float(), atol=1e-6, rtol=1e-5)
    delete_adapter(pipe, "cat")
    damaged = tensors | {min(tensors): torch.full_like(tensors[min(tensors)], float("nan"))}
    save_file(damaged, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="NaN"):
        load_adapter(pipe, tmp_path / "nan.safetensors", "cat")
    twice = load_file(folder / "diffusers.safetensors") | tensors
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match="twice"):
        load_adapter(pipe, tmp_path / "twice.safetensors", "cat")
    assert list_adapters(pipe) == {}


KOHYA = {"unet": "lora_unet_{}", "text_encoder": "lora_te_text_model_{}"}, "_", "lora_down", "lora_up"
DIFFUSERS = {"unet": "unet.{}", "text_encoder": "text_encoder.text_model.{}"}, ".", "lora_A", "lora_B"


@pytest.mark.parametrize("names", [KOHYA, DIFFUSERS], ids=["kohya", "diffusers"])
def test_every_projection_may_have_its_own_rank_and_alpha(pipe: Any, tmp_path: Path, names: Any) -> None:
    """As sd-scripts writes them after resizing: each gets ``(alpha / r) B A``."""
    tensors, expected = {}, {}
    prefixes, dot, lora_down, lora_up = names
    for component, prefix in prefixes.items():
        paths = [
            path for path in projections(getattr(pipe, component)) if path.endswith(("to_q", "to_out.0", "q_proj"))
        ]
        for number, path in enumerate(paths):
            r, alpha, name = 1 + number % 3, (0.5, 4.0)[number % 2], prefix.format(canonical(path).replace(".", dot))
            d_out, d_in = getattr(pipe, component).get_submodule(path).weight.shape
            down, up = torch.randn(r, d_in).half(), torch.randn(d_out, r).half()
            tensors |= {f"{name}.{lora_down}.weight": down, f"{name}.{lora_up}.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            expected[component, path] = alpha / r * up.float() @ down.float()
    save_file(tensors, tmp_path / "resized.safetensors")
    load_adapter(pipe, tmp_path / "resized.safetensors", "cat")
    for (component, path), dense in expected.items():
        found = getattr(pipe, component).get_submodule(path).get_delta_weight("cat")
        torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


def test_a_textual_inversion_of_two_encoders_is_all_or_nothing(
    sdxl_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = sdxl_file[0]
    monkeypatch.setattr(pipe, "tokenizer_2", copy.deepcopy(pipe.tokenizer_2))  # the tiny pipeline has one for both
    sizes = [getattr(pipe, f"text_encoder{side}").get_input_embeddings().weight.shape[1] for side in ("", "_2")]
    save_file({"clip_l": torch.randn(2, sizes[0]), "clip_g": torch.randn(2, sizes[1])}, tmp_path / "pet.safetensors")
    before = [getattr(pipe, f"text_encoder{side}").get_input_embeddings().weight.clone() for side in ("", "_2")]
    lengths = len(pipe.tokenizer), len(pipe.tokenizer_2)
    load = type(pipe).load_textual_inversion

    def fail_second(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs["tokenizer"] is pipe.tokenizer_2:
            raise RuntimeError("no more memory")
        load(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "load_textual_inversion", fail_second)
        with pytest.raises(UserError, match="no more memory"):
            load_adapter(pipe, tmp_path / "pet.safetensors")
    assert (len(pipe.tokenizer), len(pipe.tokenizer_2)) == lengths
    after = [getattr(pipe, f"text_encoder{side}").get_input_embeddings().weight for side in ("", "_2")]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    load_adapter(pipe, tmp_path / "pet.safetensors")
    assert (len(pipe.tokenizer), len(pipe.tokenizer_2)) == (lengths[0] + 2, lengths[1] + 2)


def broken(kind: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        down = next(key for key in sorted(tensors) if "lora_down" in key)
        if kind == "half":
            del tensors[down]
        elif kind == "nan":
            tensors[down][0] = float("nan")
        elif kind == "shape":
            tensors[down] = torch.zeros(tensors[down].shape[0], 5)
        elif kind == "rank":
            tensors[down] = torch.zeros(7, tensors[down].shape[1])
        elif kind == "unknown module":
            tensors["lora_unet_nowhere.lora_down.weight"] = tensors[down].clone()
            tensors["lora_unet_nowhere.lora_up.weight"] = torch.zeros(8, tensors[down].shape[0])
        elif kind == "key":
            tensors["lora_unet_x.surprise"] = tensors[down].clone()
        return tensors

    return change


BROKEN = {
    "half": "factors of .* are missing", "nan": "NaN", "shape": "made for another base", "rank": "different ranks",
    "unknown module": "made for another base", "key": "belongs to no known kind",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_and_change_nothing(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path, kind: str
) -> None:
    before, tensors = state(pipe), load_file(made["kohya"][0])
    save_file(broken(kind)(tensors), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=BROKEN[kind]):
        load_adapter(pipe, tmp_path / "x.safetensors")
    assert same(state(pipe), before) and list_adapters(pipe) == {}


@pytest.mark.parametrize("name", ["kohya", "lycoris-loha", "peft"])
def test_a_failed_load_removes_everything(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.loaders import foreign as foreign_loading

    before = state(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(foreign_loading, "_check_applied", fail)
    with pytest.raises(UserError, match="no more memory"):
        load_adapter(pipe, made[name][0], "cat")
    assert same(state(pipe), before) and list_adapters(pipe) == {}


def test_a_failure_inside_peft_leaves_nothing_behind(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, create, calls = state(pipe), LoHaModel._create_and_replace, []

    def fail_third(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more memory")
        create(self, *args, **kwargs)

    monkeypatch.setattr(LoHaModel, "_create_and_replace", fail_third)
    with pytest.raises(UserError, match="no more memory"):
        load_adapter(pipe, made["peft-loha"][0], "cat")
    assert same(state(pipe), before) and list_adapters(pipe) == {}
    load_adapter(pipe, made["peft-loha"][0], "cat")
    torch.testing.assert_close(output(pipe), made["peft-loha"][1], atol=1e-5, rtol=1e-4)


OTHERS = {
    "checkpoint": ({"model.diffusion_model.input_blocks.0.weight": (4, 4)}, "whole checkpoint"),
    "oft": ({"unet.to_q.oft_blocks": (2, 4, 4)}, "OFT"),
    "difference": (
        {"lora_unet_x.diff_b": (4, 4)},
        "the difference of a bias, which cannot be read: load the file with",
    ),
    "model": ({"conv_in.weight": (4, 4), "conv_in.bias": (4,)}, "a whole model"),
    "nothing known": ({"a.b": (2, 2), "c.d": (2, 2)}, "not an adapter of this toolkit"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_with_a_reason(pipe: Any, tmp_path: Path, name: str) -> None:
    shapes, message = OTHERS[name]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        load_adapter(pipe, tmp_path / "x.safetensors")


def test_textual_inversion(pipe: Any, tmp_path: Path, render: Any) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-toy>": torch.randn(2, 16)}, file)
    info = inspect_adapter(tmp_path)
    assert (info.kind, info.trigger, info.r) == ("textual inversion", "<cat-toy>", 2)
    length = len(pipe.tokenizer)
    load_adapter(pipe, file)
    assert len(pipe.tokenizer) == length + 2
    token = pipe.tokenizer.convert_tokens_to_ids("<cat-toy>")
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[token], load_file(file)["<cat-toy>"][0])
    with pytest.raises(UserError, match="the pipeline already has the token"):
        load_adapter(pipe, file)
    save_file({"emb_params": torch.randn(1, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="made for another base"):
        load_adapter(pipe, tmp_path / "other.safetensors")


def test_damaged_lora_settings_are_refused(pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    source = made["peft-loha"][0]
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="LoRA settings are damaged"):
        load_adapter(pipe, tmp_path, "cat")
    assert list_adapters(pipe) == {}


# Import onto a basis


@pytest.mark.parametrize("preset", [nora, nora_input])
def test_export_and_import_is_lossless(pipe: Any, tmp_path: Path, preset: Any) -> None:
    """A NoRA exported to a plain LoRA and projected back onto the same basis gives the same update."""
    add_adapter(pipe, preset(r=4, inner_r=2, alpha=2.0, basis="svd"), "one", ("unet", "text_encoder"))
    randomize(pipe)
    expected = output(pipe)
    save_adapter(pipe, tmp_path / "dog", "one", info={"trigger": "sks"})
    delete_adapter(pipe, "one")
    before = state(pipe)
    export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", format="kohya")
    report = import_lora(pipe, tmp_path / "dog.safetensors", tmp_path / "back", preset(r=4, inner_r=2, basis="svd"))
    assert report.lost < 1e-5 and max(report.layers.values()) < 1e-5
    assert same(state(pipe), before) and list_adapters(pipe) == {}
    loaded = load_adapter(pipe, report.path, "back")
    assert loaded.trigger == "sks"
    torch.testing.assert_close(output(pipe), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="not a LoRA of another tool"):
        import_lora(pipe, tmp_path / "dog", tmp_path / "again")


@pytest.mark.parametrize("basis", ["svd", "awsvd", "orthogonal"])
@pytest.mark.parametrize("core", ["nested", "dense", "input"])
def test_projection_is_optimal(basis: Any, core: str) -> None:
    """Against a dense oracle: least squares over all cores, and no rank-r' core is nearer than the one chosen.

    An input core is a nested one whose ``B_out`` is the identity.
    """
    torch.manual_seed(0)
    weight, strength, dense = torch.randn(12, 10), torch.rand(10) + 0.1, torch.randn(12, 10).double()
    down, up = BASES[basis](weight, 5, strength, placement="sqrt", power=0.5)
    down, up = down.double().contiguous(), up.double().contiguous()
    a, b = project(dense, down, None if core == "input" else up, None if core == "dense" else 2)
    up = torch.eye(12).double() if core == "input" else up
    error = (dense - up @ b @ a @ down).norm()
    # Oracle: vec(B M A) = (B kron A^T) vec(M).
    system = torch.kron(up, down.T.contiguous())
    solution = torch.linalg.lstsq(system, dense.reshape(-1, 1)).solution.reshape(-1, 5)
    best = (dense - up @ solution @ down).norm()
    if core == "dense":
        torch.testing.assert_close(error, best)
        return
    inside = up @ solution @ down
    tail = torch.linalg.svdvals(inside)[2:]
    torch.testing.assert_close(error.square(), best.square() + tail.square().sum())
    for _ in range(20):
        other = up @ (b + 0.01 * torch.randn_like(b)) @ (a + 0.01 * torch.randn_like(a)) @ down
        assert (dense - other).norm() >= error


def test_import_reports_its_error(pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    for name in ("lycoris-loha", "diffusers", "peft-lokr"):
        losses = {}
        for inner_r in (1, 4):
            config = nora(r=4, inner_r=inner_r, basis="svd", basis_dtype="float32")
            report = import_lora(pipe, made[name][0], tmp_path / f"{name}{inner_r}", config)
            losses[inner_r] = report.lost
            assert 0 < report.lost <= 1 and all(0 <= lost <= 1 + 1e-6 for lost in report.layers.values())
        assert losses[4] < losses[1]
        # At full rank a basis spans every square weight, so nothing is lost.
        config = nora(r=512, inner_r=512, basis="orthogonal", basis_dtype="float32")
        report = import_lora(pipe, made[name][0], tmp_path / f"{name}-whole", config)
        paths = [path for path in report.layers if path.startswith("unet.")]
        shapes = {path: pipe.unet.get_submodule(path.removeprefix("unet.")).weight for path in paths}
        square = [path for path, weight in shapes.items() if weight.shape[0] == weight[0].numel()]
        assert square and all(report.layers[path] < 1e-5 for path in square)


def test_an_import_onto_a_random_basis_can_be_repeated(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    files = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        report = import_lora(
            pipe, made["diffusers"][0], tmp_path / str(number), nora(r=4, basis="orthogonal"), seed=seed
        )
        assert inspect_adapter(report.path).seed == seed
        files.append(load_file(report.path))
    equal = [all(torch.equal(files[0][key], other[key]) for key in files[0]) for other in files]
    assert equal == [True, True, False]
    with pytest.raises(UserError, match="the seed must be"):
        import_lora(pipe, made["diffusers"][0], tmp_path / "none", seed=-1)


def test_the_folder_of_a_peft_file_tells_its_text_encoder(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sdxl", tmp_path)
    add_adapter(pipe, lora(r=2), "one", ("text_encoder_2",))
    randomize(pipe, size=0.5)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = pipe.text_encoder_2(ids).last_hidden_state
        save_adapter(pipe, tmp_path / "dog", "one")
        delete_adapter(pipe, "one")
        export_lora(tmp_path / "dog", tmp_path / "peft", format="peft")
        load_adapter(pipe, tmp_path / "peft" / "text_encoder_2", "plain")
        torch.testing.assert_close(pipe.text_encoder_2(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    assert list_adapters(pipe) == {"text_encoder_2": ["plain"]}
    (tmp_path / "peft" / "text_encoder_2").rename(tmp_path / "peft" / "elsewhere")
    with pytest.raises(UserError, match="whether it is for text_encoder or text_encoder_2"):
        load_adapter(pipe, tmp_path / "peft" / "elsewhere", "other")


def test_a_locon_in_tucker_form_is_imported_but_not_loaded(pipe: Any, tmp_path: Path) -> None:
    before, name = output(pipe), "lora_unet_mid_block_resnets_0_conv1"
    factors = {"down": torch.randn(2, 16, 1, 1), "mid": torch.randn(2, 2, 3, 3), "up": 0.1 * torch.randn(16, 2, 1, 1)}
    save_file({f"{name}.lora_{key}.weight": value for key, value in factors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"Tucker form \(lora_mid\).*import"):
        load_adapter(pipe, tmp_path / "x.safetensors")
    assert torch.equal(output(pipe), before) and list_adapters(pipe) == {}
    config = lora_xs(r=16, basis="orthogonal", basis_dtype="float32")
    report = import_lora(pipe, tmp_path / "x.safetensors", tmp_path / "imported", config)
    dense = torch.einsum("or,rskl,sc->ockl", factors["up"].flatten(1), factors["mid"], factors["down"].flatten(1))
    load_adapter(pipe, report.path, "one")
    layer = pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    basis = layer.delta("one").A_out  # spans all rows of the kernel, and 16 of its 144 columns
    kept = dense.flatten(1) @ basis.T @ basis
    torch.testing.assert_close(layer.get_delta_weight("one").flatten(1), kept, atol=1e-5, rtol=1e-4)


def test_an_import_leaves_adapters_and_config_unchanged(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    add_adapter(pipe, lora(r=2), "one")
    randomize(pipe)
    before, config = output(pipe), nora(r=4, inner_r=2, basis="svd", dropout=0.5)
    import_lora(pipe, made["kohya"][0], tmp_path / "x", config)
    assert torch.equal(output(pipe), before)
    assert all(parameter.requires_grad for parameter in trainable_parameters(pipe, "one").values())
    assert config.dropout == 0.5 and config.target_modules == nora().target_modules


def test_a_loha_with_magnitudes_is_not_sent_to_import(
    pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """Import reads no magnitudes either."""
    tensors = load_file(made["lycoris-loha"][0])
    name = next(key for key in tensors if key.endswith(".hada_w1_a"))
    save_file(
        tensors | {name.replace("hada_w1_a", "dora_scale"): torch.ones(len(tensors[name]), 1)},
        tmp_path / "x.safetensors",
    )
    before = state(pipe)
    with pytest.raises(
        UserError, match=r"a kohya LoHa file of another tool with magnitudes \(dora_scale\).*load it with the tool"
    ):
        load_adapter(pipe, tmp_path / "x.safetensors", "one")
    assert same(state(pipe), before)


def test_import_refusals(pipe: Any, made: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    before = state(pipe)
    with pytest.raises(UserError, match="no frozen basis"):
        import_lora(pipe, made["kohya"][0], tmp_path / "x", lora(r=4))
    tensors = load_file(made["kohya"][0])
    save_file(broken("shape")(tensors), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="made for another base"):
        import_lora(pipe, tmp_path / "x.safetensors", tmp_path / "x")
    assert same(state(pipe), before) and not (tmp_path / "x").exists()
    kept = import_lora(pipe, made["kohya"][0], tmp_path / "x", lora_xs(r=4, basis="svd")).path.read_bytes()
    with pytest.raises(UserError, match="x already holds an adapter: choose another folder"):
        import_lora(pipe, made["kohya"][0], tmp_path / "x")
    assert (tmp_path / "x" / FILE_NAME).read_bytes() == kept


def test_the_file_names_are_those_of_peft() -> None:
    """They are stated in ``formats.foreign``, so that files are recognized without importing PEFT."""
    assert (PEFT_FILE, PEFT_CONFIG) == (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
