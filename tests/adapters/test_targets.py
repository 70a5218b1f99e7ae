"""The life cycle of an adapter on every architecture and kind of projection, against a dense oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from nora_diffusion import (
    AdapterConfig,
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    load_adapter,
    nora,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import TARGET_GROUPS, in_blocks
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import (
    canonical,
    components,
    denoiser_name,
    nora_layers,
    projections,
    text_encoders,
    tokenizers,
)
from nora_diffusion.training.step.denoiser import networks

Call = tuple[tuple[Any, ...], dict[str, Any]]
Outputs = dict[str, list[Tensor]]
EVERYTHING = list(TARGET_GROUPS)
CONV = r".*(resnets\.0\.conv1|conv_shortcut|samplers\.0\.conv)"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RecordedPipeline:
    return RecordedPipeline(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def restored(recorded: RecordedPipeline) -> Iterator[RecordedPipeline]:
    """The same; deletes the adapter after the test."""
    yield recorded
    if "one" in getattr(recorded.denoiser, "peft_config", {}):
        delete_adapter(recorded.pipe, "one")


class RecordedPipeline:
    """A pipeline, and the inputs of a real call for each of its adaptable components."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.pipe = tiny_pipeline(name, folder)
        self.calls: dict[str, Call] = {}
        hooks = [
            getattr(self.pipe, component).register_forward_pre_hook(self._record(component), with_kwargs=True)
            for component in components(self.pipe)
        ]
        self.pipe("a dog", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
        for hook in hooks:
            hook.remove()

    def _record(self, component: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.setdefault(component, copy.deepcopy((args, kwargs)))

        return hook

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = getattr(self.pipe, denoiser_name(self.pipe))
        return module

    def outputs(self, pipe: Any = None, overrides: dict[str, dict[str, Tensor]] | None = None) -> Outputs:
        """The outputs of each component for its inputs; ``overrides`` replaces weights."""
        found = {}
        for component, (args, kwargs) in self.calls.items():
            module, weights = getattr(pipe or self.pipe, component), (overrides or {}).get(component, {})
            found[component] = tensors_in(torch.func.functional_call(module, weights, args, kwargs))
        return found


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for inner in values for tensor in tensors_in(inner)]


def difference(one: Outputs, two: Outputs) -> dict[str, float]:
    """``max |a - b| / max |b|`` over the outputs of each component."""
    assert one.keys() == two.keys()
    pairs = {component: list(zip(one[component], two[component], strict=True)) for component in one}
    return {
        component: max(float((a - b).abs().max() / b.abs().max()) for a, b in both) for component, both in pairs.items()
    }


def close(one: Outputs, two: Outputs) -> None:
    assert max(difference(one, two).values()) <= 1e-5, difference(one, two)


def equal(one: Outputs, two: Outputs) -> bool:
    return all(torch.equal(a, b) for component in one for a, b in zip(one[component], two[component], strict=True))


def train_one_step(recorded: RecordedPipeline) -> None:
    """One step through every component: only the declared parameters change, and all that reach an output do."""
    parameters = trainable_parameters(recorded.pipe, "one")
    before = {key: value.detach().clone() for key, value in parameters.items()}
    frozen = {component: [p.clone() for p in rest(getattr(recorded.pipe, component))] for component in recorded.calls}
    generator = torch.Generator().manual_seed(1)
    for key, parameter in parameters.items():  # B_in starts at zero, which gives A_in no gradient
        if key.endswith("B_in"):
            parameter.data.normal_(std=0.3, generator=generator)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01, eps=1e-30)  # a full step for any gradient but zero
    outputs = recorded.outputs()
    sum(out.square().mean() for group in outputs.values() for out in group).backward()  # type: ignore[union-attr]
    # Some last layers reach only pooled outputs, and some reach no output at all.
    reached = [key for key, p in parameters.items() if p.grad is not None and p.grad.any()]
    assert len(reached) >= 0.9 * len(parameters)
    optimizer.step()
    assert all(not torch.equal(parameters[key], before[key]) for key in reached)
    for component, values in frozen.items():
        assert all(torch.equal(a, b) for a, b in zip(rest(getattr(recorded.pipe, component)), values, strict=True))


def rest(module: nn.Module) -> list[Tensor]:
    return [value for name, value in module.named_parameters() if ".nora_delta." not in name]


