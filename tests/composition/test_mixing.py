"""Every mix mode against its formula, computed densely; saving, loading and exporting a mix."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from factories import randomize
from torch import Tensor

from nora_diffusion import (
    AdapterConfig,
    UserError,
    add_adapter,
    export_lora,
    inspect_adapter,
    load_adapter,
    mix,
    mix_files,
    overlap,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import PRESETS, lora, lora_xs, mor, nora, nora_input
from nora_diffusion.composition.mixing import _layer_seed
from nora_diffusion.composition.modes import MODES
from nora_diffusion.formats.adapter_file import read_tensors
from nora_diffusion.loaders import active_adapters
from nora_diffusion.pipelines.components import canonical, nora_layers

COMPONENTS = ("unet", "text_encoder")
EVERYTHING = ["attn", "ff", "proj", "conv"]
WEIGHTS = {"dog": 0.8, "hat": -0.5}
Dense = dict[tuple[str, str], Tensor]


@pytest.fixture(autouse=True)
def quiet_overlap() -> Iterator[None]:
    """Ignore the overlap warning (tested elsewhere): random adapters in one basis overlap."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* overlap by")
        yield


def two(pipe: Any, one: AdapterConfig, other: AdapterConfig | None = None, names: tuple[str, ...] = COMPONENTS) -> None:
    """Add adapters named dog and hat with random weights."""
    for seed, (name, config) in enumerate({"dog": one, "hat": other or one}.items()):
        add_adapter(pipe, config, name, names)
        randomize(pipe, name, seed)


def dense(pipe: Any, name: str) -> Dense:
    """Every ``dW`` in fp64, computed from the factors by the formula of each method."""
    found: Dense = {}
    for component in COMPONENTS:
        for path, layer in nora_layers(getattr(pipe, component), name).items():
            config = getattr(pipe, component).peft_config[name]
            f = {k.removeprefix("core."): v.double() for k, v in layer.delta(name).state_dict().items()}
            if "A" in f:
                dw = f["B"] @ f["A"]
            elif "B" in f:
                dw = f["B"] @ f["A_in"] @ f["A_out"]
            else:
                core = f["R"] if "R" in f else f["B_in"] @ f["A_in"]
                down, up = (torch.block_diag(*f[side].chunk(config.blocks)) for side in ("A_out", "B_out"))
                dw = up @ core @ down
            found[component, path] = config.scale_for(path) * dw
    return found


def weighted(pipe: Any, weights: dict[str, float]) -> Dense:
    total: Dense = {}
    for name, weight in weights.items():
        for key, dw in dense(pipe, name).items():
            total[key] = total.get(key, torch.zeros_like(dw)) + weight * dw
    return total


def assert_close(found: Dense, expected: Dense, tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for key, dw in expected.items():
        assert (found[key] - dw).norm() <= tolerance * dw.norm(), key


METHODS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=6, inner_r=2, alpha=3.0, basis="svd", alpha_pattern={"to_k": 8.0}),
    "nora-everywhere": lambda: nora(r=4, inner_r=3, basis="svd", target_modules=EVERYTHING),
    "nora_input": lambda: nora_input(r=6, inner_r=2, alpha=3.0, basis="svd"),
    "nora_input-everywhere": lambda: nora_input(r=4, inner_r=3, basis="svd", target_modules=EVERYTHING),
    "nora-inner-ranks": lambda: nora(r=6, inner_r=1, basis="svd", inner_rank_pattern={"to_q": 2, "to_k": 4}),
    "nora_input-inner-ranks": lambda: nora_input(r=6, inner_r=1, basis="svd", inner_rank_pattern={"to_q": 4}),
    "lora": lambda: lora(r=3, alpha=6.0, rank_pattern={"to_q": 5}),
    "lora-everywhere": lambda: lora(r=3, target_modules=EVERYTHING),
    "lora_xs": lambda: lora_xs(r=4, alpha=2.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_cat_is_the_weighted_sum(pipe: Any, method: str) -> None:
    two(pipe, METHODS[method]())
    report = mix(pipe, WEIGHTS, "cat", "both")
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS))
    assert (report.kept, report.error) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("method", "other"),
    [(name, name) for name in METHODS if not name.startswith("lora-") and name != "lora"] + [("nora", "nora_input")],
)
def test_linear_is_the_weighted_sum_inside_the_basis(pipe: Any, method: str, other: str) -> None:
    """The basis of the mix is the parents' own: ``A_out`` and ``B_out``, or ``A_out`` where a parent is one-sided."""
    two(pipe, METHODS[method](), METHODS[other]())
    mix(pipe, WEIGHTS, "linear", "both")
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS))
    for component in COMPONENTS:
        for path, layer in nora_layers(getattr(pipe, component), "both").items():
            parent = dict(nora_layers(getattr(pipe, component), "hat")[path].delta("hat").named_buffers())
            basis = dict(layer.delta("both").named_buffers())
            assert basis.keys() == parent.keys() and all(torch.equal(basis[k], parent[k]) for k in parent), path


