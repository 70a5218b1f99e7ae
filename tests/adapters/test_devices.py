"""The hot path on an accelerator, tested without one: fake tensors raise where a real device would fail or stall.

The ``meta`` device stands in for the accelerator. Under torch's ``FakeTensorMode`` an operation raises if its tensors
are on two devices or have two dtypes, and if it reads values of a tensor, for which the CPU would have to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from nora_diffusion.adapters import PRESETS, AdapterConfig, NoraLayer, lora, nora
from nora_diffusion.adapters.config import Start
from nora_diffusion.adapters.deltas.bases import BASES
from nora_diffusion.adapters.tuner import merging
from nora_diffusion.adapters.tuner.mixed_rows import serve_rows
from nora_diffusion.adapters.tuner.row_plan import RowPlan
from nora_diffusion.attention import AdapterAttnProcessor
from nora_diffusion.loaders.inject import inject

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

ACCELERATOR = torch.device("meta")
ROUTERS = ("token", "prompt", "timestep", "prompt+timestep")
CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    **{name: make for name, make in PRESETS.items() if name != "mor"},
    **{f"mor {router}": lambda router=router: PRESETS["mor"](router=router) for router in ROUTERS},  # type: ignore[misc]
}
PERMITTED = {
    "torch.equal": "a mixed batch compares the bases of its adapters once, at the start",
    "torch.rand": "a sampled rank is drawn on the CPU, which needs no synchronization",
}
"""Functions that may read values of a tensor, and why; nothing else in a pass may."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors during a test; replaces the functions in :data:`PERMITTED`."""

    def draw(size: tuple[()], device: str) -> float:
        assert device == "cpu"
        return 0.5

    stand_ins: dict[str, Any] = {"torch.equal": lambda one, two: one.shape == two.shape, "torch.rand": draw}
    assert stand_ins.keys() == PERMITTED.keys()
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(name, stand_in)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",), mid_block_type=None, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4,
    )  # fmt: skip


def move(model: nn.Module) -> None:
    """Like ``.to(device)``, which cannot convert real tensors to fake ones."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(on_accelerator(value), requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else on_accelerator(buffer)


def on_accelerator(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=ACCELERATOR)


def adapted_unet(config: AdapterConfig) -> UNet2DConditionModel:
    """A UNet in half precision on the accelerator with two active adapters that require gradients."""
    with _disable_current_modes():
        unet = tiny_unet().requires_grad_(False).half()
        for name in ("one", "two"):
            inject(unet, config, name, Start(empty=True))
        for layer in layers(unet):
            layer.activate(["one", "two"])
            for name in ("one", "two"):
                layer.set_scale(name, 1.0)
            layer.nora_delta.requires_grad_(True)
    move(unet)
    return unet


def layers(model: nn.Module) -> list[NoraLayer]:
    return [module for module in model.modules() if isinstance(module, NoraLayer)]


def predict(unet: Any) -> Tensor:
    x = torch.empty(4, 4, 4, 4, device=ACCELERATOR, dtype=torch.float16)
    states = torch.empty(4, 5, 16, device=ACCELERATOR, dtype=torch.float16)
    return unet(x, torch.zeros(4, device=ACCELERATOR, dtype=torch.long), states).sample  # type: ignore[no-any-return]


def backward(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.grad = None
    predict(unet).float().square().mean().backward()
    trained = [parameter for layer in layers(unet) for parameter in layer.nora_delta.parameters()]
    assert trained and all(p.grad is not None and p.grad.device == ACCELERATOR for p in trained)


def two_subjects(unet: Any) -> AbstractContextManager[None]:
    return serve_rows(unet, RowPlan([{"one": 1.0}, {"two": 0.5}]))


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_training_stays_on_the_device(fakes: None, make: Callable[[], AdapterConfig]) -> None:
    unet = adapted_unet(make()).train()
    with two_subjects(unet):
        backward(unet)
    unet.enable_gradient_checkpointing()
    backward(unet)


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_inference_stays_on_the_device(fakes: None, make: Callable[[], AdapterConfig]) -> None:
    unet = adapted_unet(make()).eval()
    assert predict(unet).device == ACCELERATOR
    with two_subjects(unet):
        predict(unet)
    for layer in layers(unet):
        if layer.delta("one").mergeable:
            assert layer.get_delta_weight("one").device == ACCELERATOR
    unet.set_attn_processor(AdapterAttnProcessor())
    predict(unet)


def test_mixed_devices_and_synchronization_are_detected(fakes: None) -> None:
    """The tests above would fail in these cases."""
    with pytest.raises(Exception, match="device"):
        torch.empty(2, 2, device=ACCELERATOR) @ torch.empty(2, 2, device="cpu")
    with pytest.raises(Exception, match="_local_scalar_dense"):
        float(torch.empty((), device=ACCELERATOR))
    unet = adapted_unet(lora()).train()
    delta = layers(unet)[0].delta("one")
    delta.A = nn.Parameter(torch.empty(delta.A.shape))
    with pytest.raises(Exception, match="device"):
        predict(unet)


# Outside of a pass


@pytest.mark.parametrize("basis", ["kaiming", "orthogonal"])
def test_random_factors_do_not_depend_on_the_device(basis: Any) -> None:
    """They are drawn on the CPU in fp32: the same draws from its generator for every device and dtype."""
    states, pairs = [], []
    for dtype, device in ((torch.float32, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")):
        torch.manual_seed(0)
        pairs.append(BASES[basis](torch.empty(6, 8, dtype=dtype, device=device), 4, None, placement="sqrt", power=1.0))
        states.append(torch.get_rng_state())
        assert all(factor.device.type == device and factor.dtype == torch.float32 for factor in pairs[-1])
    assert all(torch.equal(state, states[0]) for state in states)
    assert all(torch.equal(one, other) for one, other in zip(pairs[0], pairs[1], strict=True))


def test_merging_keeps_nothing_on_the_accelerator(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "bit_sum", lambda _: 0)  # a fake tensor has no data
    with _disable_current_modes():
        layer = NoraLayer(nn.Linear(8, 8, bias=False))
        for name in ("one", "two"):
            layer.update_layer(name, nora(r=4, inner_r=2, basis="orthogonal"), "x")
    move(layer)
    monkeypatch.setattr(FakeTensor, "is_meta", False)  # layers refuse to merge weights without data
    layer.merge(adapter_names=["one"])
    layer.merge(adapter_names=["two"])
    saved = [value for value in vars(layer.merging).values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in saved if value.device == ACCELERATOR) == 0 < sum(v.nbytes for v in saved)
    assert layer.get_delta_weight("one").device == ACCELERATOR
    layer.delete_adapter("one")
    layer.unmerge()
    assert layer.base_layer.weight.device == ACCELERATOR
