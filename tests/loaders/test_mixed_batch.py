"""Each row of a mixed batch equals a run of its own, whatever the other rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from factories import randomize
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from nora_diffusion import UserError, add_adapter, load_base, mixed_batch, open_pipeline, set_adapters
from nora_diffusion.adapters import AdapterConfig, NoraLayer, dora, dylora, lora, lora_xs, mor, mora, nora, nora_input
from nora_diffusion.adapters.presets import moe_lora
from nora_diffusion.adapters.tuner.mixed_rows import LayerRows
from nora_diffusion.adapters.tuner.row_banks import CoreBank, PairBank
from nora_diffusion.attention import NoRAAttnProcessor
from nora_diffusion.loaders import trainable_parameters

COMPONENTS = ("unet", "text_encoder")
ALL_TARGETS = ["attn", "ff", "proj", "conv"]
Spec = dict[str, float]


def fill(pipe: Any, configs: dict[str, AdapterConfig], components: Sequence[str] = COMPONENTS) -> Any:
    for seed, (name, config) in enumerate(configs.items()):
        add_adapter(pipe, config, name, components)
        randomize(pipe, name, seed)
    return pipe


SHARED: dict[str, Callable[[], AdapterConfig]] = {
    "dog": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=ALL_TARGETS),
    "cat": lambda: nora(r=4, inner_r=3, basis="svd", alpha=2.0, target_modules=ALL_TARGETS),
    "fox": lambda: nora(
        r=4, inner_r=1, basis="svd", target_modules=ALL_TARGETS, inner_rank_pattern={"to_q": 3, "conv1": 4}
    ),
    "hat": lambda: lora_xs(r=4, placement="sqrt", target_modules=ALL_TARGETS),
    "mug": lambda: nora_input(r=4, inner_r=2, basis="svd", target_modules=ALL_TARGETS),
    "cup": lambda: nora_input(r=4, inner_r=3, basis="svd", alpha=2.0, target_modules=ALL_TARGETS),
}
OWN: dict[str, Callable[[], AdapterConfig]] = {
    "dog": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=ALL_TARGETS),
    "cat": lambda: nora(r=6, inner_r=3, basis="orthogonal", inner_rank_pattern={"to_k": 5}),
    "lora": lambda: lora(r=3, alpha=6.0, target_modules=ALL_TARGETS),
    "mor": lambda: mor(r=4, num_experts=3),
    "prompt": lambda: mor(r=4, num_experts=3, router="prompt+timestep"),
    "moe": lambda: moe_lora(r=2, num_experts=3, router="prompt"),
    "dora": lambda: dora(r=3, target_modules=ALL_TARGETS),
    "mora": lambda: mora(r=2),
    "dylora": lambda: dylora(r=3),
}


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> Any:
    """A pipeline with adapters on one shared basis: NoRA, a LoRA-XS (``hat``) and one-sided NoRA."""
    return fill(open_pipeline(tiny_base), {name: make() for name, make in SHARED.items()})


@pytest.fixture(scope="module")
def own(tiny_base: Path) -> Any:
    """A pipeline with one adapter of each method."""
    return fill(open_pipeline(tiny_base), {name: make() for name, make in OWN.items()})


def run_alone(pipe: Any, spec: Spec, run: Callable[[], Tensor]) -> Tensor:
    """A run with only these adapters active."""
    set_adapters(pipe, list(spec), list(spec.values()))
    return run()


def assert_rows(found: Tensor, expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Compare each row, with a relative tolerance (Frobenius norm)."""
    assert len(found) == len(expected)
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= tolerance, f"row {row}: {error:.1e}"


def unet_inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    t = torch.tensor([3, 700, 20, 400]).repeat(rows)[:rows]
    return torch.randn(rows, 4, 8, 8, generator=g), t, torch.randn(rows, 5, 16, generator=g)