@pytest.mark.parametrize(
    ("preset", "r", "count", "core", "inner_r"),
    [(nora, 8, 3, "nested", 3), (nora, 8, 6, "dense", 1), (nora, 4, 9, "dense", 1), (nora_input, 4, 9, "input", 4)],
)
def test_linear_is_exact_for_any_number_of_adapters(
    pipe: Any, preset: Any, r: int, count: int, core: str, inner_r: int
) -> None:
    """The core is nested with the summed inner rank, or dense if that has fewer parameters."""
    weights = {f"a{i}": 0.3 * i - 1 for i in range(count)}
    for seed, name in enumerate(weights):
        add_adapter(pipe, preset(r=r, inner_r=1, basis="svd"), name)
        randomize(pipe, name, seed)
    mix(pipe, weights, "linear", "all")
    config = pipe.unet.peft_config["all"]
    assert (config.core, config.inner_r) == (core, inner_r)
    assert all(layer.delta("all").full_rank <= r for layer in nora_layers(pipe.unet, "all").values())
    assert_close(dense(pipe, "all"), weighted(pipe, weights), 5e-6)


INSIDE = {
    "blocks": nora(r=8, inner_r=2, basis="svd", blocks=4),
    "inner-ranks": nora(r=8, inner_r=1, basis="svd", inner_rank_pattern={"to_q": 2}),
    "rank-mask": nora(r=8, inner_r=2, basis="svd", rank_mask=True),
    "ranks": nora(r=2, inner_r=1, basis="svd", rank_pattern=dict.fromkeys(["to_q", "to_k", "q_proj", "k_proj"], 15)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_linear_drops_settings_that_a_sum_cannot_keep(pipe: Any, name: str, tmp_path: Path) -> None:
    """No blocks in a stored basis and no rank mask; every projection has the rank for all adapters."""
    weights = {"dog": 0.8, "hat": -0.5, "cup": 0.4}
    for seed, adapter in enumerate(weights):
        add_adapter(pipe, INSIDE[name], adapter, COMPONENTS)
        randomize(pipe, adapter, seed)
    mix(pipe, weights, "linear", "both")
    assert_close(dense(pipe, "both"), weighted(pipe, weights))
    save_adapter(pipe, tmp_path / "both", "both")
    load_adapter(pipe, tmp_path / "both", "again")
    assert_close(dense(pipe, "again"), weighted(pipe, weights))
    with pytest.raises(UserError, match="rank"):
        export_lora(tmp_path / "both", tmp_path / "cut.safetensors", rank=2)


def test_svd_is_optimal_for_its_rank(pipe: Any) -> None:
    two(pipe, lora(r=3, target_modules=EVERYTHING))
    report = mix(pipe, WEIGHTS, "svd", "both", rank=2)
    target = weighted(pipe, WEIGHTS)
    expected: Dense = {}
    for key, dw in target.items():
        u, s, vt = torch.linalg.svd(dw, full_matrices=False)
        expected[key] = (u[:, :2] * s[:2]) @ vt[:2]
    assert_close(dense(pipe, "both"), expected)
    energy = sum(dw.square().sum() for dw in target.values())
    lost = sum((target[k] - expected[k]).square().sum() for k in target)
    assert report.kept == pytest.approx(float(1 - lost / energy), rel=1e-6)
    assert report.error == pytest.approx(float((lost / energy).sqrt()), rel=1e-6)
    assert report.rank == 2


def top(dw: Tensor, density: float) -> Tensor:
    count = int(density * dw.numel())
    threshold = dw.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(dw.abs() >= threshold, dw, torch.zeros_like(dw))


def drop(updates: list[Tensor], density: float, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [dw * torch.bernoulli(torch.full_like(dw.float(), density)).double() / density for dw in updates]


def elected(updates: list[Tensor], weights: list[float]) -> Tensor:
    """Per entry: the weighted sum of the updates that have the sign of the sum, divided by their number."""
    majority = torch.where(sum(updates) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
    agree = [(torch.sign(dw) == majority).double() for dw in updates]
    total = sum(w * a * p for w, a, p in zip(weights, agree, updates, strict=True))
    return total / torch.stack(agree).sum(0).clamp(min=1)  # type: ignore[no-any-return, operator]


def plain_sum(updates: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * p for w, p in zip(weights, updates, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_pruning_modes_equal_their_formulas(pipe: Any, mode: str) -> None:
    two(pipe, lora(r=2), names=("unet",))
    density, seed = 0.4, 7
    report = mix(pipe, WEIGHTS, mode, "both", rank=100, density=density, seed=seed)  # type: ignore[arg-type]
    expected: Dense = {}
    for key, one in dense(pipe, "dog").items():
        updates = [one, dense(pipe, "hat")[key]]
        random = mode.startswith("dare")
        updates = drop(updates, density, _layer_seed(seed, key)) if random else [top(dw, density) for dw in updates]
        merge = elected if mode.endswith("ties") else plain_sum
        expected[key] = merge(updates, list(WEIGHTS.values()))
    assert_close(dense(pipe, "both"), expected, 1e-5)
    assert report.error < 1e-5  # the rank is the full one here


def test_pruning_reports_the_error_of_truncation(pipe: Any) -> None:
    two(pipe, lora(r=2), names=("unet",))
    mix(pipe, WEIGHTS, "ties", "full", rank=100)
    report = mix(pipe, WEIGHTS, "ties", "small", rank=2)
    full, small = dense(pipe, "full"), dense(pipe, "small")
    lost = sum((full[k] - small[k]).square().sum() for k in full)
    energy = sum(dw.square().sum() for dw in full.values())
    assert report.error == pytest.approx(float((lost / energy).sqrt()), rel=1e-3)
    assert 0.05 < report.error < 1


def test_dare_is_repeatable_and_keeps_the_random_state(pipe: Any) -> None:
    two(pipe, lora(r=2), names=("unet",))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mix(pipe, WEIGHTS, "dare_linear", "first", seed=1)
    assert torch.equal(torch.rand(3), expected)
    mix(pipe, WEIGHTS, "dare_linear", "same", seed=1)
    mix(pipe, WEIGHTS, "dare_linear", "other", seed=2)
    a, b, c = (dense(pipe, name) for name in ("first", "same", "other"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_density_one_prunes_nothing(pipe: Any) -> None:
    two(pipe, lora(r=2), names=("unet",))
    mix(pipe, WEIGHTS, "dare_linear", "both", density=1.0, rank=100)
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS), 1e-5)


def test_a_rank_larger_than_the_layer_is_reduced_exactly(pipe: Any) -> None:
    two(pipe, lora(r=7))
    mix(pipe, WEIGHTS, "cat", "both")
    for layer in nora_layers(pipe.unet, "both").values():
        assert layer.delta("both").A.shape[0] == min(14, *layer.base_layer.weight.shape)
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS))


def test_adapters_on_different_layers(pipe: Any) -> None:
    """A projection that one adapter adapts has only its update; components and targets are merged."""
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd", target_modules=["to_q", "to_k"]), "dog", ["unet"])
    add_adapter(pipe, lora(r=2, target_modules=["to_k", "q_proj"]), "hat", COMPONENTS)
    randomize(pipe, "dog", 0)
    randomize(pipe, "hat", 1)
    mix(pipe, WEIGHTS, "cat", "both")
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS))


def test_linear_pads_projections_of_a_single_adapter(pipe: Any) -> None:
    add_adapter(pipe, nora(r=8, inner_r=1, basis="svd", target_modules=["to_q", "to_k"]), "dog", ["unet"])
    add_adapter(pipe, nora(r=8, inner_r=1, basis="svd", target_modules=["to_k"]), "hat", ["unet"])
    randomize(pipe, "dog", 0)
    randomize(pipe, "hat", 1)
    mix(pipe, WEIGHTS, "linear", "both")
    assert pipe.unet.peft_config["both"].inner_r == 2
    assert_close(dense(pipe, "both"), weighted(pipe, WEIGHTS))


def test_the_rank_of_a_top_level_projection_is_its_own(tmp_path: Path) -> None:
    """Flux has a ``proj_out`` at the top level and one in each single block."""
    pipe = tiny_pipeline("flux", tmp_path)
    for seed, name in enumerate(WEIGHTS):
        add_adapter(pipe, lora(r=4, target_modules=["proj"], rank_pattern={"^proj_out": 2}), name)
        randomize(pipe, name, seed)
    mix(pipe, WEIGHTS, "cat", "both")
    for path, layer in nora_layers(pipe.transformer, "both").items():
        assert layer.r["both"] == (4 if path == "proj_out" else 8)
        for name in WEIGHTS:
            layer.set_scale(name, 1.0)
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in WEIGHTS.items())
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-6, rtol=1e-4)


