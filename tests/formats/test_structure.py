"""Files that ``load_adapter`` refuses are refused by every other reader too, with a sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nora_diffusion import (
    UserError,
    add_adapter,
    create_pack,
    export_lora,
    inspect_adapter,
    load_adapter,
    mix_files,
    open_pipeline,
    save_adapter,
)
from nora_diffusion.adapters import PRESETS, nora
from nora_diffusion.cli import main
from nora_diffusion.composition.angles import overlap_files
from nora_diffusion.formats.adapter_file import FILE_NAME, read_tensors

TARGETS = ["to_q", "conv1", "q_proj"]
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Contents = tuple[dict[str, Tensor], dict[str, Any]]
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "read": lambda file, out: read_tensors(inspect_adapter(file)),
    "inspect": lambda file, out: _main("inspect", file),
    "mix": lambda file, out: mix_files([(file, 1.0)], out / "mix"),
    "overlap": lambda file, out: overlap_files(file, file),
    "export": lambda file, out: export_lora(file, out / "x.safetensors"),
    "pack": lambda file, out: create_pack(out / "x.nora_pack.safetensors", {"a": file}),
}


def _main(*words: Any) -> None:
    if main([str(word) for word in words]) != 0:
        raise UserError("")


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("written")
    pipe = open_pipeline(tiny_base)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd", target_modules=TARGETS), "one", ("unet", "text_encoder"))
    randomize(pipe)
    save_adapter(pipe, folder, "one")
    return open_pipeline(tiny_base), folder / FILE_NAME


def contents(file: Path) -> Contents:
    with safe_open(file, "pt") as reader:
        return load_file(file), json.loads(reader.metadata()["nora"])


def write(file: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
    save_file(tensors, file, {"nora": json.dumps(values)})
    return file


def flip(key: str, bit: int) -> Callable[[Contents], None]:
    def change(found: Contents) -> None:
        flat = found[0][key].view(torch.uint8).flatten()
        flat[len(flat) // 2] ^= 1 << bit
        found[0][key] = flat.view(found[0][key].dtype).view(found[0][key].shape)

    return change


def drop(key: str) -> Callable[[Contents], Any]:
    return lambda found: found[0].pop(key)


def put(key: str, value: Tensor) -> Callable[[Contents], Any]:
    return lambda found: found[0].update({key: value})


def state(name: str, change: Callable[[Any], Any]) -> Callable[[Contents], Any]:
    return lambda found: found[1].update({name: change(found[1].get(name))})


def config(**axes: Any) -> Callable[[Contents], Any]:
    return lambda found: found[1]["components"]["unet"].update(axes)


CONV = "unet.down_blocks.0.resnets.0.conv1"
DAMAGES: dict[str, Callable[[Contents], Any]] = {
    "a bit of a frozen factor": flip(f"{QUERY}.nora_A_out", 0),
    "a bit of the other frozen factor": flip(f"{QUERY}.nora_B_out", 6),
    "a frozen factor in another dtype": lambda found: found[0].update(
        {f"{QUERY}.nora_A_out": found[0][f"{QUERY}.nora_A_out"].double()}
    ),
    "NaN": put(f"{QUERY}.nora_A_in", torch.full((2, 4), torch.nan)),
    "a missing frozen factor": drop(f"{QUERY}.nora_A_out"),
    "a missing trained factor": drop(f"{QUERY}.nora_A_in"),
    "no factor of a projection": lambda found: [found[0].pop(k) for k in [*found[0]] if k.startswith(QUERY)],
    "a factor of another method": put(f"{QUERY}.nora_m", torch.ones(8)),
    "an unknown factor": put(f"{QUERY}.nora_Z", torch.ones(2)),
    "a key of no factor": put("nothing", torch.ones(2)),
    "a key without a component": put(".nora_A_in", torch.ones(2)),
    "a key of an unknown component": put("vae.conv.nora_A_in", torch.ones(2, 4)),
    "a token that is not stated": put("tokens.0.text_encoder", torch.ones(1, 8)),
    "a stated token that is missing": state("tokens", lambda old: {"<dog>": ["text_encoder"]}),
    "another inner rank": put(f"{QUERY}.nora_A_in", torch.ones(3, 4)),
    "a factor of three dimensions": put(f"{QUERY}.nora_A_in", torch.ones(2, 4, 1)),
    "a vector": put(f"{QUERY}.nora_B_in", torch.ones(4)),
    "an empty factor": put(f"{QUERY}.nora_A_out", torch.ones(4, 0, dtype=torch.float16)),
    "another rank in the config": config(r=8),
    "another core in the config": config(core="dense", inner_r=1),
    "blocks in the config": config(blocks=2),
    "a magnitude in the config": config(magnitude=True),
    "a router in the config": config(router="token", core="none", num_experts=2, trained=["down", "up"]),
    "a pattern that changes a rank": config(rank_pattern={"to_q": 2}),
    "targets that select nothing": config(target_modules=["nowhere"]),
    "targets that leave one out": config(target_modules=["to_q"]),
    "an unknown path in the fingerprint": state("base_fingerprint", lambda old: old["unet"].update(x=1.0) or old),
    "a fingerprint of nothing": state("base_fingerprint", lambda old: {**old, "unet": {}}),
    "a component less": state("components", lambda old: {"unet": old["unet"]}),
    "a kernel of another size": state("conv_shapes", lambda old: {**old, CONV: [5, 3, 3]}),
    "a kernel of a linear layer": state("conv_shapes", lambda old: {**old, QUERY: [1, 3, 3]}),
    "a shape that contradicts the factors": state("shapes", lambda old: {QUERY: [3, 3]}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_reader_refuses_what_the_loader_refuses(written: tuple[Any, Path], tmp_path: Path, name: str) -> None:
    pipe, source = written
    found = contents(source)
    DAMAGES[name](found)
    file = write(tmp_path / FILE_NAME, *found)
    with pytest.raises(UserError):
        load_adapter(pipe, file, "guest")
    for verb, reader in READERS.items():
        with pytest.raises(UserError) as error:
            reader(file, tmp_path / verb)
        assert verb == "inspect" or str(file) in str(error.value), verb
    assert not [path for verb in READERS for path in (tmp_path / verb).rglob("*.safetensors")]


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_matches_its_own_description(tiny_base: Path, tmp_path: Path, method: str) -> None:
    pipe = open_pipeline(tiny_base)
    names = ["unet"] if method in ("mor", "moe_lora", "malora") else ["unet", "text_encoder"]
    options = {"nora": {"basis": "svd"}, "malora": {"inner_r": 2}}.get(method, {})
    add_adapter(pipe, PRESETS[method](r=4, target_modules=["attn"], **options), "one", names)
    file = save_adapter(pipe, tmp_path / "one", "one")
    tensors = read_tensors(inspect_adapter(file))
    first = sorted(tensors)[0]
    for change in (drop(first), put(first, torch.ones(tensors[first].shape[0] + 1))):
        found = contents(file)
        change(found)
        with pytest.raises(UserError):
            read_tensors(inspect_adapter(write(tmp_path / FILE_NAME, *found)))


def test_a_shared_basis_that_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(tiny_base)
    for name, rank in (("small", 2), ("large", 4)):
        add_adapter(pipe, nora(r=rank, inner_r=2, basis="svd", target_modules=TARGETS[:2]), name)
        save_adapter(pipe, tmp_path / name, name, basis="shared")
    tensors, values = contents(tmp_path / "small" / FILE_NAME)
    values["basis_sha256"] = inspect_adapter(tmp_path / "large").basis_sha256
    file = write(tmp_path / "small" / FILE_NAME, tensors, values)
    for verb, reader in READERS.items():
        with pytest.raises(UserError):
            reader(file, tmp_path / verb)
