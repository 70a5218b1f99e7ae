"""Cache of outer pairs and activation statistics: keys, damaged entries, size limit, several processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from torch import Tensor, nn

from nora_diffusion import AdapterConfig, UserError, add_adapter, lora, nora, nora_input
from nora_diffusion.io import tensor_cache
from nora_diffusion.io.tensors import named_hash, tensor_hash
from nora_diffusion.loaders import delete_adapter, trainable_parameters
from nora_diffusion.pipelines import basis_cache, calibration
from nora_diffusion.pipelines.basis_cache import entry_key, outer_pairs
from nora_diffusion.pipelines.calibration import Calibration, activation_strengths
from nora_diffusion.pipelines.components import components, nora_layers

COMPONENTS = ("unet", "text_encoder")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NORA_CACHE", str(folder))
    monkeypatch.delenv("NORA_CACHE_GB", raising=False)
    tensor_cache._warn_once.cache_clear()
    return folder


def test_hashes_are_stable() -> None:
    """Shared bases and cache entries are found by hash: other digests would orphan existing files."""
    tensor = torch.arange(6.0).view(2, 3)
    assert tensor_hash(tensor) == "e20933188a476ce2418266391f2f875503b2dbea37a1f5a230c18b535bc495b5"
    named = named_hash({"b": tensor.half(), "a": tensor.T})
    assert named == "bea4be484e2fc66bd714605b0028e4fa8d66f4f317c4c9c7e0ec46ad38036dd7"


def make_layers() -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, nn.Module] = {
        "a.to_q": nn.Linear(12, 10),
        "b.to_k": nn.Linear(10, 8),
        "c.conv1": nn.Conv2d(4, 6, 3),
    }
    for layer in layers.values():
        layer.weight.data.normal_(generator=generator)  # type: ignore[operator, union-attr]
    return layers


def make_strengths() -> dict[str, Tensor]:
    return {"a.to_q": torch.linspace(1, 2, 12), "b.to_k": torch.linspace(1, 3, 10), "c.conv1": torch.linspace(1, 4, 4)}


def pairs(config: AdapterConfig | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    return outer_pairs(config or nora(r=4), make_layers(), make_strengths())


def equal(one: dict[str, tuple[Tensor, Tensor]], two: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) and a.dtype == b.dtype for k in one for a, b in zip(one[k], two[k], strict=True)
    )


@pytest.mark.parametrize("config", [nora(r=4), nora(r=4, basis="svd", basis_dtype="bfloat16")], ids=lambda c: c.basis)
def test_second_call_reads_the_cache(cache: Path, config: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pairs(config)
    assert [file.name.split("-")[0] for file in cache.iterdir()] == ["basis"]
    monkeypatch.setattr(basis_cache, "outer_pair", lambda *_: pytest.fail("computed again"))
    assert equal(pairs(config), first)
    assert first["a.to_q"][0].dtype == getattr(torch, config.basis_dtype)


def test_cached_and_computed_adapters_are_equal(cache: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(setting: str) -> dict[str, Tensor]:
        monkeypatch.setenv("NORA_CACHE", setting)
        torch.manual_seed(5)
        add_adapter(pipe, nora(r=4, inner_r=2, target_modules=["attn", "ff", "proj", "conv"]), "one", COMPONENTS)
        found = {
            f"{component}.{path}.{name}": value.clone()
            for component in COMPONENTS
            for path, layer in nora_layers(getattr(pipe, component), "one").items()
            for name, value in layer.delta("one").state_dict().items()
        }
        delete_adapter(pipe, "one")
        return found

    without = factors("off")
    assert not cache.exists()
    filled, read = factors(str(cache)), factors(str(cache))
    assert sorted(file.name.split("-")[0] for file in cache.iterdir()) == ["basis", "basis", "calibration"]
    for other in (filled, read):
        assert other.keys() == without.keys()
        assert all(torch.equal(other[key], value) for key, value in without.items())


def test_key_depends_on_everything_that_changes_a_basis() -> None:
    layers, strengths = make_layers(), make_strengths()
    key = entry_key(nora(r=4), layers, strengths)
    for same in (nora(r=4, inner_r=2, alpha=8.0, dropout=0.1), nora(r=4, core="dense"), nora_input(r=4)):
        assert entry_key(same, make_layers(), make_strengths()) == key
    changed: list[AdapterConfig] = [
        nora(r=5),
        nora(r=4, basis="svd"),
        nora(r=4, placement="up"),
        nora(r=4, power=1.0),
        nora(r=4, basis_dtype="float32"),
        nora(r=4, rank_pattern={"to_q": 3}),
    ]
    keys = [entry_key(config, layers, strengths) for config in changed]
    other_weight = make_layers()
    other_weight["b.to_k"].weight.data[0, 0] += 1e-6  # type: ignore[operator, union-attr]
    keys.append(entry_key(nora(r=4), other_weight, strengths))
    keys.append(entry_key(nora(r=4), {k: v.half() for k, v in make_layers().items()}, strengths))
    keys.append(entry_key(nora(r=4), {k: layers[k] for k in ("a.to_q", "b.to_k")}, strengths))
    keys.append(entry_key(nora(r=4), layers, strengths | {"a.to_q": strengths["a.to_q"].flip(0)}))
    assert len({key, *keys}) == len(keys) + 1


def test_svd_key_does_not_depend_on_strengths() -> None:
    keys = {
        entry_key(nora(r=4, basis="svd", power=power), make_layers(), strengths)
        for power in (0.5, 1.0)
        for strengths in (make_strengths(), {})
    }
    assert len(keys) == 1


@pytest.mark.parametrize("basis", ["kaiming", "orthogonal"])
def test_random_bases_are_not_cached(cache: Path, basis: Any) -> None:
    assert outer_pairs(nora(r=4, basis=basis), make_layers(), {}) == {}
    assert not cache.exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:40],
    "cut in the tensors": lambda data: data[:-3],
    "longer": lambda data: data + b"\0\0",
    "garbage": lambda data: bytes(range(256)) * 20,
    "a value changed": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "a dtype changed": lambda data: data.replace(b'"F16"', b'"I16"', 1),
    "a web page": lambda data: b"<!doctype html><html></html>",
    "a huge header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_recomputed(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    first = pairs()
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    assert file.read_bytes() != intact
    assert equal(pairs(), first)
    assert equal(pairs(), first)
    assert len(list(cache.iterdir())) == 1
    assert file.stat().st_size == len(intact)


def test_entry_under_another_name_is_not_used(cache: Path) -> None:
    first = pairs(nora(r=4))
    (file,) = cache.iterdir()
    pairs(nora(r=4, placement="up"))
    (other,) = set(cache.iterdir()) - {file}
    file.write_bytes(other.read_bytes())
    assert equal(pairs(nora(r=4)), first)


def test_flipped_bits_are_detected(cache: Path) -> None:
    """For each flipped bit, the entry is a miss or still holds the same values."""
    value = {"x": torch.arange(6, dtype=torch.float16).reshape(2, 3), "y": torch.ones(3)}
    tensor_cache.store("basis-x", value)
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    for index in range(len(intact)):
        broken = bytearray(intact)
        broken[index] ^= 1 << (index % 8)
        file.write_bytes(broken)
        found = tensor_cache.load("basis-x")
        if found is not None:
            assert found.keys() == value.keys()
            assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in value.items())


@pytest.mark.parametrize("fault", ["a file in the way", "no space"])
def test_unwritable_disk_warns_once(cache: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORA_CACHE", "off")
    expected = pairs()
    monkeypatch.setenv("NORA_CACHE", str(cache))
    if fault == "a file in the way":
        cache.write_text("not a folder")
    else:

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for config in (nora(r=4), nora(r=4), nora(r=4, placement="up")):
            found = pairs(config)
            assert config.placement != "sqrt" or equal(found, expected)
    assert [str(cache) in str(w.message) for w in caught] == [True]
    assert fault == "a file in the way" or not list(cache.iterdir())


def test_size_limit_evicts_least_recently_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(["new", "used", "old"]):
        tensor_cache.store(name, {"x": torch.full((1000,), float(age))})
        os.utime(cache / f"{name}.safetensors", (1e9 - age, 1e9 - age))
    abandoned = cache / ".old.safetensors.0123abcd"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1e9, 1e9))
    assert tensor_cache.load("used") is not None
    monkeypatch.setenv("NORA_CACHE_GB", str(9000 / 1e9))
    tensor_cache.store("next", {"x": torch.zeros(500)})
    assert {file.stem for file in cache.iterdir()} == {"used", "next"}
    tensor_cache.store("too large", {"x": torch.zeros(5000)})
    assert {file.stem for file in cache.iterdir()} == {"used", "next"}
    monkeypatch.setenv("NORA_CACHE_GB", "much")
    with pytest.raises(UserError, match="NORA_CACHE_GB=much"):
        pairs()


@pytest.mark.parametrize(
    ("platform", "variable", "below"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
        ("darwin", "", "Library/Caches"),
    ],
)
def test_default_folder(
    platform: str, variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NORA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tensor_cache.folder() == tmp_path / below / "nora_diffusion"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
        assert tensor_cache.folder() == tmp_path / "elsewhere" / "nora_diffusion"
    monkeypatch.setenv("NORA_CACHE", "off")
    assert tensor_cache.folder() is None


WORKER = """
import sys, torch
from nora_diffusion import nora
from nora_diffusion.io import tensor_cache
from nora_diffusion.pipelines.basis_cache import outer_pairs
layers = {}
for i in range(6):
    torch.manual_seed(i)
    layers[f"{i}.to_q"] = torch.nn.Linear(24, 24)
