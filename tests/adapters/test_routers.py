"""Mixtures against their formulas, and router inputs against the models that compute them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from factories import randomize
from torch import Tensor, nn

from nora_diffusion import UserError, add_adapter, delete_adapter, load_adapter, save_adapter, set_adapters
from nora_diffusion.adapters import AdapterConfig, NoraLayer, malora, moe_lora, mor
from nora_diffusion.adapters.config import Start
from nora_diffusion.adapters.deltas.routed import RoutedDelta, RouterInputs
from nora_diffusion.attention import MoRAttnProcessor
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.router_inputs import connected

D_OUT, D_IN, WIDTH, N = 10, 12, 7, 3
CONDITIONED = ("prompt", "timestep", "prompt+timestep")
KINDS: dict[str, Callable[..., AdapterConfig]] = {
    "shared": lambda **axes: mor(r=4, num_experts=N, alpha=8.0, **axes),
    "independent": lambda **axes: moe_lora(r=2, num_experts=N, alpha=4.0, **axes),
    "projected": lambda **axes: malora(r=4, inner_r=2, num_experts=N, alpha=8.0, **axes),
}
Kind = Callable[..., AdapterConfig]


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def routed_layer(config: AdapterConfig, base: nn.Module) -> NoraLayer:
    layer = NoraLayer(base.double())
    config.start = Start(condition=WIDTH)
    layer.update_layer("x", config, "m")
    layer.double()
    for parameter in layer.delta("x").parameters():
        parameter.data.normal_()
    return layer


def expert_weights(delta: RoutedDelta) -> list[Tensor]:
    """The dense ``dW_i`` of each expert, from the formulas of the papers."""
    e, dense = delta.experts, []
    for i in range(N):
        if hasattr(e, "a"):
            dense.append(torch.diag(e.b[i]) @ e.B @ torch.diag(e.a[i]) @ e.A)
        elif hasattr(e, "P"):
            dense.append(e.B[:, i * 2 : (i + 1) * 2] @ e.P[i] @ e.A)
        else:
            mine = slice(i * e.r, (i + 1) * e.r)
            dense.append(e.B[:, mine] @ e.A[mine])
    return dense


def gated_weight(delta: RoutedDelta, vector: Tensor) -> Tensor:
    logits = [sum(delta.W_g[i, j] * vector[j] for j in range(len(vector))) for i in range(N)]
    powers = torch.stack([torch.exp(logit) for logit in logits])
    return sum(g * w for g, w in zip(powers / powers.sum(), expert_weights(delta), strict=True))  # type: ignore[return-value]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_token_router_gates_each_token(kind: Kind, grad: bool) -> None:
    layer = routed_layer(kind(), nn.Linear(D_IN, D_OUT))
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([layer.base_layer(t) + 2 * gated_weight(layer.delta("x"), t) @ t for t in row]) for row in x]
    )
    with torch.set_grad_enabled(grad):
        close(layer(x), expected)


@pytest.mark.parametrize("router", CONDITIONED)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 1, 0, 1], [2, 2, 2, 2]], ids=["own", "shared", "one"])
def test_conditioned_router_gates_each_row(kind: Kind, router: str, grad: bool, rows: list[int]) -> None:
    layer = routed_layer(kind(router=router), nn.Linear(D_IN, D_OUT))
    names = router.split("+")
    widths = {"prompt": WIDTH, "timestep": WIDTH} if len(names) == 1 else {"prompt": 4, "timestep": 3}
    vectors = {name: torch.randn(4, widths[name])[rows].double() for name in names}
    layer.delta("x").router_inputs = router_inputs = RouterInputs()
    x = torch.randn(4, 5, D_IN, dtype=torch.float64)
    expected = []
    for row in range(4):
        seen = torch.cat([vectors[name][row] for name in names])
        dense = layer.base_layer.weight + 2 * gated_weight(layer.delta("x"), seen)
        expected.append(x[row] @ dense.T + layer.base_layer.bias)
    with torch.set_grad_enabled(grad):
        router_inputs.open(vectors)
        close(layer(x), torch.stack(expected))
        close(layer(x[:, 0]), torch.stack(expected)[:, 0])
    if len(set(rows)) == 1:  # then a batch of another size has a gate too
        close(layer(x[:3]), torch.stack(expected)[:3])


def test_conditioned_router_gates_a_wide_convolution(kind: Kind) -> None:
    layer = routed_layer(kind(router="timestep"), nn.Conv2d(5, D_OUT, 3, stride=2, padding=1))
    vector = torch.randn(2, WIDTH, dtype=torch.float64)
    layer.delta("x").router_inputs = router_inputs = RouterInputs()
    router_inputs.open({"timestep": vector})
    x, base = torch.randn(2, 5, 7, 7, dtype=torch.float64), layer.base_layer
    for row in range(2):
        dense = base.weight + 2 * gated_weight(layer.delta("x"), vector[row]).view_as(base.weight)
        close(layer(x)[row], torch.nn.functional.conv2d(x[row], dense, base.bias, stride=2, padding=1))


def test_gradients_reach_the_router(kind: Kind) -> None:
    """Every trained factor gets the gradient that autograd computes through the dense formula."""
    layer = routed_layer(kind(router="prompt"), nn.Linear(D_IN, D_OUT))
    layer.base_layer.requires_grad_(False)
    delta, vector = layer.delta("x"), torch.randn(2, WIDTH, dtype=torch.float64)
    delta.router_inputs = RouterInputs()
    delta.router_inputs.open({"prompt": vector})
    x = torch.randn(2, 4, D_IN, dtype=torch.float64)
    factors = dict(delta.named_parameters())
    found = torch.autograd.grad(layer(x).square().sum(), list(factors.values()))
    y = torch.stack([layer.base_layer(x[row]) + 2 * x[row] @ gated_weight(delta, vector[row]).T for row in range(2)])
    expected = torch.autograd.grad(y.square().sum(), list(factors.values()))
    for name, ours, dense in zip(factors, found, expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-4, msg=name)
        assert ours.abs().max() > 0


# Router inputs of real models


def tiny_unet(**extra: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, **extra,
    ).eval()  # fmt: skip


def sd() -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = tiny_unet()
    t = torch.tensor([3, 3, 70, 3])
    inputs = {"sample": torch.randn(4, 4, 8, 8), "timestep": t, "encoder_hidden_states": torch.randn(4, 5, 16)}
    return model, inputs, model.time_embedding(model.time_proj(t))


def sdxl() -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4
    )
    t, pooled, sizes = torch.tensor([3, 3, 70, 3]), torch.randn(4, 16), torch.randint(0, 99, (4, 6)).float()
    inputs = {
        "sample": torch.randn(4, 4, 8, 8), "timestep": t, "encoder_hidden_states": torch.randn(4, 5, 16),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
    }  # fmt: skip
    embedded = model.add_time_proj(sizes.flatten()).reshape(4, -1)
    added = model.add_embedding(torch.cat([pooled, embedded], dim=-1))
    return model, inputs, model.time_embedding(model.time_proj(t)) + added


def sd3() -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    ).eval()  # fmt: skip
    t, pooled = torch.tensor([3.0, 3.0, 70.0, 3.0]), torch.randn(4, 12)
    inputs = {
        "hidden_states": torch.randn(4, 4, 8, 8), "timestep": t, "encoder_hidden_states": torch.randn(4, 5, 16),
        "pooled_projections": pooled,
    }  # fmt: skip
    return model, inputs, model.time_text_embed(t, pooled)


def flux() -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    t, pooled = torch.tensor([0.1, 0.1, 0.7, 0.1]), torch.randn(4, 12)
    inputs = {
        "hidden_states": torch.randn(4, 9, 4), "timestep": t, "encoder_hidden_states": torch.randn(4, 5, 16),
        "pooled_projections": pooled, "img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, inputs, model.time_text_embed(t * 1000, pooled)


class Pipe:
    """The minimal pipeline for adding an adapter."""

    def __init__(self, model: nn.Module) -> None:
        setattr(self, "unet" if hasattr(model, "down_blocks") else "transformer", model)


def only(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch."""
    shared = ("img_ids", "txt_ids")
    return {
        key: only(value, row) if isinstance(value, dict) else value if key in shared else value[row : row + 1]
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("make", [sd, sdxl, sd3, flux], ids=lambda f: f.__name__)
def test_router_inputs_are_those_of_the_model(make: Callable[[], tuple[nn.Module, dict[str, Any], Tensor]]) -> None:
    model, inputs, emb = make()
    add_adapter(Pipe(model), mor(r=2, num_experts=N, router="prompt+timestep"), "one")
    seen: dict[str, Tensor] = {}
    delta = next(m for m in model.modules() if isinstance(m, RoutedDelta))
    assert delta.router_inputs is not None
    layer = next(m for m in model.modules() if isinstance(m, NoraLayer))
    layer.register_forward_hook(lambda *_: seen.update(delta.router_inputs.vectors))  # type: ignore[union-attr]
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(seen["prompt"], inputs["encoder_hidden_states"].mean(1))
    torch.testing.assert_close(seen["timestep"], emb)
    assert not delta.router_inputs.vectors


@pytest.mark.parametrize("make", [sd, sdxl, sd3, flux], ids=lambda f: f.__name__)
@pytest.mark.parametrize("router", ["prompt", "timestep"])
def test_each_row_is_routed_by_its_own_inputs(
    make: Callable[[], tuple[nn.Module, dict[str, Any], Tensor]], router: str
) -> None:
    """Guidance and mixed prompts: two rows with equal inputs and two others; each equals its own pass."""
    model, inputs, _ = make()
    inputs["encoder_hidden_states"][1] = inputs["encoder_hidden_states"][0]
    pipe = Pipe(model)
    before = model(**inputs)[0].detach()
    add_adapter(pipe, mor(r=2, num_experts=N, router=router), "one")  # type: ignore[arg-type]
    randomize(pipe)
    together = model(**inputs)[0].detach()
    assert (together - before).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], together, atol=1e-5, rtol=1e-4)
        for row in range(4):
            alone = model(**only(inputs, row))[0]
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_processor_equals_layers(pipe: Any, kind: Kind) -> None:
    add_adapter(pipe, kind(router="prompt+timestep"), "one")
    randomize(pipe)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = pipe.unet(x, 3, states).sample
        pipe.unet.set_attn_processor(MoRAttnProcessor())
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, expected, atol=1e-6, rtol=1e-6)