def test_a_plain_lora_in_the_pipeline_can_be_mixed(pipe: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "hat")
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "dog")
    randomize(pipe, "dog", 0)
    set_adapters(pipe, ["dog", "hat"], [0.1, 0.2])  # the weights set for them are ignored
    expected = {key: 0.8 * dw for key, dw in dense(pipe, "dog").items()}
    for path, layer in pipe.unet.named_modules():
        if hasattr(layer, "lora_A") and "hat" in layer.lora_A:
            dw = layer.lora_B["hat"].weight.flatten(1).double() @ layer.lora_A["hat"].weight.flatten(1).double()
            key = "unet", canonical(path)
            expected[key] = expected.get(key, 0) - 0.5 * (6 / 2) * dw
    mix(pipe, WEIGHTS, "cat", "both")
    assert_close(dense(pipe, "both"), {key: value.detach() for key, value in expected.items()})


def test_a_lora_file_loaded_by_diffusers_can_be_mixed(pipe: Any, tmp_path: Path) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, alpha=3.0, basis="svd", target_modules=EVERYTHING), "dog", COMPONENTS)
    randomize(pipe, "dog", 0)
    save_adapter(pipe, tmp_path, "dog")
    export_lora(tmp_path, tmp_path / "plain.safetensors")
    pipe.load_lora_weights(tmp_path / "plain.safetensors", adapter_name="plain")
    mix(pipe, {"plain": 1.0, "dog": -0.5}, "cat", "both")
    assert_close(dense(pipe, "both"), weighted(pipe, {"dog": 0.5}), 1e-5)


