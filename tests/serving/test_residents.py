"""Subjects move between slots, host memory and files; a slot equals an adapter that was loaded by itself."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from factories import randomize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nora_diffusion import UserError, add_adapter, create_pack, export_lora, load_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters import AdapterConfig, lora, mor, nora
from nora_diffusion.loaders import delete_adapter, list_adapters
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.serving.host import HostCache
from nora_diffusion.serving.residents import Residents
from nora_diffusion.serving.slots import Slots
from nora_diffusion.serving.subjects import Source, source_of

ROOM = 2**30
NORA = nora(r=4, inner_r=2, basis="svd")


def save(base: Path, folder: Path, seeds: range, config: AdapterConfig = NORA, basis: str = "own") -> list[Source]:
    """Random adapters of one structure."""
    pipe = open_pipeline(base)
    for seed in seeds:
        add_adapter(pipe, config, "subject", ("unet", "text_encoder"))
        randomize(pipe, "subject", seed)
        save_adapter(pipe, folder / f"s{seed}", "subject", basis=basis)
        delete_adapter(pipe, "subject")
    return [source_of(str(folder / f"s{seed}")) for seed in seeds]


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    """The pipeline of an engine."""
    return open_pipeline(tiny_base)


def weights(pipe: Any, name: str) -> dict[str, Tensor]:
    """The change of each weight by an adapter."""
    layers = {
        f"{part} {path}": layer
        for part in ("unet", "text_encoder")
        for path, layer in nora_layers(getattr(pipe, part), name).items()
    }
    return {path: layer.get_delta_weight(name).clone() for path, layer in layers.items()}


def assert_is_in(pipe: Any, residents: Residents, source: Source) -> None:
    """Compare the slot of a subject with the same file loaded by ``load_adapter``, bit for bit."""
    load_adapter(pipe, source.path, "reference", activate=False)
    expected = weights(pipe, "reference")
    delete_adapter(pipe, "reference")
    found = weights(pipe, residents.loaded[source].adapter)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], expected[path]) for path in expected)


def nothing() -> None:
    """Nothing has to be done before modules change."""


@pytest.mark.parametrize("basis", ["own", "shared"])
def test_subjects_take_each_others_slots(tiny_base: Path, tmp_path: Path, pipe: Any, basis: str) -> None:
    sources, before = save(tiny_base, tmp_path, range(5), basis=basis), mock.Mock()
    residents = Residents(pipe, 2, ROOM, before)
    for source, last in zip([*sources, *sources], [None, *sources, *sources], strict=False):
        residents.get(source, {source, last} if last else {source})
        assert_is_in(pipe, residents, source)
        if last:
            assert_is_in(pipe, residents, last)
    assert before.call_count == 2  # modules changed for two slots only
    assert residents.host.reads == 5 and residents.loads == 10 and len(list_adapters(pipe)["unet"]) == 2
    residents.get(sources[-1], set())
    assert residents.hits == 1


def test_a_shared_basis_is_held_once(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    sources = save(tiny_base, tmp_path, range(3))
    create_pack(tmp_path / "all.nora_pack.safetensors", [source.path for source in sources])
    packed = [source_of(f"{tmp_path}/all.nora_pack.safetensors#s{number}") for number in range(3)]
    residents = Residents(pipe, 8, ROOM, nothing)
    held = [residents.host.get(source) for source in (*sources, *packed)]
    assert len({id(own.basis) for own in held}) == 1
    assert len({id(own.structure) for own in held}) == 1
    assert len({id(own.info.base_fingerprint) for own in held}) == 1
    basis, own = sum(tensor.nbytes for tensor in held[0].basis.values()), held[0].values.nbytes
    assert residents.host.bytes == basis + 6 * own
    residents.host.most = basis + 2 * own
    residents.get(packed[0], set())
    residents.host.get(source_of(str(shutil.copytree(sources[0].path, tmp_path / "copy"))))
    assert len(residents.host) == 2
    assert_is_in(pipe, residents, packed[0])


def test_other_structures_take_the_oldest_slot(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    same = save(tiny_base, tmp_path / "nora", range(2))
    (other,) = save(tiny_base, tmp_path / "lora", range(1), lora(r=3))
    (third,) = save(tiny_base, tmp_path / "mor", range(1), mor(r=2))
    residents = Residents(pipe, 2, ROOM, nothing)
    for source in (same[0], other, third, same[1], other, third, same[0]):
        slot = residents.get(source, {source})
        assert residents.loaded[source] is slot and len(residents.loaded) <= 2
        if source != third:
            assert_is_in(pipe, residents, source)
    assert len(list_adapters(pipe)["unet"]) == 2


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_plain_loras_of_other_tools(tiny_base: Path, tmp_path: Path, pipe: Any, file_format: Any) -> None:
    """They share slots too, and change the weights as the adapters that they were exported from."""
    config = lora(r=3, alpha=2.0, target_modules=["attn", "ff", "conv"], rank_pattern={"to_q": 2})
    own = save(tiny_base, tmp_path / "own", range(2), config)
    residents = Residents(pipe, 2, ROOM, nothing)
    for source in own:
        file = export_lora(source.path, Path(f"{source.path}.safetensors"), file_format).path
        slot = residents.get(source_of(str(file)), set())
        load_adapter(pipe, source.path, "reference", activate=False)
        expected, found = weights(pipe, "reference"), weights(pipe, slot.adapter)
        delete_adapter(pipe, "reference")
        assert found.keys() == expected.keys()
        for path, change in found.items():
            torch.testing.assert_close(change, expected[path], rtol=1e-6, atol=1e-7)
    assert len({slot.structure for slot in residents.loaded.values()}) == 1


def test_files_of_other_tools_that_are_no_loras(tmp_path: Path, pipe: Any) -> None:
    """The layers of other libraries do not follow the rows of a pass: the picture would be made without them."""
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}
    halves = {
        f"{key}.hada_w{i}_{side}": torch.ones(16, 2) if side == "a" else torch.ones(2, 16)
        for i in (1, 2)
        for side in "ab"
    }
    for reason, tensors in {
        "not a plain LoRA": halves,
        "it brings new tokens": pair | {"bundle_emb.sks.clip_l": torch.ones(1, 32)},
        "it is no LoRA": {"<sks>": torch.ones(1, 32)},
        "rank of 17 is larger": {k: torch.ones(17, 16) if "down" in k else torch.ones(16, 17) for k in pair},
    }.items():
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(UserError, match=reason):
            Residents(pipe, 2, ROOM, nothing).get(source_of(str(tmp_path / "file.safetensors")), set())
        assert not list_adapters(pipe)


def without_hash(path: str) -> None:
    """Take the hash of the basis out of an adapter's file."""
    file = Path(path) / "nora_adapter.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dictionary)
        metadata = opened.metadata()
    info = {key: value for key, value in json.loads(metadata["nora"]).items() if key != "basis_sha256"}
    save_file(tensors, file, {**metadata, "nora": json.dumps(info)})