def dense_weights(pipe: Any, config: AdapterConfig) -> dict[str, dict[str, Tensor]]:
    """``W + (alpha / r) B_out B_in A_in A_out`` of every adapted layer, by component and parameter name."""
    found: dict[str, dict[str, Tensor]] = {}
    for component in components(pipe):
        module = getattr(pipe, component)
        names = {canonical(path): path for path, _ in module.named_modules()}
        found[component] = {}
        for path, layer in nora_layers(module, "one").items():
            delta, weight = layer.delta("one"), layer.base_layer.weight
            r = min(config.r, *weight.flatten(1).shape)
            alpha = config.alpha or config.r
            assert delta.A_out.shape[0] == r
            factors = (delta.B_out, delta.core.B_in, delta.core.A_in, delta.A_out)
            change = torch.linalg.multi_dot([f.detach().double() for f in factors]) * (alpha / config.r)
            found[component][f"{names[path]}.weight"] = (weight.double() + change.view(weight.shape)).float()
    return found


def fusers(pipe: Any) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Pairs ``(merge, unmerge)`` for all adapters: by the layers, and by the pipeline if it can."""
    layers = [
        layer for component in components(pipe) for layer in nora_layers(getattr(pipe, component), "one").values()
    ]
    yield lambda: [layer.merge() for layer in layers] and None, lambda: [layer.unmerge() for layer in layers] and None
    if hasattr(pipe, "fuse_lora"):  # PixArt pipelines have no LoRA loader
        yield pipe.fuse_lora, pipe.unfuse_lora


def load_exported(pipe: Any, file: Path) -> None:
    """Load with diffusers' ``load_lora_weights``, and with PEFT what it does not support (T5, all of PixArt)."""
    groups: dict[str, dict[str, Tensor]] = {}
    t5 = next((name for name in components(pipe) if type(getattr(pipe, name)).__name__ == "T5EncoderModel"), None)
    for key, value in load_file(file).items():
        key = key.replace("text_encoders.t5xxl.transformer", str(t5))
        groups.setdefault(key.split(".")[0], {})[key] = value
    stock = hasattr(pipe, "load_lora_weights")
    for component in [name for name in groups if not stock or name == t5]:
        group = groups.pop(component)
        inject_plain(
            getattr(pipe, component), {key.removeprefix(f"{component}."): value for key, value in group.items()}
        )
    if groups:
        pipe.load_lora_weights(file, adapter_name="plain")  # ignores the T5