def test_more_than_a_plain_lora_is_refused(pipe: Any) -> None:
    from peft import LoraConfig

    for name, more in {"dora": {"use_dora": True}, "biased": {"lora_bias": True}}.items():
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **more), name)
        with pytest.raises(UserError, match=f"'{name}' is more than a plain LoRA"):
            mix(pipe, {name: 1.0})


def test_a_rank_stabilized_lora_keeps_its_scale(pipe: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "plain")
    expected: Dense = {}
    for path, layer in pipe.unet.named_modules():
        if hasattr(layer, "lora_A"):
            dw = layer.lora_B["plain"].weight.double() @ layer.lora_A["plain"].weight.double()
            expected["unet", canonical(path)] = (6 / 4**0.5) * dw.detach()
    mix(pipe, {"plain": 1.0}, "cat", "both")
    assert_close(dense(pipe, "both"), expected)


@pytest.mark.parametrize("mode", ["cat", "linear"])
def test_a_mix_renders_like_its_adapters_together(pipe: Any, render: Any, mode: str) -> None:
    two(pipe, nora(r=4, inner_r=2, basis="svd"))
    set_adapters(pipe, ["dog", "hat"], list(WEIGHTS.values()))
    together = render(pipe)
    mix(pipe, WEIGHTS, mode, "both")  # type: ignore[arg-type]
    assert active_adapters(pipe.unet) == ["both"]
    torch.testing.assert_close(render(pipe), together, atol=2e-5, rtol=1e-4)
    mix(pipe, WEIGHTS, mode, "quiet", activate=False)  # type: ignore[arg-type]
    assert active_adapters(pipe.unet) == ["both"]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_mix_is_an_ordinary_adapter(pipe: Any, mode: str, tmp_path: Path) -> None:
    """It loads and exports exactly and names its sources; mixing the files gives the same adapter."""
    two(pipe, nora(r=8, inner_r=2, basis="svd", target_modules=["to_q", "conv1"]), names=("unet",))
    metadata = {"dog": {"trigger": "sks", "class_word": "dog", "license": "MIT"}, "hat": {"trigger": "zwx"}}
    for name, info in metadata.items():
        save_adapter(pipe, tmp_path / name, name, info=info)
        load_adapter(pipe, tmp_path / name, f"{name}2", activate=False)
    mix(pipe, {"dog2": 0.8, "hat2": -0.5}, mode, "both", rank=3, seed=5)  # type: ignore[arg-type]
    live = dense(pipe, "both")
    file = save_adapter(pipe, tmp_path / "both", "both")
    saved = inspect_adapter(file)
    assert (saved.trigger, saved.class_word, saved.license) == ("sks, zwx", "dog", "MIT")
    recipe = saved.extra["mix"]
    assert (recipe["mode"], recipe["seed"]) == (mode, 5)
    hashes = [inspect_adapter(tmp_path / name).sha256 for name in ("dog", "hat")]
    assert [(p["name"], p["weight"], p["sha256"]) for p in recipe["parts"]] == [
        ("dog2", 0.8, hashes[0]), ("hat2", -0.5, hashes[1])
    ]  # fmt: skip
    load_adapter(pipe, file, "again", activate=False)
    assert all(torch.equal(dw, live[key]) for key, dw in dense(pipe, "again").items())
    assert export_lora(file, tmp_path / "lora.safetensors").relative_error < 1e-6
    weights = [(tmp_path / "dog", 0.8), (tmp_path / "hat", -0.5)]
    report = mix_files(weights, tmp_path / "mixed", mode, rank=3, seed=5)  # type: ignore[arg-type]
    ours, theirs = read_tensors(inspect_adapter(tmp_path / "mixed")), read_tensors(saved)
    assert all(torch.equal(ours[key], value) and ours[key].dtype == value.dtype for key, value in theirs.items())
    assert ours.keys() == theirs.keys()
    load_adapter(pipe, tmp_path / "mixed", "from_files", activate=False)
    assert report.info.extra["mix"]["parts"][0]["sha256"] == hashes[0]
    assert "Mixed by" in (tmp_path / "mixed" / "README.md").read_text()