def test_bases_without_a_hash_are_not_written_over_each_other(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    """Layers share equal frozen factors: those of another basis would change all subjects of this one."""
    random, sources = nora(r=4, inner_r=2, basis="kaiming"), list[Source]()
    for number, seed in enumerate([0, 0, 1]):
        torch.manual_seed(seed)
        sources += save(tiny_base, tmp_path, range(number, number + 1), random)
    for source in sources[1:]:
        without_hash(source.path)
    sources, residents = [source_of(source.path) for source in sources], Residents(pipe, 2, ROOM, nothing)
    for source in sources:
        residents.get(source, {sources[0], source})
        assert_is_in(pipe, residents, source)
        assert_is_in(pipe, residents, sources[0])


def test_host_memory_keeps_nothing_of_structures_that_are_gone(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    sources = [*save(tiny_base, tmp_path, range(1)), *save(tiny_base, tmp_path, range(1, 2), lora(r=3))]
    host, infos = HostCache(pipe, ROOM), list[Any]()
    for source in sources:
        infos.append(weakref.ref(host.get(source).info))
        host.forget(source)
    assert all(info() is None for info in infos)


def test_other_threads_may_list_what_is_loaded(
    tiny_base: Path, tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is made without a call of Python's, during which the engine could change it."""
    (source,), residents = save(tiny_base, tmp_path, range(1)), Residents(pipe, 2, ROOM, nothing)
    residents.get(source, set())
    monkeypatch.setattr(Source, "__hash__", mock.Mock(side_effect=AssertionError))
    assert list(residents.loaded) == [source]


def test_files_that_come_and_go_are_forgotten(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    """Also those that have left the pipeline and host memory already, and damaged ones."""
    first, second, third = save(tiny_base, tmp_path, range(3))
    (Path(third.path) / "nora_adapter.safetensors").write_text("damaged")
    residents = Residents(pipe, 1, 0, nothing)
    for source in (first, second):
        residents.get(source, set())
    with pytest.raises(UserError):
        residents.get(source_of(third.path), set())
    assert residents.known() == {first, second}
    residents.forget(residents.known())
    assert not residents.known()


def test_subjects_in_use_keep_their_slots(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    first, second, third = save(tiny_base, tmp_path, range(3))
    residents = Residents(pipe, 2, ROOM, nothing)
    slot = residents.get(first, set())
    residents.get(second, {first, second})
    residents.get(third, {first, third})
    assert residents.loaded[first] is slot and second not in residents.loaded
    with pytest.raises(UserError, match="all 2 loaded subjects are in use"):
        residents.get(second, {first, third})


def test_a_file_that_was_replaced_is_read_again(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    first, second = save(tiny_base, tmp_path, range(2))
    residents = Residents(pipe, 2, ROOM, nothing)
    residents.get(first, set())
    file = Path(second.path) / "nora_adapter.safetensors"
    file.replace(Path(first.path) / file.name)
    now = source_of(first.path)
    assert now != first
    residents.get(now, {now})
    assert_is_in(pipe, residents, now)
    assert residents.known() == {now}


def test_nothing_of_a_forgotten_subject_stays(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    first, second = save(tiny_base, tmp_path, range(2))
    residents = Residents(pipe, 2, ROOM, nothing)
    name = residents.get(first, {first}).adapter
    residents.get(second, {first, second})
    residents.forget([first])
    assert residents.known() == {second} and residents.host.bytes < 2 * 10**6
    assert all(not change.any() for change in weights(pipe, name).values())
    shutil.rmtree(first.path)
    with pytest.raises(UserError, match="no adapter at"):
        source_of(first.path)
    with pytest.raises(UserError):
        residents.get(first, set())
    assert_is_in(pipe, residents, second)


def test_out_of_memory_takes_the_slots_of_idle_subjects(
    tiny_base: Path, tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [*save(tiny_base, tmp_path, range(3)), *save(tiny_base, tmp_path, range(3, 5), lora(r=2))]
    load = Slots.load
    residents = Residents(pipe, 8, ROOM, nothing)
    for source in sources[:3]:
        residents.get(source, set(sources))

    def full(slots: Slots, *args: Any) -> Any:
        if len(list_adapters(pipe)["unet"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return load(slots, *args)

    monkeypatch.setattr(Slots, "load", full)
    residents.get(sources[3], {sources[1], sources[3]})
    assert set(residents.loaded) == {sources[1], sources[3]}
    assert_is_in(pipe, residents, sources[1])
    with pytest.raises(torch.OutOfMemoryError):
        residents.get(sources[4], {sources[1], sources[3], sources[4]})
    assert set(residents.loaded) == {sources[1], sources[3]}


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(file.read_bytes()[:-10]), lambda file: file.write_text("<html>")]
)
def test_a_damaged_file_changes_nothing(
    tiny_base: Path, tmp_path: Path, pipe: Any, damage: Callable[[Path], object]
) -> None:
    first, second = save(tiny_base, tmp_path, range(2))
    residents = Residents(pipe, 1, ROOM, nothing)
    residents.get(first, set())
    damage(Path(second.path) / "nora_adapter.safetensors")
    bad = source_of(second.path)
    with pytest.raises(UserError, match="nora_adapter"):
        residents.get(bad, {bad})
    assert set(residents.loaded) == {first}
    assert_is_in(pipe, residents, first)