def check_unet(pipe: Any, rows: Sequence[Any], specs: Sequence[Spec], copies: int, **options: Any) -> None:
    specs = [*specs] * copies
    x, t, states = unet_inputs(len(specs))
    with torch.no_grad():
        with mixed_batch(pipe, rows, **options):
            found = pipe.unet(x, t, states).sample
        expected = [
            run_alone(pipe, spec, lambda i=i: pipe.unet(x[i : i + 1], t[i : i + 1], states[i : i + 1]).sample[0])  # type: ignore[misc]
            for i, spec in enumerate(specs)
        ]
        base = run_alone(pipe, {}, lambda: pipe.unet(x, t, states).sample)
    assert_rows(found, expected)
    for row, spec in enumerate(specs):
        assert (float((found[row] - base[row]).norm() / base[row].norm()) > 1e-3) == bool(spec)


SHARED_ROWS: list[Any] = ["dog", ("cat", 0.5), None, [("hat", 0.7), "dog"]]
SHARED_SPECS: list[Spec] = [{"dog": 1.0}, {"cat": 0.5}, {}, {"hat": 0.7, "dog": 1.0}]


ONE_SIDED: list[Spec] = [{"mug": 1.0}, {"cup": 0.5}, {}, {"mug": 0.3, "cup": 0.7, "dog": 0.5}]


@pytest.mark.parametrize("specs", [SHARED_SPECS, ONE_SIDED], ids=["both sides", "one side"])
@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guidance"])
def test_unet_rows_with_a_shared_basis(shared: Any, specs: list[Spec], copies: int) -> None:
    check_unet(shared, [[*spec.items()] for spec in specs], specs, copies)


@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guidance"])
def test_unet_rows_of_every_kind(own: Any, copies: int) -> None:
    rows: list[Any] = [*OWN, None, "prompt", "dog", [("cat", 0.3), ("lora", 0.6), ("mor", -0.5)], ("dog", 0.0)]
    weights = [0.5 + 0.1 * i for i in range(len(rows))]
    specs: list[Spec] = [{row: w} if isinstance(row, str) else {} for row, w in zip(rows, weights, strict=True)]
    specs[-2] = {"cat": 0.3, "lora": 0.6, "mor": -0.5}
    check_unet(own, rows, specs, copies, weights=weights)