def gradients(pipe: Any, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    parameters = trainable_parameters(pipe, "one")
    for parameter in parameters.values():
        parameter.grad = None
    losses().backward()
    return {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}


def test_gradient_checkpointing_uses_the_inputs_of_its_own_pass(pipe: Any) -> None:
    """Layers run again in backward, here for two passes with different prompts and timesteps in one backward."""
    add_adapter(pipe, mor(r=4, num_experts=N, router="prompt+timestep"), "one")
    randomize(pipe)
    pipe.unet.train()
    batches = [(torch.randn(2, 4, 8, 8), t, torch.randn(2, 5, 16)) for t in (3, 700)]

    def loss() -> Tensor:
        return sum(pipe.unet(*batch).sample.square().mean() for batch in batches)  # type: ignore[return-value]

    expected = gradients(pipe, loss)
    pipe.unet.enable_gradient_checkpointing()
    found = gradients(pipe, loss)
    assert found.keys() == expected.keys() and any("W_g" in key for key in found)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-4, msg=key)
    delta = next(m for m in pipe.unet.modules() if isinstance(m, RoutedDelta))
    assert delta.router_inputs is not None and not delta.router_inputs.vectors


# In a pipeline


def test_a_layer_outside_of_a_forward_pass_is_refused(pipe: Any) -> None:
    add_adapter(pipe, mor(r=4, num_experts=N, router="timestep"), "one")
    layer = next(m for m in pipe.unet.modules() if isinstance(m, NoraLayer))
    x = torch.randn(1, 3, layer.base_layer.in_features)
    with pytest.raises(UserError, match="no timestep is known"):
        layer(x)
    with torch.no_grad():
        pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16))
        with pytest.raises(UserError, match="no timestep is known"):
            layer(x)
        broken = torch.randn(1, 5, 3)
        with pytest.raises(RuntimeError):
            pipe.unet(torch.randn(1, 4, 8, 8), 3, broken)
        with pytest.raises(UserError, match="no timestep is known"):
            layer(x)