def test_a_mix_can_be_mixed(pipe: Any) -> None:
    two(pipe, nora(r=8, inner_r=1, basis="svd"))
    mix(pipe, WEIGHTS, "linear", "both")
    mix(pipe, {"both": 2.0, "dog": 1.0}, "linear", "more")
    assert_close(dense(pipe, "more"), weighted(pipe, {"dog": 2.6, "hat": -1.0}), 5e-6)


def test_mistakes_are_refused_and_leave_the_pipeline_unchanged(pipe: Any, render: Any) -> None:
    two(pipe, nora(r=4, inner_r=2, basis="svd"), lora(r=2))
    add_adapter(pipe, mor(r=2, num_experts=2), "routed")
    set_adapters(pipe, ["dog"])
    before = render(pipe)
    for call, message in [
        (lambda: mix(pipe, {"dog": 1, "ghost": 1}), "no adapter named 'ghost'"),
        (lambda: mix(pipe, WEIGHTS, "slerp"), "mode='slerp' is unknown: choose one of linear, cat"),  # type: ignore[arg-type]
        (lambda: mix(pipe, WEIGHTS, "linear"), "no frozen basis in common: use 'cat'"),
        (lambda: mix(pipe, {"dog": 1, "routed": 1}), "'routed' is a routed adapter .mor.*no single dW"),
        (lambda: mix(pipe, WEIGHTS, adapter_name="dog"), "already"),
        (lambda: mix(pipe, {}), "nothing to mix"),
        (lambda: mix(pipe, {"dog": float("nan")}), "out of range"),
        (lambda: mix(pipe, WEIGHTS, "svd", rank=0), "rank=0"),
        (lambda: mix(pipe, WEIGHTS, "ties", density=0.0), "density=0.0"),
        (lambda: mix(pipe, WEIGHTS, "ties", seed=-1), "seed=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert torch.equal(render(pipe), before)
    pipe.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        mix(pipe, WEIGHTS)


SMALL: dict[str, dict[str, Any]] = {
    "nora": {"inner_r": 1, "basis": "svd"}, "nora_input": {"inner_r": 3, "basis": "svd"}, "mor": {"num_experts": 2},
    "moe_lora": {"num_experts": 2}, "melora": {"blocks": 2}, "lora_mini": {"inner_r": 1},
    "malora": {"inner_r": 2, "num_experts": 2}, "milora": {"top_k": 1},
}  # fmt: skip


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("mode", ["cat", "linear"])
def test_every_preset_mixes_or_is_refused_with_a_reason(pipe: Any, method: str, mode: str, tmp_path: Path) -> None:
    """Against the layer's own dense update (checked by oracles elsewhere), in a pipeline and from files."""
    weights = WEIGHTS
    for seed, name in enumerate(weights):
        add_adapter(pipe, PRESETS[method](r=4, target_modules=["to_q", "to_k"], **SMALL.get(method, {})), name)
        randomize(pipe, name, seed)
        save_adapter(pipe, tmp_path / name, name)
    config = pipe.unet.peft_config["dog"]
    shared = all(
        layer.delta("dog").core is not None
        and all(map(torch.equal, layer.delta("dog").buffers(), layer.delta("hat").buffers()))
        for layer in (nora_layers(pipe.unet, "dog").values() if config.router == "none" else ())
    )
    reason = (
        "is a routed adapter" if config.router != "none"
        else "has a magnitude" if config.magnitude
        else "no frozen basis in common" if mode == "linear" and not shared
        else None
    )  # fmt: skip
    if reason:
        with pytest.raises(UserError, match=reason):
            mix(pipe, weights, mode, "both")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=reason):
            mix_files([(tmp_path / k, w) for k, w in weights.items()], tmp_path / "both", mode)  # type: ignore[arg-type]
        return
    mix(pipe, weights, mode, "both")  # type: ignore[arg-type]
    mix_files([(tmp_path / k, w) for k, w in weights.items()], tmp_path / "both", mode)  # type: ignore[arg-type]
    load_adapter(pipe, tmp_path / "both", "from_files")
    for layer in nora_layers(pipe.unet, "both").values():
        for adapter in weights:
            layer.set_scale(adapter, 1.0)
        expected = sum(w * layer.get_delta_weight(adapter).double() for adapter, w in weights.items())
        for mixed in ("both", "from_files"):
            error = (layer.get_delta_weight(mixed).double() - expected).norm() / expected.norm()  # type: ignore[union-attr]
            assert error < 5e-6, mixed


def test_files_of_different_bases_are_refused(pipe: Any, tmp_path: Path) -> None:
    from factories import tiny_random_pipeline

    from nora_diffusion import open_pipeline

    other = open_pipeline(tiny_random_pipeline(tmp_path / "other", seed=4))
    for folder, owner in (("one", pipe), ("two", other)):
        add_adapter(owner, lora(r=2), "x")
        save_adapter(owner, tmp_path / folder, "x")
    with pytest.raises(UserError, match="different bases"):
        mix_files([(tmp_path / "one", 1.0), (tmp_path / "two", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_metadata_is_json_of_plain_values(pipe: Any, tmp_path: Path) -> None:
    two(pipe, lora(r=2))
    mix(pipe, WEIGHTS, "cat", "both")
    file = save_adapter(pipe, tmp_path, "both")
    sources = inspect_adapter(file).extra["mix"]["parts"]
    assert json.loads(json.dumps(sources))[0] == {"name": "dog", "weight": 0.8, "sha256": "", "method": "lora"}


def test_adapters_of_a_compiled_model_mix(pipe: Any) -> None:
    """The wrapper of ``torch.compile`` does not appear in the paths of the projections."""
    for seed, name in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
        randomize(pipe, name, seed)
    expected = overlap(pipe, "dog", "cat")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert overlap(pipe, "dog", "cat") == expected
    assert mix(pipe, {"dog": 1.0, "cat": 0.5}).layers == len(expected.layers)