total = 0.0
for turn in range(40):
    for r in range(1, 6):
        found = outer_pairs(nora(r=r, inner_r=1, basis="svd", basis_dtype="float32"), layers, {})
        total += sum(float(down.abs().sum() + up.abs().sum()) for down, up in found.values())
    if turn % 5 == int(sys.argv[1]):
        for path in tensor_cache.folder().glob("*.safetensors"):
            path.unlink(missing_ok=True)
print(f"{total:.6f}")
"""


@pytest.mark.slow
def test_processes_share_the_cache(cache: Path) -> None:
    """Two processes read, write, evict and delete the same entries at the same time; both get correct values."""
    environment = os.environ | {"NORA_CACHE": str(cache), "NORA_CACHE_GB": "0.00008", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, str(i)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert not [err for _, err in results if "damaged" in err]
    assert sum(file.stat().st_size for file in cache.iterdir()) < 200_000


def test_calibration_measures_mean_inputs(cache: Path, pipe: Any) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    seen: list[Tensor] = []
    handle = pipe.unet.get_submodule(path).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    strengths = activation_strengths(pipe, Calibration(["a dog", "a red hat"]))
    handle.remove()
    expected = torch.cat([x.flatten(0, -2) for x in seen]).abs().mean(0)
    torch.testing.assert_close(strengths["unet"][path], expected)
    assert set(strengths) == set(COMPONENTS)


def test_second_calibration_reads_the_cache(cache: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = activation_strengths(pipe)
    sample = calibration.short_run
    monkeypatch.setattr(calibration, "short_run", lambda *_: pytest.fail("measured again"))
    again = activation_strengths(pipe)
    assert all(
        torch.equal(again[component][path], value) for component in first for path, value in first[component].items()
    )
    # The key depends on all weights, adapted or not, and on the prompts.
    monkeypatch.setattr(calibration, "short_run", sample)
    files = len(list(cache.iterdir()))
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 0.01
    activation_strengths(pipe)
    activation_strengths(pipe, Calibration(["a cat"]))
    pipe.text_encoder.half().float()
    activation_strengths(pipe)
    assert len(list(cache.iterdir())) == files + 3


def test_calibration_does_not_depend_on_the_batch(cache: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORA_CACHE", "off")
    together = activation_strengths(pipe)
    monkeypatch.setattr(calibration, "BATCH_SIZE", 1)
    alone = activation_strengths(pipe)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_calibration_ignores_adapters(cache: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORA_CACHE", "off")
    clean = activation_strengths(pipe)
    add_adapter(pipe, lora(r=2, target_modules=["attn", "conv"]), "one", COMPONENTS)
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data.normal_()
    key = calibration._entry_key(pipe, components(pipe), Calibration())
    with_adapter = activation_strengths(pipe)
    assert with_adapter["unet"].keys() == clean["unet"].keys()
    torch.testing.assert_close(with_adapter, clean)
    assert not any(layer.disable_adapters for layer in nora_layers(pipe.unet, "one").values())
    delete_adapter(pipe, "one")
    assert calibration._entry_key(pipe, components(pipe), Calibration()) == key


def test_calibration_on_images(cache: Path, pipe: Any) -> None:
    """From the second step on, the UNet's input is the given latents, noised by the scheduler."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    subject = Calibration(["a sks dog", "a sks dog"], latents)
    seen: list[tuple[Tensor, int]] = []

    def watch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((inputs[0][:2], int(inputs[1])))

    handle = pipe.unet.register_forward_pre_hook(watch)
    strengths = activation_strengths(pipe, subject)
    handle.remove()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert len(seen) >= 4
    for sample, timestep in seen[1:]:
        signal = pipe.scheduler.alphas_cumprod[timestep]
        torch.testing.assert_close(sample, signal.sqrt() * latents + (1 - signal).sqrt() * noise, atol=1e-5, rtol=1e-4)
    generic = activation_strengths(pipe, Calibration(["a sks dog", "a sks dog"]))
    assert not torch.equal(strengths["unet"]["conv_in"], generic["unet"]["conv_in"])


def test_invalid_calibrations_are_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no UNet"):
        activation_strengths(tiny_pipeline("pixart", tmp_path), Calibration(["a dog"], torch.zeros(1, 4, 8, 8)))
    for prompts, latents, word in [
        ([], None, "at least one"),
        ("a dog", None, "a list"),
        (["a dog"], torch.zeros(2, 4, 8, 8), "2 images but 1"),
    ]:
        with pytest.raises(UserError, match=word):
            add_adapter(pipe, nora(r=4), "one", calibration=Calibration(prompts, latents))