def test_native_injection_is_refused(pipe: Any) -> None:
    with pytest.raises(UserError, match="add_adapter"):
        pipe.unet.add_adapter(mor(r=2, router="prompt"), "one")


def test_text_encoders_route_by_token(pipe: Any, tmp_path: Path) -> None:
    add_adapter(pipe, mor(r=4, num_experts=N, router="prompt"), "one", ["unet", "text_encoder"])
    assert pipe.unet.peft_config["one"].router == "prompt"
    assert pipe.text_encoder.peft_config["one"].router == "token"
    randomize(pipe)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = pipe.text_encoder(ids)[0]
    info = load_adapter(pipe, save_adapter(pipe, tmp_path, "one"), "two").info
    assert {component: config.router for component, config in info.configs.items()} == {
        "unet": "prompt", "text_encoder": "token",
    }  # fmt: skip
    set_adapters(pipe, "two")
    with torch.no_grad():
        assert torch.equal(pipe.text_encoder(ids)[0], before)


def test_hooks_are_added_and_removed_with_the_adapters(pipe: Any) -> None:
    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())

    before = hooks()
    add_adapter(pipe, mor(r=4, num_experts=N, router="prompt"), "one")
    one = hooks()
    add_adapter(pipe, mor(r=4, num_experts=N, router="timestep"), "two")
    assert before < one < hooks()
    delete_adapter(pipe, "two")
    assert hooks() == one
    pipe.delete_adapters("one")  # diffusers' method: the hooks are removed in the next pass
    with torch.no_grad():
        pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16))
    assert hooks() == before and connected(pipe.unet) is None


