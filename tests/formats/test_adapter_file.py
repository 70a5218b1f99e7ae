"""Adapter files: sizes, metadata, refusals, and export to plain LoRA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from architectures import tiny_pipeline
from diffusers.utils import peft_utils
from factories import randomize, tiny_random_pipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nora_diffusion import (
    UserError,
    add_adapter,
    add_to_pack,
    create_pack,
    delete_adapter,
    export_lora,
    inspect_adapter,
    list_pack,
    load_adapter,
    mixed_batch,
    open_pipeline,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import AdapterConfig, lora, lora_mini, lora_xs, mor, nora
from nora_diffusion.composition.sources import loaded_source
from nora_diffusion.conversion.plain_pair import PlainPair
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.formats.model_card import write_card
from nora_diffusion.formats.packs import SUFFIX
from nora_diffusion.loaders import list_adapters, set_rank
from nora_diffusion.pipelines.components import canonical, components, nora_layers

COMPONENTS = ("unet", "text_encoder")
EVERYTHING = ["attn", "ff", "proj", "conv"]
METHODS = {"nora": nora(r=4, inner_r=2, alpha=2.0), "lora": lora(r=3, alpha=6.0), "lora_xs": lora_xs(r=4)}


def trained(pipe: Any, config: Any, names: tuple[str, ...] = COMPONENTS) -> None:
    add_adapter(pipe, config, "one", names)
    randomize(pipe)


@pytest.fixture
def saved(pipe: Any, tmp_path: Path) -> Path:
    trained(pipe, nora(r=4, inner_r=2))
    folder = tmp_path / "dog"
    save_adapter(pipe, folder, "one", info={"trigger": "sks", "step": 7, "seed": 3, "instance_prompt": "a sks dog"})
    delete_adapter(pipe, "one")
    return folder


def test_file_describes_itself(saved: Path, tiny_base: Path) -> None:
    info = inspect_adapter(saved)
    assert (info.method, info.r, info.inner_r) == ("nora", 4, 2)
    assert (info.trigger, info.step, info.seed) == ("sks", 7, 3)
    assert info.base == str(tiny_base)
    assert set(info.components) == set(COMPONENTS)
    assert {"torch", "diffusers", "peft"} <= set(info.versions)
    with safe_open(saved / FILE_NAME, "pt") as reader:
        keys = list(reader.keys())
        assert not any("lora" in key for key in keys)
        inner = [reader.get_tensor(key).numel() for key in keys if key.endswith(("A_in", "B_in"))]
    assert info.trained_parameters == sum(inner)
    with pytest.warns(DeprecationWarning, match="use trained_parameters"):
        assert info.trained_numbers == info.trained_parameters
    with pytest.warns(DeprecationWarning, match="use stored_parameters"):
        assert info.stored_numbers == info.stored_parameters
    card = (saved / "README.md").read_text()
    assert "sks" in card and "A nora adapter (r = 4, r' = 2) for" in card
    info.license = "mine: see LICENSE #1"
    front_matter = yaml.safe_load(write_card(saved, info).read_text().split("---\n")[1])
    assert (front_matter["base_model"], front_matter["license"]) == (str(tiny_base), info.license)


def test_a_foreign_readme_is_left_unchanged(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = tmp_path / "README.md"
    write_card(tmp_path, inspect_adapter(saved))
    ours = card.read_text()
    write_card(tmp_path, inspect_adapter(saved), "more")
    assert card.read_text() == f"{ours}\nmore\n" and not caplog.text
    card.write_text("My notes on library_name: nora_diffusion")
    write_card(tmp_path, inspect_adapter(saved))
    assert card.read_text().startswith("My notes") and "README.md is not a model card" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (nora(r=8, inner_r=2), "r = 8, r' = 2"),
        (nora(r=8, inner_r=2, inner_rank_pattern={"to_q": 3, "to_k": 1}), "r = 8, r' = 1 to 3 by layer"),
        (lora_mini(r=8, inner_r=1), "r = 8, r' = 1"),
        (nora(r=8, core="dense"), "r = 8"),
        (lora(r=3), "r = 3"),
    ],
)
def test_ranks_name_the_inner_rank_if_there_is_one(config: AdapterConfig, expected: str) -> None:
    assert AdapterInfo(components={"unet": config.to_dict()}).ranks == expected


def test_expected_sizes_on_the_layout_of_sd_1_5(tmp_path: Path) -> None:
    """r = 32, r' = 4: 32,768 trained parameters, at most 128 KB with a shared basis in fp16, names included."""
    from diffusers import UNet2DConditionModel

    # A tenth of the channels of SD 1.5: trained parameters depend only on the ranks and the number of projections.
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), cross_attention_dim=77, attention_head_dim=8,
        norm_num_groups=8,
    )  # fmt: skip

    class Holder:
        name_or_path = "runwayml/stable-diffusion-v1-5"
        config: ClassVar[dict[str, str]] = {}

    holder = Holder()
    holder.unet = unet  # type: ignore[attr-defined]
    add_adapter(holder, nora(r=32, inner_r=4, basis="svd"), "one")
    file = save_adapter(holder, tmp_path / "dog", "one", basis="shared", dtype="fp16", info={"trigger": "sks"})
    info = inspect_adapter(file)
    assert info.trained_parameters == info.stored_parameters == 32_768
    assert file.stat().st_size <= 128 * 1024
    assert len(list((tmp_path / "bases").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("verb", [set_adapters, delete_adapter, set_rank, "source", "save", "batch"])
def test_an_unknown_name_lists_the_known_ones(pipe: Any, tmp_path: Path, verb: Any) -> None:
    trained(pipe, METHODS["lora"], ("unet",))
    with pytest.raises(UserError, match=r"^there is no adapter named 'ghost' in the pipeline: it has one$"):
        if verb == "source":
            loaded_source(components(pipe), "ghost")
        elif verb == "save":
            save_adapter(pipe, tmp_path, "ghost")
        elif verb == "batch":
            with mixed_batch(pipe, ["one", "ghost"]):
                pass
        else:
            verb(pipe, "ghost")


def test_equal_adapters_are_equal_files(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, METHODS["nora"])
    files = [save_adapter(pipe, tmp_path / name, "one", info={"trigger": "sks"}) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shared_basis_is_stored_once_and_checked(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, nora(r=4, inner_r=2, basis="svd"))
    state = {k: v.clone() for k, v in pipe.unet.state_dict().items() if "nora_" in k}
    for name in ("dog", "cat"):
        save_adapter(pipe, tmp_path / name, "one", basis="shared")
    (basis,) = (tmp_path / "bases").iterdir()
    delete_adapter(pipe, "one")
    load_adapter(pipe, tmp_path / "dog", "one")
    assert all(torch.equal(pipe.unet.state_dict()[k], v) for k, v in state.items())
    delete_adapter(pipe, "one")
    tensors = load_file(basis)
    tensors[next(iter(tensors))][0, 0] += 1
    save_file(tensors, basis)
    with pytest.raises(UserError, match="its hash is not its file name"):
        load_adapter(pipe, tmp_path / "dog")
    basis.unlink()
    with pytest.raises(UserError, match="not found in"):
        load_adapter(pipe, tmp_path / "dog")
    assert list_adapters(pipe) == {}


def test_a_shared_basis_is_found_through_links_and_packs(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From inside the adapter's folder, through links to the folder and to a pack, and despite a damaged copy."""
    trained(pipe, nora(r=4, inner_r=2, basis="svd"))
    save_adapter(pipe, tmp_path / "shelf" / "dog", "one", basis="shared")
    pack = create_pack(tmp_path / "packs" / f"pets{SUFFIX}", [tmp_path / "shelf" / "dog"])
    delete_adapter(pipe, "one")
    links = tmp_path / "links"
    links.mkdir()
    (links / "dog").symlink_to("../shelf/dog")
    (links / pack.name).symlink_to(pack)
    monkeypatch.chdir(tmp_path / "shelf" / "dog")
    for path in (".", FILE_NAME, links / "dog", f"{links / pack.name}#dog"):
        load_adapter(pipe, path, "two")
        delete_adapter(pipe, "two")
    (basis,) = (tmp_path / "packs" / "bases").iterdir()
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / basis.name).write_bytes(basis.read_bytes()[:-1])
    load_adapter(pipe, f"{pack}#dog", "two")
    assert add_to_pack(links / pack.name, {"cat": tmp_path / "shelf" / "dog"}) == pack
    assert len(list_pack(pack)) == 2 and (links / pack.name).is_symlink()


def damage(saved: Path, how: str) -> None:
    file = saved / FILE_NAME
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "web page":
        file.write_text("<!DOCTYPE html><html>not found</html>")
    elif how == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    else:
        with safe_open(file, "pt") as reader:
            metadata = dict(reader.metadata())
        tensors = load_file(file)
        key = sorted(tensors)[0]
        if how == "nan":
            tensors[key][0] = float("nan")
        elif how == "missing":
            del tensors[key]
        elif how == "extra":
            tensors["unet.nowhere.nora_A_in"] = torch.zeros(2, 4)
        elif how == "shape":
            tensors[key] = torch.zeros(3, 3)
        elif how == "integers":
            tensors[key] = torch.zeros(3, 3, dtype=torch.int64)
        elif how == "metadata":
            metadata["nora"] = "{"
        elif how == "newer":
            metadata["nora"] = json.dumps({"format_version": 99})
        elif how == "no metadata":
            del metadata["nora"]
        save_file(tensors, file, metadata)


FAULTS = {
    "truncated": "damaged or truncated", "empty": "empty, truncated", "web page": "web page", "lfs": "LFS pointer",
    "nan": "NaN", "missing": "does not match", "extra": "does not match", "shape": "does not match",
    "integers": "not a float dtype", "metadata": "metadata is damaged", "newer": "version 99",
    "no metadata": "not an adapter of",
}  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_damaged_files_are_refused_before_the_model_is_touched(pipe: Any, saved: Path, render: Any, how: str) -> None:
    before, keys = render(pipe), list(pipe.unet.state_dict())
    damage(saved, how)
    with pytest.raises(UserError, match=FAULTS[how]):
        load_adapter(pipe, saved)
    assert list(pipe.unet.state_dict()) == keys
    assert torch.equal(render(pipe), before)


def test_another_base_is_refused_and_both_are_named(saved: Path, tmp_path: Path, tiny_base: Path) -> None:
    other = open_pipeline(tiny_random_pipeline(tmp_path / "other", seed=9))
    with pytest.raises(UserError, match="other") as caught:
        load_adapter(other, saved)
    assert str(tiny_base) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_of_the_base_match(saved: Path, pipe: Any, dtype: torch.dtype) -> None:
    pipe.to(dtype=dtype)
    loaded = load_adapter(pipe, saved)
    assert loaded.applied == loaded.total


def test_other_refusals(pipe: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for path, message in [(tmp_path / "nothing", "no adapter at"), (tmp_path / "old.ckpt", "not a safetensors file")]:
        with pytest.raises(UserError, match=message):
            load_adapter(pipe, path)
    load_adapter(pipe, saved, "one")
    with pytest.raises(UserError, match="already in"):
        load_adapter(pipe, saved, "one")
    pipe.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        load_adapter(pipe, saved, "two")
    pipe.unfuse_lora()


def test_a_failed_load_removes_the_adapter(
    pipe: Any, saved: Path, render: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.loaders import load

    before, fill = render(pipe), load._fill

    def fail_on_text(module: Any, component: str, name: str, tensors: Any) -> None:
        if component == "text_encoder":
            raise MemoryError
        fill(module, component, name, tensors)

    monkeypatch.setattr(load, "_fill", fail_on_text)
    with pytest.raises(MemoryError):
        load_adapter(pipe, saved)
    assert list_adapters(pipe) == {}
    assert torch.equal(render(pipe), before)


def test_a_failed_injection_leaves_other_adapters_unchanged(
    pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in one component does not affect an adapter of the same name in another."""
    from nora_diffusion.loaders import add

    add_adapter(pipe, lora(r=2), "dog", "unet")
    add_adapter(pipe, lora(r=2), "cat", "unet")
    trainable = [p.requires_grad for p in pipe.unet.parameters()]

    set_active = add.set_active

    def fail_on_text(module: Any, names: list[str]) -> None:
        if module is pipe.text_encoder:
            raise MemoryError
        set_active(module, names)

    monkeypatch.setattr(add, "set_active", fail_on_text)
    for name, names in (("dog", "text_encoder"), ("bird", COMPONENTS)):
        with pytest.raises(MemoryError):
            add_adapter(pipe, lora(r=2), name, names)
        assert list_adapters(pipe) == {"unet": ["dog", "cat"]}
        assert [p.requires_grad for p in pipe.unet.parameters()] == trainable


def test_a_failed_first_injection_leaves_nothing_behind(pipe: Any, render: Any) -> None:
    before, trainable = render(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    modules = {component: dict(getattr(pipe, component).named_modules()) for component in COMPONENTS}
    with pytest.raises(UserError, match="token router cannot gate"):
        add_adapter(pipe, mor(r=2, num_experts=2, target_modules=["attn", "conv"]), "one", ("text_encoder", "unet"))
    assert list_adapters(pipe) == {}
    assert all(dict(getattr(pipe, component).named_modules()) == found for component, found in modules.items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == trainable
    assert torch.equal(render(pipe), before)
    trained(pipe, mor(r=2, num_experts=2))
    assert not torch.equal(render(pipe), before)


def test_a_failed_save_keeps_the_old_file(pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    old = (saved / FILE_NAME).read_bytes()
    load_adapter(pipe, saved, "one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(pipe, saved, "one", info={"step": 8})
    assert (saved / FILE_NAME).read_bytes() == old
    assert not [f for f in saved.iterdir() if f.name.startswith(".")]


def test_an_adapter_from_the_hub_is_named_after_its_repository(
    pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = shutil.copytree(saved, saved.parent / "0f3a9c0f3a9c")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file: str(folder / file))
    assert load_adapter(pipe, "somebody/my.dog").name == "my_dog"


def test_a_hub_repository_may_hold_a_shared_basis_or_a_lora(
    pipe: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    remote, cache = tmp_path / "remote", tmp_path / "cache"
    load_adapter(pipe, saved, "one")
    save_adapter(pipe, remote / "shared", "one", basis="shared", basis_dir=remote / "shared/bases")
    (remote / "lora").mkdir()
    export_lora(saved, remote / "lora/pytorch_lora_weights.safetensors")
    (remote / "empty").mkdir()

    def download(repository: str, file: str) -> str:
        name = repository.rpartition("/")[2]
        if not (remote / name / file).is_file():
            raise EntryNotFoundError(f"404: {file}")
        (cache / name / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(remote / name / file, cache / name / file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_adapter(pipe, "somebody/shared").info.basis == "shared"
    assert load_adapter(pipe, "somebody/lora").applied > 0
    with pytest.raises(UserError, match="holds no adapter: it has none of nora_adapter"):
        load_adapter(pipe, "somebody/empty")


def test_files_get_the_permissions_of_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask itself, which all threads share, is never changed."""
    import os

    from nora_diffusion.io.files import write_atomic

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("another thread could write with this umask"))
            file = write_atomic(tmp_path / "x" / "y.txt", "text")
        assert file.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_unknown_info_is_refused(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, lora(r=2))
    with pytest.raises(UserError, match="triger"):
        save_adapter(pipe, tmp_path, "one", info={"triger": "sks"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [None, EVERYTHING], ids=["attn", "everything"])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_export_is_exact_in_stock_diffusers(
    pipe: Any, render: Any, tmp_path: Path, method: str, targets: Any, form: Any
) -> None:
    presets = {"nora": nora, "lora": lora, "lora_xs": lora_xs}
    before = render(pipe)
    trained(pipe, presets[method](r=4, alpha=2.0, target_modules=targets))
    image = render(pipe)
    save_adapter(pipe, tmp_path / "dog", "one")
    delete_adapter(pipe, "one")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", format=form)
    assert report.relative_error < 1e-6
    assert report.rank == 4
    pipe.load_lora_weights(str(tmp_path / "dog.safetensors"), adapter_name="plain")
    torch.testing.assert_close(render(pipe), image, atol=2e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(render(pipe), before)


@pytest.mark.parametrize(
    ("model", "names", "prefix"),
    [("sd1", COMPONENTS, "lora_te_"), ("sd2", COMPONENTS, "lora_te_"), ("sdxl", COMPONENTS, "lora_te1_"),
     ("sdxl", (*COMPONENTS, "text_encoder_2"), "lora_te1_")],
)  # fmt: skip
def test_kohya_names_the_first_of_two_text_encoders(
    tmp_path: Path, model: str, names: tuple[str, ...], prefix: str
) -> None:
    pipe = tiny_pipeline(model, tmp_path)
    trained(pipe, lora(r=2), names)
    save_adapter(pipe, tmp_path / "dog", "one")
    keys = load_file(export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", format="kohya").path)
    assert {"lora_unet_", prefix} == {key[: key.index("_", 5) + 1] for key in keys if not key.startswith("lora_te2_")}


def test_an_export_needs_a_file_name_of_its_format(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, METHODS["nora"], ("unet",))
    source = save_adapter(pipe, tmp_path / "dog", "one")
    for name, form, message in [("a/dog.pt", "kohya", "end it in .safetensors"),
                              ("a/dog.safetensors", "peft", "PEFT's format is a folder")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            export_lora(source, tmp_path / name, form)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    assert export_lora(source, tmp_path / "v1.5").path == tmp_path / "v1.5" / "lora.safetensors"


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_an_export_replaces_only_exports(pipe: Any, tmp_path: Path, form: Any) -> None:
    trained(pipe, METHODS["nora"], ("unet",))
    source, foreign = save_adapter(pipe, tmp_path / "dog", "one"), {"weight": torch.ones(2)}
    target = tmp_path / ("peft" if form == "peft" else "dog.safetensors")
    file = target / "unet" / "adapter_model.safetensors" if form == "peft" else target
    in_the_way = [file, file.with_name("adapter_config.json")] if form == "peft" else [file]
    for path in in_the_way:
        path.parent.mkdir(exist_ok=True, parents=True)
        save_file(foreign, path)
        with pytest.raises(UserError, match="exists and is not an export of nora_diffusion: choose another name"):
            export_lora(source, target, form)
        assert load_file(path).keys() == foreign.keys()
        path.unlink()
    export_lora(source, target, form)
    assert export_lora(source, target, form, dtype="fp16").path == target
    if form != "peft":
        before = source.read_bytes()
        with pytest.raises(UserError, match="is not an export"):
            export_lora(source, source, form)
        assert source.read_bytes() == before


def test_export_to_peft_loads_in_peft(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, METHODS["nora"], ("unet",))
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = pipe.unet(x, 3, states).sample
        save_adapter(pipe, tmp_path / "dog", "one")
        delete_adapter(pipe, "one")
        export_lora(tmp_path / "dog", tmp_path / "peft", format="peft")
        model = PeftModel.from_pretrained(pipe.unet, tmp_path / "peft" / "unet")
        torch.testing.assert_close(model(x, 3, states).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_the_rank_of_a_top_level_projection_is_its_own(tmp_path: Path, form: Any) -> None:
    """Flux has a ``proj_out`` at the top level and one in each single block."""
    pipe = tiny_pipeline("flux", tmp_path)
    trained(pipe, lora(r=4, target_modules=["proj"], rank_pattern={"^proj_out": 2}), ("transformer",))
    expected = {path: layer.get_delta_weight("one") for path, layer in nora_layers(pipe.transformer, "one").items()}
    save_adapter(pipe, tmp_path / "dog", "one")
    delete_adapter(pipe, "one")
    file = export_lora(tmp_path / "dog", tmp_path / ("peft" if form == "peft" else "dog.safetensors"), format=form).path
    if form == "peft":
        name, model = "default", PeftModel.from_pretrained(pipe.transformer, file / "transformer").base_model.model
    else:
        pipe.load_lora_weights(str(file), adapter_name="plain")
        name, model = "plain", pipe.transformer
    for path, dense in expected.items():
        torch.testing.assert_close(model.get_submodule(path).get_delta_weight(name), dense, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("model", "component"), [("sd3", "text_encoder_3"), ("flux", "text_encoder_2")])
def test_an_export_reports_that_diffusers_ignores_t5(tmp_path: Path, model: str, component: str) -> None:
    pipe = tiny_pipeline(model, tmp_path)
    trained(pipe, lora(r=2), ("transformer", "text_encoder", component))
    save_adapter(pipe, tmp_path / "dog", "one")
    delete_adapter(pipe, "one")
    note = "its T5 layers are read by ComfyUI"
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors")
    assert note in report.note
    assert note not in export_lora(tmp_path / "dog", tmp_path / "peft", format="peft").note
    pipe.load_lora_weights(str(report.path), adapter_name="plain")
    assert {component for component, names in list_adapters(pipe).items() if names} == {"transformer", "text_encoder"}
    loaded = load_adapter(pipe, report.path, "whole")
    assert loaded.applied == loaded.total == report.keys
    assert component in list_adapters(pipe)


def test_alpha_is_the_rank_in_every_precision() -> None:
    """bf16 cannot represent 257, so a reader would scale by 256 / 257 (MoRA and MELoRA have such ranks)."""
    pair = PlainPair("unet", "to_q", torch.randn(257, 300).double(), torch.randn(300, 257).double(), None)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert pair.kohya_tensors("x", dtype)["x.alpha"].item() == 257


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_export_of_several_ranks_is_exact_in_stock_diffusers(
    pipe: Any, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora(r=4, alpha=2.0, rank_pattern={"to_q": 3, "q_proj": 1, "conv1": 2}, target_modules=EVERYTHING)
    trained(pipe, config)
    expected = {
        (component, path): layer.get_delta_weight("one")
        for component in COMPONENTS
        for path, layer in nora_layers(getattr(pipe, component), "one").items()
    }
    save_adapter(pipe, tmp_path / "dog", "one")
    delete_adapter(pipe, "one")
    report = export_lora(tmp_path / "dog", tmp_path / "dog.safetensors", format=form)
    assert report.relative_error < 1e-6
    half = export_lora(tmp_path / "dog", tmp_path / "half.safetensors", format=form, dtype="fp16")
    assert 1e-5 < half.relative_error < 2e-3
    newest = peft_utils.get_peft_kwargs

    def as_in_038(ranks: dict[str, int], *args: Any, network_alpha_dict: Any, **more: Any) -> Any:
        found = newest(ranks, *args, network_alpha_dict=network_alpha_dict, **more)
        return found if network_alpha_dict else found | {"lora_alpha": next(iter(ranks.values())), "alpha_pattern": {}}

    monkeypatch.setattr(peft_utils, "get_peft_kwargs", as_in_038)
    for load in (pipe.load_lora_weights, lambda path, adapter_name: load_adapter(pipe, path, adapter_name)):
        load(str(report.path), adapter_name="plain")
        for (component, path), dense in expected.items():
            modules = getattr(pipe, component).named_modules()
            layers = {canonical(name): layer for name, layer in modules if isinstance(layer, LoraLayer)}
            found = layers[path].get_delta_weight("plain").view(dense.shape)
            torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-4)
        delete_adapter(pipe, "plain")


def test_half_precision_export_reports_its_error(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, METHODS["nora"])
    save_adapter(pipe, tmp_path / "dog", "one")
    exact = export_lora(tmp_path / "dog", tmp_path / "a.safetensors")
    half = export_lora(tmp_path / "dog", tmp_path / "b.safetensors", dtype="fp16")
    assert exact.max_error < half.max_error < 1e-3
    assert half.bytes < exact.bytes


def test_export_refusals(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, mor(r=4, num_experts=2))
    save_adapter(pipe, tmp_path / "mix", "one")
    with pytest.raises(UserError, match="gate depends on its input"):
        export_lora(tmp_path / "mix", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="onnx"):
        export_lora(tmp_path / "mix", tmp_path / "x.safetensors", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "x.safetensors").exists()


SCRIPT = """
import sys, torch
from diffusers import StableDiffusionPipeline
base, file, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.load_lora_weights(file)
image = pipe("a dog", num_inference_steps=2, height=16, width=16, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
assert not [name for name in sys.modules if name.startswith("nora_diffusion")]
torch.save(torch.from_numpy(image), out)
"""


def test_export_works_where_this_package_is_not_imported(
    pipe: Any, render: Any, tiny_base: Path, tmp_path: Path
) -> None:
    trained(pipe, METHODS["nora"])
    image = render(pipe)
    save_adapter(pipe, tmp_path / "dog", "one")
    export_lora(tmp_path / "dog", tmp_path / "dog.safetensors")
    out = tmp_path / "image.pt"
    command = [sys.executable, "-c", SCRIPT, str(tiny_base), str(tmp_path / "dog.safetensors"), str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (torch.load(out) - image).abs().max() < 2 / 255


BASE_FAULTS = {
    "absent": ("does not exist", lambda p: shutil.rmtree(p)),
    "index": ("model_index.json is missing", lambda p: (p / "model_index.json").unlink()),
    "list": ("not a table of pipeline components", lambda p: (p / "model_index.json").write_text("[]")),
    "component": ("unet/ is missing", lambda p: shutil.rmtree(p / "unet")),
    "config": ("vae/config.json is missing", lambda p: (p / "vae" / "config.json").unlink()),
    "weights": ("no safetensors weights in unet/", lambda p: next((p / "unet").glob("*.safetensors")).unlink()),
    "pickle": (
        "may run code",
        lambda p: next((p / "unet").glob("*.safetensors")).rename(p / "unet" / "diffusion_pytorch_model.bin"),
    ),
}


@pytest.mark.parametrize("fault", BASE_FAULTS)
def test_a_broken_base_is_explained(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    message, break_it = BASE_FAULTS[fault]
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    break_it(copy)
    with pytest.raises(UserError, match=message):
        open_pipeline(copy)


@pytest.mark.parametrize(("config", "flags"), [(nora(r=4, inner_r=2, basis="svd"), ""), (mor(r=2), " --gate mean")])
def test_the_card_has_the_export_that_works(pipe: Any, tmp_path: Path, config: AdapterConfig, flags: str) -> None:
    add_adapter(pipe, config, "one")
    save_adapter(pipe, tmp_path / "dog", "one")
    assert f"`nora-diffusion export dog dog_lora.safetensors{flags}`" in (tmp_path / "dog/README.md").read_text()


@pytest.mark.parametrize("config", [nora(r=8, inner_r=2), lora(r=2), mor(r=2, num_experts=2)])
def test_axes_of_later_releases_stand_only_in_files_that_use_them(config: AdapterConfig) -> None:
    assert not {"inner_rank_pattern", "rank_scales", "top_k"} & config.to_dict().keys()
    assert "rank_scales" in lora(r=2, rank_scales="linear").to_dict()