@pytest.mark.parametrize("fixture", ["shared", "own"])
def test_text_encoder_rows(fixture: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    names: list[str | None] = [*(SHARED if fixture == "shared" else OWN), None]
    ids = torch.randint(0, 90, (len(names), 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with mixed_batch(pipe, names, 0.7):
            found = pipe.text_encoder(ids)[0]
        expected = [
            run_alone(pipe, {name: 0.7} if name else {}, lambda i=i: pipe.text_encoder(ids[i : i + 1])[0][0])  # type: ignore[misc]
            for i, name in enumerate(names)
        ]
    assert_rows(found, expected)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("images", [1, 2])
def test_pipeline_calls(shared: Any, guidance: float, images: int) -> None:
    """Pipeline calls run the denoiser once per step; with guidance and ``num_images_per_prompt``."""
    check_call(shared, ["dog", ("cat", 0.5), None], guidance, images, side=16)


@pytest.mark.parametrize("basis", ["svd", "orthogonal"], ids=["shared", "own"])
def test_pipeline_call_on_the_embedded_base(basis: str) -> None:
    configs = {name: nora(r=8, inner_r=k, basis=basis) for name, k in (("dog", 2), ("cat", 4))}  # type: ignore[arg-type]
    check_call(fill(load_base(), configs), ["dog", ("cat", 0.5), None], 5.0, 1, side=64)


def check_call(pipe: Any, rows: Sequence[Any], guidance: float, images: int, side: int) -> None:
    prompts = [f"a photo of {word}" for word in ("a dog", "a cat", "the beach")]
    pipe.set_progress_bar_config(disable=True)

    def run(chosen: Sequence[int]) -> Tensor:
        seeds = [row * images + image for row in chosen for image in range(images)]
        return pipe(
            [prompts[row] for row in chosen], num_inference_steps=2, height=side, width=side, guidance_scale=guidance,
            num_images_per_prompt=images, negative_prompt=["red hat"] * len(chosen) if guidance > 1 else None,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
        ).images  # fmt: skip

    passes: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: passes.append(1))
    with mixed_batch(pipe, rows):
        found = run([0, 1, 2])
    together = len(passes)
    expected = [
        run_alone(pipe, spec, lambda row=row: run([row]))  # type: ignore[misc]
        for row, spec in enumerate([{"dog": 1.0}, {"cat": 0.5}, {}])
    ]
    handle.remove()
    assert len(passes) - together == 3 * together
    # Two steps and guidance amplify the difference of a single pass.
    assert_rows(found, [image for rows in expected for image in rows], tolerance=1e-4)


@pytest.fixture(scope="module")
def sd3() -> Any:
    """A tiny SD3 pipeline without text encoders."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    ).eval()  # fmt: skip
    no_components = dict.fromkeys(
        ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    pipe = StableDiffusion3Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **no_components)
    configs = {name: SHARED[name]() for name in ("dog", "cat")} | {
        "own": nora(r=3, inner_r=1, basis="orthogonal"), "lora": lora(r=2), "prompt": mor(r=3, router="prompt"),
    }  # fmt: skip
    return fill(pipe, configs, ["transformer"])


@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guidance"])
def test_transformer_rows(sd3: Any, copies: int) -> None:
    specs: list[Spec] = [{"dog": 1.0}, {"cat": 0.5}, {}, {"own": 1.0}, {"lora": 2.0}, {"prompt": 1.0}] * copies
    n, g = len(specs), torch.Generator().manual_seed(0)
    x, states, pooled = (torch.randn(n, *s, generator=g) for s in ((4, 8, 8), (5, 16), (12,)))
    t = torch.full((n,), 300.0)

    def run(rows: slice) -> Tensor:
        out: Tensor = sd3.transformer(
            hidden_states=x[rows], encoder_hidden_states=states[rows], pooled_projections=pooled[rows], timestep=t[rows]
        ).sample
        return out

    with torch.no_grad():
        with mixed_batch(sd3, [next(iter(spec.items())) if spec else None for spec in specs[: n // copies]]):
            found = run(slice(None))
        expected = [run_alone(sd3, spec, lambda i=i: run(slice(i, i + 1))[0]) for i, spec in enumerate(specs)]  # type: ignore[misc]
    assert_rows(found, expected)


def test_pipeline_call_of_a_transformer(sd3: Any) -> None:
    g = torch.Generator().manual_seed(0)
    embeds = {
        name: torch.randn(2, *shape, generator=g)
        for name, shape in {
            "prompt_embeds": (5, 16), "negative_prompt_embeds": (5, 16), "pooled_prompt_embeds": (12,),
            "negative_pooled_prompt_embeds": (12,),
        }.items()
    }  # fmt: skip
    latents = torch.randn(2, 4, 8, 8, generator=g)
    sd3.set_progress_bar_config(disable=True)

    def run(rows: slice) -> Tensor:
        out: Tensor = sd3(
            **{name: value[rows] for name, value in embeds.items()}, latents=latents[rows].clone(), guidance_scale=4.0,
            num_inference_steps=1, height=64, width=64, output_type="latent",
        ).images  # fmt: skip
        return out

    with mixed_batch(sd3, ["dog", ("own", 0.5)]):
        found = run(slice(None))
    expected = [run_alone(sd3, {"dog": 1.0}, lambda: run(slice(0, 1)))[0]]
    expected.append(run_alone(sd3, {"own": 0.5}, lambda: run(slice(1, 2)))[0])
    assert_rows(found, expected, tolerance=1e-4)


# Beside ordinary LoRAs


@pytest.fixture
def with_loras(pipe: Any) -> Any:
    """A pipeline with two ordinary LoRAs, added before and after our adapters."""
    add_lora(pipe, "plain")
    fill(pipe, {name: SHARED[name]() for name in ("dog", "cat")})
    return add_lora(pipe, "other")


def add_lora(pipe: Any, name: str) -> Any:
    for component in COMPONENTS:
        targets = ["to_q", "to_v", "conv1"] if component == "unet" else ["q_proj", "v_proj"]
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        getattr(pipe, component).add_adapter(config, name)
    return pipe


@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guidance"])
def test_rows_of_ordinary_loras(with_loras: Any, copies: int) -> None:
    rows = ["dog", ("plain", 0.5), None, [("cat", 2.0), "other"], ("plain", 0.5)]
    specs: list[Spec] = [{"dog": 1.0}, {"plain": 0.5}, {}, {"cat": 2.0, "other": 1.0}, {"plain": 0.5}]
    check_unet(with_loras, rows, specs, copies)
    ids = torch.randint(0, 90, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with mixed_batch(with_loras, rows):
            found = with_loras.text_encoder(ids)[0]
        expected = [
            run_alone(with_loras, spec, lambda i=i: with_loras.text_encoder(ids[i : i + 1])[0][0])
            for i, spec in enumerate(specs)
        ]  # type: ignore[misc]
    assert_rows(found, expected)


# Internals


def banks_of(layer: NoraLayer) -> list[tuple[str, list[str]]]:
    """The banks of the next pass, with the adapters in them."""
    assert layer.rows is not None
    return [(type(bank).__name__, bank.names) for bank in cast(LayerRows, layer.rows).grouped()[0]]


@pytest.mark.parametrize(("bank", "names"), [("CoreBank", ["dog", "cat", "hat"]), ("InputBank", ["dog", "mug", "cup"])])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_shared_basis_uses_one_bank(shared: Any, grad: bool, bank: str, names: list[str]) -> None:
    """Convolutions and training use what lies inside the basis; linear layers without gradients one collapsed pair."""
    layers = [m for m in shared.unet.modules() if isinstance(m, NoraLayer)]
    with torch.set_grad_enabled(grad), mixed_batch(shared, names):
        for layer in layers:
            kind = bank if grad or isinstance(layer.base_layer, nn.Conv2d) else "PairBank"
            assert banks_of(layer) == [(kind, names)]


def test_a_linear_layer_adds_to_its_frozen_output(shared: Any) -> None:
    """Without gradients there is no second tensor of its size, unless a hook may have kept the first."""
    layer = shared.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x, made = torch.randn(4, 3, layer.in_features), list[Tensor]()
    linear = torch.nn.functional.linear
    with torch.no_grad(), mixed_batch(shared, SHARED_ROWS):
        layer.rows.plan.start(4)
        with mock.patch("torch.nn.functional.linear", lambda *args: made.append(linear(*args)) or made[-1]):
            assert layer(x).data_ptr() == made[0].data_ptr() and len(made) == 1
            with layer.base_layer.register_forward_hook(lambda *_: None):
                assert layer(x).data_ptr() != made[1].data_ptr()


def test_chains_of_similar_rank_use_one_bank(own: Any) -> None:
    layer = own.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with torch.no_grad(), mixed_batch(own, ["dog", "cat", "lora", "dylora", "dora", "mor", "mora"]):
        assert banks_of(layer) == [("PairBank", ["dog", "cat", "lora", "dylora", "mora"])]
        assert layer.rows.grouped()[1] == ["dora", "mor"]


def test_a_batch_keeps_its_factors_until_one_changes(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, factor = unet_inputs(4), next(iter(trainable_parameters(shared, "dog").values()))
    layers = sum(isinstance(m, NoraLayer) for m in shared.unet.modules())
    built: list[str] = []
    for kind in (CoreBank, PairBank):
        build = kind.build
        monkeypatch.setattr(kind, "build", lambda self, specs, build=build: built.append("") or build(self, specs))
    with torch.no_grad(), mixed_batch(shared, SHARED_ROWS):
        for _ in range(3):
            shared.unet(*inputs)
        assert len(built) == layers
        factor.mul_(1)
        shared.unet(*inputs)
    assert len(built) == layers + 1


def test_bases_are_compared_once(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing reads all values: entering compares nothing, and a second context knows the result of the first."""
    pipe = fill(open_pipeline(tiny_base), {name: SHARED[name]() for name in ("dog", "cat")}, ["unet"])
    layers = [m for m in pipe.unet.modules() if isinstance(m, NoraLayer)]
    for delta in (layer.delta("cat") for layer in layers):
        for name, factor in delta.named_buffers(recurse=False):
            setattr(delta, name, factor.clone())
    compared: list[Tensor] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or equal(a, b))

    def count() -> int:
        compared.clear()
        with mixed_batch(pipe, ["dog", "cat"]):
            assert not compared
            for layer in layers:
                assert banks_of(layer) == [("CoreBank", ["dog", "cat"])]
        return len(compared)

    assert count() == 2 * len(layers)
    assert count() == 0
    with torch.no_grad():
        layers[0].delta("cat").outer[0].mul_(1)
    assert count() == 2


def test_weights_changed_inside_the_context_are_used(shared: Any) -> None:
    inputs, factor = unet_inputs(2), next(iter(trainable_parameters(shared, "dog").values()))
    with torch.no_grad(), mixed_batch(shared, ["dog", "cat"]):
        before = shared.unet(*inputs).sample
        factor.mul_(2)
        after = shared.unet(*inputs).sample
        factor.div_(2)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_gradients_equal_those_of_separate_batches(shared: Any) -> None:
    """The gradients of a mixed batch equal those of separate batches."""
    x, t, states = unet_inputs(2)

    def gradients(loss: Tensor, name: str) -> list[Tensor]:
        parameters = list(trainable_parameters(shared, name).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [g for g in found if g is not None]

    for name in ("dog", "cat"):
        for parameter in trainable_parameters(shared, name).values():
            parameter.requires_grad_(True)
    with mixed_batch(shared, ["dog", ("cat", 0.5)]):
        together = shared.unet(x, t, states).sample.square().sum((1, 2, 3))
        found = {name: gradients(together.sum(), name) for name in ("dog", "cat")}
    for row, (name, weight) in enumerate([("dog", 1.0), ("cat", 0.5)]):
        set_adapters(shared, [name], [weight])
        for parameter in trainable_parameters(shared, name).values():
            parameter.requires_grad_(True)
        alone = shared.unet(x[row : row + 1], t[row : row + 1], states[row : row + 1]).sample.square().sum()
        expected = gradients(alone, name)
        assert len(expected) == len(found[name]) > 0
        for ours, theirs in zip(found[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_scale_of_the_call_applies(with_loras: Any) -> None:
    x, t, states = unet_inputs(2)
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    with torch.no_grad():
        with mixed_batch(with_loras, ["dog", "plain"]):
            found = with_loras.unet(x, t, states, **half).sample
        expected = [
            run_alone(
                with_loras,
                {name: 0.5},
                lambda i=i: with_loras.unet(x[i : i + 1], t[i : i + 1], states[i : i + 1]).sample[0],
            )  # type: ignore[misc]
            for i, name in enumerate(["dog", "plain"])
        ]
    assert_rows(found, expected)


def test_attention_processors_inside_the_context(shared: Any) -> None:
    inputs = unet_inputs(4)
    standard = shared.unet.attn_processors
    with torch.no_grad(), mixed_batch(shared, SHARED_ROWS):
        expected = shared.unet(*inputs).sample
        shared.unet.set_attn_processor(NoRAAttnProcessor())
        found = shared.unet(*inputs).sample
    shared.unet.set_attn_processor(standard)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    fill(pipe, {name: make() for name, make in SHARED.items()}, ["unet"]).to(dtype=dtype)
    x, t, states = unet_inputs(2)
    with torch.no_grad(), mixed_batch(pipe, ["dog", "cat"]):
        found = pipe.unet(x.to(dtype), t, states.to(dtype)).sample
    assert found.dtype == dtype and torch.isfinite(found).all()


class Toy(nn.Module):
    """Two linear layers, to wrap in a ``PeftModel``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


def test_adapter_names_of_peft() -> None:
    torch.manual_seed(0)
    config = {"target_modules": ["one", "two"], "basis": "svd"}
    model: Any = get_peft_model(Toy(), nora(r=4, inner_r=2, **config), adapter_name="dog")  # type: ignore[arg-type]
    model.add_adapter("cat", nora(r=4, inner_r=1, **config))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "nora_delta" in name:
            parameter.data.normal_(std=0.5)
    names, x = ["dog", "__base__", "cat", "dog"], torch.randn(4, 6)
    with torch.no_grad():
        found = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[row : row + 1])
            else:
                model.set_adapter(name)
                expected = model(x[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-6, rtol=1e-5)
        with pytest.raises(UserError, match="ghost"):
            model(x, adapter_names=["ghost"] * 4)
        with pytest.raises(UserError, match="got 3 and 4"):
            model(x, adapter_names=["dog"] * 3)


# Errors and restored state


def state(pipe: Any) -> dict[str, Any]:
    """All state that a mixed batch changes temporarily."""
    found: dict[str, Any] = {"pipe": sorted(vars(pipe))}
    for component in COMPONENTS:
        for path, module in getattr(pipe, component).named_modules():
            found[f"{component}.{path}"] = (
                len(module._forward_pre_hooks), len(module._forward_hooks), getattr(module, "rows", None),
                list(getattr(module, "_active_adapter", [])), dict(getattr(module, "scaling", {})),
                {name: p.requires_grad for name, p in module.named_parameters(recurse=False)},
            )  # fmt: skip
    return found


@pytest.mark.parametrize("fail", [False, True], ids=["normally", "by an error"])
def test_state_is_restored(with_loras: Any, fail: bool) -> None:
    set_adapters(with_loras, ["cat", "plain"], [0.123, 0.777])
    parameter = next(iter(trainable_parameters(with_loras, "dog").values()))
    parameter.requires_grad_(True)
    x = unet_inputs(2)
    with torch.no_grad():
        expected = with_loras.unet(*x).sample
        before = state(with_loras)
        try:
            with mixed_batch(with_loras, [("dog", 0.3), "plain"]):
                with_loras.unet(*x)
                if fail:
                    raise RuntimeError("out of memory")
        except RuntimeError:
            assert fail
        assert state(with_loras) == before
        assert torch.equal(with_loras.unet(*x).sample, expected)


@pytest.mark.parametrize(
    ("rows", "options", "word"),
    [
        (["ghost"], {}, "ghost"),
        ([], {}, "at least one row"),
        (["dog", "cat"], {"weights": [1.0]}, "2 rows but 1 weights"),
        ([3], {}, "not 3"),
        ([["plain", "other"]], {}, "only one"),
        ([("plain", 1.0), ("plain", 0.5)], {}, "same weight"),
    ],
)
def test_invalid_rows_are_refused(with_loras: Any, rows: Any, options: Any, word: str) -> None:
    before = state(with_loras)
    with pytest.raises(UserError, match=word), mixed_batch(with_loras, rows, **options):
        pass
    assert state(with_loras) == before


def test_unsupported_states_are_refused(pipe: Any) -> None:
    fill(pipe, {"dog": SHARED["dog"]()})

    def refused(word: str) -> None:
        with pytest.raises(UserError, match=word), mixed_batch(pipe, ["dog", None]):
            pass

    pipe.fuse_lora()
    refused("unfuse_lora")
    pipe.unfuse_lora()
    pipe.disable_lora()
    refused("enable_lora")
    pipe.enable_lora()
    with torch.no_grad(), mixed_batch(pipe, ["dog", None]):
        with pytest.raises(UserError, match="3 rows"):
            pipe.unet(*unet_inputs(3))
        for prompts in ("a dog", ["a dog"], ["a dog"] * 4):  # four prompts look like two with guidance
            with pytest.raises(UserError, match="one prompt for each row"):
                pipe(prompts, num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
        with pytest.raises(UserError, match="4 prompts but 2 rows"):
            pipe(prompt_embeds=torch.zeros(4, 16, 16), num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
        layer = next(
            m for m in pipe.unet.modules() if isinstance(m, NoraLayer) and hasattr(m.base_layer, "in_features")
        )
        with pytest.raises(UserError, match="whole model"):
            layer(torch.randn(5, 2, layer.base_layer.in_features))
        refused("already serves")
    pipe.unet.add_adapter(LoKrConfig(r=2, target_modules=["to_q"]), "lokr")
    refused("does not support")
    set_adapters(pipe, "dog")
    with mixed_batch(pipe, ["dog", None]):
        pass