def inject_plain(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks = {key.split(".lora_A")[0]: value.shape[0] for key, value in tensors.items() if ".lora_A" in key}
    config = LoraConfig(r=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    inject_adapter_in_model(config, module, "plain")
    assert not set_peft_model_state_dict(module, tensors, "plain").unexpected_keys


@pytest.mark.parametrize(
    "config",
    [
        nora(r=4, inner_r=2, alpha=8.0),
        nora(r=4, inner_r=2, alpha=8.0, basis="svd", target_modules=EVERYTHING),
    ],
    ids=["attention", "everything"],
)
def test_life_cycle_of_an_adapter(restored: RecordedPipeline, config: AdapterConfig, tmp_path: Path) -> None:
    recorded, pipe = restored, restored.pipe
    names = list(components(pipe))
    clean = recorded.outputs()
    weights = {
        component: {k: v.clone() for k, v in getattr(pipe, component).state_dict().items()} for component in names
    }
    add_adapter(pipe, config, "one", names)
    assert all(nora_layers(getattr(pipe, component), "one") for component in names)
    assert equal(recorded.outputs(), clean)
    train_one_step(recorded)
    with torch.no_grad():
        live = recorded.outputs()
        assert min(difference(live, clean).values()) > 1e-3
        dense = dense_weights(pipe, config)
        for fuse, unfuse in fusers(pipe):
            fuse()
            close(recorded.outputs(), live)
            unfuse()
            assert equal(recorded.outputs(), live)
        save_adapter(pipe, tmp_path / "one", "one")
        delete_adapter(pipe, "one")
        assert equal(recorded.outputs(), clean)
        for component in names:
            after = getattr(pipe, component).state_dict()
            assert after.keys() == weights[component].keys()
            assert all(torch.equal(after[key], value) for key, value in weights[component].items())
        close(live, recorded.outputs(overrides=with_clean_names(dense)))
        loaded = load_adapter(pipe, tmp_path / "one", "one")
        assert loaded.applied == loaded.total
        close(recorded.outputs(), live)
        delete_adapter(pipe, "one")
        report = export_lora(tmp_path / "one", tmp_path / "plain.safetensors")
        assert report.rank == 2 and report.relative_error < 1e-5
        other = tiny_pipeline(recorded.name, recorded.folder)
        load_exported(other, tmp_path / "plain.safetensors")
        close(recorded.outputs(other), live)


def with_clean_names(weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        component: {k.replace(".base_layer", ""): v for k, v in group.items()} for component, group in weights.items()
    }


def test_the_adapted_modules_are_the_targeted_ones(restored: RecordedPipeline) -> None:
    """Attention has four projections, with other names in each kind of text encoder."""
    add_adapter(restored.pipe, nora(r=2, inner_r=1, basis="svd"), "one", list(components(restored.pipe)))
    endings = {
        component: {path.rsplit(".", 2 if path.endswith(".0") else 1)[-1 if not path.endswith(".0") else -2]
               for path in nora_layers(getattr(restored.pipe, component), "one")}
        for component in components(restored.pipe)
    }  # fmt: skip
    attention, clip, t5 = {"to_q", "to_k", "to_v", "to_out"}, {"q_proj", "k_proj", "v_proj", "out_proj"}, set("qkvo")
    expected = dict.fromkeys(endings, clip) | {denoiser_name(restored.pipe): attention}
    expected |= {"sd3": {"text_encoder_3": t5}, "flux": {"text_encoder_2": t5}, "pixart": {"text_encoder": t5}}.get(
        restored.name, {}
    )
    assert endings == expected


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_convolutions_by_pattern(name: str, tmp_path: Path) -> None:
    """The live adapter equals the dense kernel for 3x3 and 1x1 convolutions, also with stride."""
    recorded = RecordedPipeline(name, tmp_path)
    config = nora(r=4, inner_r=2, alpha=8.0, target_modules=CONV)
    add_adapter(recorded.pipe, config, "one")
    kernels = {layer.base_layer.kernel_size for layer in nora_layers(recorded.denoiser, "one").values()}
    assert kernels == {(3, 3), (1, 1)}
    train_one_step(recorded)
    with torch.no_grad():
        live = recorded.outputs()
        dense = with_clean_names(dense_weights(recorded.pipe, config))
        delete_adapter(recorded.pipe, "one")
        assert difference(recorded.outputs(), live)["unet"] > 1e-3
        close(recorded.outputs(overrides=dense), live)


def test_a_pattern_skips_modules_that_are_not_projections(pipe: Any) -> None:
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd", target_modules=r".*attn1\.to_.*"), "one")
    endings = {path.rpartition("attn1.")[2] for path in nora_layers(pipe.unet, "one")}
    assert endings == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_encoders_and_tokenizers_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    """In the same order, also for encoders that ``torch.compile`` wraps."""
    pipe = tiny_pipeline(name, tmp_path)
    encoders = [component for component in pipe.components if component.startswith("text_encoder")]
    own = [getattr(pipe, component.replace("text_encoder", "tokenizer")) for component in sorted(encoders)]
    plain = [getattr(pipe, component) for component in sorted(encoders)]
    for component in encoders:
        setattr(pipe, component, torch.compile(getattr(pipe, component), backend="eager"))
    for found, expected in (
        (text_encoders(pipe), plain),
        (networks(pipe)[1:], plain),
        (tokenizers(pipe), own),
    ):
        assert len(found) == len(expected) > 0
        assert all(one is other for one, other in zip(found, expected, strict=True))


BLOCKS = {
    "sd1": ["up_blocks.0.attentions.1", "mid_block"],
    "sdxl": ["down_blocks.1"],
    "sd3": ["transformer_blocks.1"],
    "flux": ["single_transformer_blocks.0", "transformer_blocks.0"],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_some_blocks_only(name: str, tmp_path: Path) -> None:
    pipe, blocks = tiny_pipeline(name, tmp_path), BLOCKS[name]
    module = getattr(pipe, denoiser_name(pipe))
    wanted = {path for path in projections(module) if any(path.startswith(f"{block}.") for block in blocks)}
    inside = {path for path in wanted if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))}
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd", target_modules=in_blocks(blocks)), "one")
    assert set(nora_layers(module, "one")) == inside != set()
    delete_adapter(pipe, "one")
    # The other way: exclude blocks.
    config = nora(r=2, inner_r=1, basis="svd", exclude_modules=rf".*({'|'.join(blocks)})\..*")
    add_adapter(pipe, config, "one")
    left = set(nora_layers(module, "one"))
    assert left and not left & wanted


def test_blocks_of_a_text_encoder(pipe: Any) -> None:
    picked = nora(r=2, inner_r=1, basis="svd", target_modules=in_blocks(["encoder.layers.1"], ["attn", "ff"]))
    add_adapter(pipe, picked, "one", ["text_encoder"])
    paths = nora_layers(pipe.text_encoder, "one")
    assert len(paths) == 6 and all(path.startswith("encoder.layers.1.") for path in paths)


@pytest.mark.parametrize(
    ("wanted", "components", "words"),
    [
        (["to_kk"], ["unet"], ["'to_kk'", "did you mean to_k"]),
        (["to_q", "to_qq"], ["unet"], ["'to_qq'", "did you mean to_q"]),
        (["q_proj"], ["unet"], ["q_proj", "UNet2DConditionModel"]),
        (["attn", "q_porj"], ["unet", "text_encoder"], ["'q_porj'", "q_proj"]),
        (["zzz"], ["unet"], ["'zzz'", "groups attn, context, ff, proj, conv", "to_q"]),
        (r".*\.attn3\.to_q", ["unet"], ["attn3", "did you mean", "to_q"]),
        (in_blocks(["down_blocks.7"]), ["unet"], ["down_blocks", "no projection"]),
    ],
)
def test_targets_that_match_nothing_get_suggestions(
    pipe: Any, wanted: str | list[str], components: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        add_adapter(pipe, nora(r=2, inner_r=1, basis="svd", target_modules=wanted), "one", components)
    assert all(word in str(error.value) for word in words), error.value
    assert not nora_layers(pipe.unet, "one")


def test_a_pattern_that_matches_nothing_is_refused(pipe: Any) -> None:
    config = nora(r=4, inner_r=2, basis="svd", rank_pattern={"to_v": 3, "to_qq": 2})
    with pytest.raises(UserError, match="'to_qq' matches no adapted projection: did you mean to_q"):
        add_adapter(pipe, config, "one")
    config = nora(r=4, inner_r=2, basis="svd", rank_pattern={"to_v": 3, "text_model.encoder.layers.1.*": 2})
    add_adapter(pipe, config, "one", list(components(pipe)))
    delete_adapter(pipe, "one")
    with pytest.raises(UserError, match="rank_pattern"):
        add_adapter(pipe, config, "one", "unet")
    config = nora(r=4, inner_r=2, basis="svd", inner_rank_pattern={"to_qq": 2})
    with pytest.raises(UserError, match="inner_rank_pattern: 'to_qq' matches no adapted projection"):
        add_adapter(pipe, config, "one")


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ({"unte": 0.0}, "'unte' is unknown in the weights of 'one': use unet, text_encoder"),
        ({}, "the weights of 'one' are empty"),
        ({"unet": {"dwn": 0.0}}, "'dwn' is unknown in the unet weights of 'one': use down, mid, up"),
        ({"unet": {"down": {"block_9": 0.0}}}, "'block_9' is unknown in the unet down weights of 'one'"),
        ({"unet": {"down": {}}}, "the unet down weights of 'one' are empty"),
        ({"unet": {"mid": float("nan")}}, "is not a finite number"),
        (None, "is not a finite number"),
    ],
)
def test_weights_for_missing_components_and_blocks_are_refused(pipe: Any, weight: Any, words: str) -> None:
    """Otherwise they would be ignored, and the weight would be 1."""
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), "one")
    set_adapters(pipe, "one", 0.5)
    with pytest.raises(UserError, match=words):
        set_adapters(pipe, ["one"], [weight])
    with pytest.raises(UserError, match="'one' is listed twice"):
        set_adapters(pipe, ["one", "one"], [1.0, 0.0])
    assert {layer.scaling["one"] for layer in nora_layers(pipe.unet, "one").values()} == {0.5}


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_weights_by_component_reach_every_component(name: str, tmp_path: Path) -> None:
    """Also T5 encoders, which diffusers' ``set_adapters`` does not support."""
    pipe = tiny_pipeline(name, tmp_path)
    for adapter in ("one", "two"):
        add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), adapter, list(components(pipe)))
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), "three", list(components(pipe))[-1:])
    weights = {component: 0.1 * number for number, component in enumerate(components(pipe), 1)}
    set_adapters(pipe, ["one", "three"], [weights, weights])
    for component in components(pipe):
        for layer in nora_layers(getattr(pipe, component), "one").values():
            assert {name: layer.scaling[name] for name in layer.live_names()} == dict.fromkeys(
                [name for name in ("one", "three") if name in layer.nora_delta], weights[component]
            )
    with pytest.raises(UserError, match="does not support weights by block"):
        set_adapters(pipe, "one", {list(components(pipe))[-1]: {"block_1": 0.5}})
    with pytest.raises(UserError, match="is not a finite number"):
        set_adapters(pipe, "one", {list(components(pipe))[-1]: "half"})


def test_a_name_may_belong_to_one_component_only(pipe: Any) -> None:
    add_adapter(
        pipe, nora(r=2, inner_r=1, basis="svd", target_modules=["to_q", "q_proj"]), "one", list(components(pipe))
    )
    assert nora_layers(pipe.unet, "one") and nora_layers(pipe.text_encoder, "one")