def test_a_copied_model_has_its_own_router_inputs(pipe: Any) -> None:
    add_adapter(pipe, mor(r=4, num_experts=N, router="prompt+timestep"), "one")
    randomize(pipe)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = pipe.unet(x, 3, states).sample
        twin = copy.deepcopy(pipe.unet)
        delete_adapter(pipe, "one")
        assert torch.equal(twin(x, 3, states).sample, expected)
        assert not torch.equal(pipe.unet(x, 3, states).sample, expected)


@pytest.mark.parametrize("router", ["token", *CONDITIONED])
def test_fusing_warns_and_leaves_a_mixture_live(pipe: Any, kind: Kind, router: str) -> None:
    add_adapter(pipe, kind(router=router), "one")
    randomize(pipe)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        live = pipe.unet(x, 3, states).sample
        weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.fuse_lora()
        assert any("stays live" in str(w.message) for w in caught)
        assert torch.equal(pipe.unet(x, 3, states).sample, live)
        assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: mor(router="pixel"), "pixel"),
        (lambda: moe_lora(router="none"), "needs a router"),
        (lambda: moe_lora(num_experts=1, router="none"), "independent"),
        (lambda: mor(experts="some"), "some"),
    ],
)
def test_bad_mixtures_are_refused_with_their_field(make: Callable[[], AdapterConfig], word: str) -> None:
    with pytest.raises(UserError, match=word):
        make()
