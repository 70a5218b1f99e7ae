"""Every function of this folder with odd values: it works, or an error names the value and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    load_adapter,
    mixed_batch,
    open_pipeline,
    save_adapter,
    set_adapters,
    set_rank,
)
from nora_diffusion.adapters import PRESETS, AdapterConfig, dylora, lora, malora, mor, nora
from nora_diffusion.adapters.axes import axis_types
from nora_diffusion.loaders import active_adapters, list_adapters, trainable_parameters
from nora_diffusion.pipelines.components import components, tuner_layers

GOOD: list[Any] = [0, 1, -1.5, 0.0, 100, -100.0, np.float32(0.5), np.float16(0.25), np.int64(2), Fraction(1, 2), 1e-300]
BAD: list[Any] = [
    float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e38, 101, 10**400, -(10**30), True, False, "0.5", "",
    b"1", 1j, object(), np.float64("nan"), np.bool_(True), None, torch.tensor(0.5), torch.tensor(float("nan")),
    np.array(0.5), len, type,
]  # fmt: skip
ODD: list[Any] = [
    1, -1, -1.5, np.float32(0.5), float("nan"), 1e300, 2**63, 10**400, True, "0.5", "", "x" * 20000, "\x00", "\ud800",
    b"1", Path("x"), None, [], {}, (), [1], [None], {"a": 1}, torch.tensor(0.5), np.array([]), object(), type,
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> Any:
    pipe = open_pipeline(tiny_base)
    for name, config in {"one": nora(r=2, inner_r=1, basis="svd"), "two": dylora(r=3)}.items():
        add_adapter(pipe, config, name, components=["unet", "text_encoder"])
        generator = torch.Generator().manual_seed(0)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "plain")
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])
    return pipe


@pytest.fixture(scope="module")
def saved(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(pipe, tmp_path_factory.mktemp("saved"), "one").parent


def state(pipe: Any) -> dict[str, Any]:
    """All that the functions change: active adapters, weights, ranks, modules, trained parameters."""
    found: dict[str, Any] = {"adapters": list_adapters(pipe), "tokenizer": len(pipe.tokenizer)}
    for component, module in components(pipe).items():
        found[component] = [path for path, _ in module.named_modules()]
        found[f"{component} trained"] = [name for name, p in module.named_parameters() if p.requires_grad]
        found[f"{component} hooks"] = len(module._forward_pre_hooks)
        found[f"{component} layers"] = [
            (list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters) for layer in tuner_layers(module)
        ]
        found[f"{component} ranks"] = [m.rank for m in module.modules() if hasattr(m, "sampled_rank")]
    return found


def attempt(pipe: Any, call: Callable[[], Any]) -> UserError | None:
    """Run it; after a :class:`UserError` nothing has changed, and any other error fails the test."""
    before = copy.deepcopy(state(pipe))
    try:
        call()
    except UserError as error:
        assert state(pipe) == before, error
        assert str(error)
        return error
    return None


def cases(values: list[Any]) -> Any:
    return pytest.mark.parametrize("value", values, ids=[f"{i}-{type(v).__name__}" for i, v in enumerate(values)])


@cases(GOOD)
def test_numbers_are_weights(pipe: Any, value: Any) -> None:
    set_adapters(pipe, ["one", "plain"], [value, 1.0])
    for layer in tuner_layers(pipe.unet):
        assert layer.active_adapters == ["one", "plain"]
        for name, scaling in layer.scaling.items():
            assert name != "one" or (type(scaling) is float and scaling == float(value))
    set_adapters(pipe, ["one"], {"unet": {"down": value, "mid": 0.5}, "text_encoder": value})
    with mixed_batch(pipe, [("one", value), None], 1.0):
        pass
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])


@cases(BAD)
def test_other_values_are_not(pipe: Any, value: Any, saved: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: set_adapters(pipe, "two", value),
        lambda: set_adapters(pipe, ["two", "one"], [1.0, value]),
        lambda: set_adapters(pipe, ["two", "plain"], [1.0, value]),
        lambda: set_adapters(pipe, ["two"], {"unet": 1.0, "text_encoder": value}),
        lambda: set_adapters(pipe, ["two"], {"unet": {"mid": value}}),
        lambda: set_adapters(pipe, ["two"], [{"unet": {"down": value}}]),
        lambda: load_adapter(pipe, saved, "new", weight=value),
        lambda: load_adapter(pipe, saved, "one", weight=value, hotswap=True),
        lambda: mixed_batch(pipe, ["one", "two"], [1.0, value]).__enter__(),
    ]
    for number, call in enumerate(calls):
        assert attempt(pipe, call) is not None, number
    if value is not None:
        for call in (
            lambda: mixed_batch(pipe, ["one", "two"], value).__enter__(),
            lambda: mixed_batch(pipe, [("one", value)]).__enter__(),
        ):
            assert attempt(pipe, call) is not None
    with pytest.raises(UserError):  # diffusers' own function, which is not all or nothing
        pipe.unet.set_adapters(["one"], [value if value is not None else "x"])
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])


def test_an_error_of_diffusers_is_undone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder comes after the UNet: its failure must not leave the UNet changed."""
    before = state(pipe)
    for target in (pipe.text_encoder, pipe.unet):
        layer = list(tuner_layers(target))[-1]
        monkeypatch.setattr(layer, "_set_weight", lambda *_: 1 / 0)
        for weights in (1.0, {"unet": {"down": 1.0}}):
            with pytest.raises(ZeroDivisionError):
                set_adapters(pipe, ["two", "one"], weights)
            assert state(pipe) == before
        monkeypatch.undo()


@cases(ODD)
def test_names_and_lists(pipe: Any, value: Any, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: set_adapters(pipe, value),
        lambda: set_adapters(pipe, ["one", value]),
        lambda: set_adapters(pipe, ["one", "two"], [value]),
        lambda: delete_adapter(pipe, value),
        lambda: mixed_batch(pipe, value).__enter__(),
        lambda: mixed_batch(pipe, [value, "ghost"]).__enter__(),
        lambda: save_adapter(pipe, tmp_path / "a", value),
        lambda: add_adapter(pipe, lora(r=1), value, components=["vae"]),
        lambda: add_adapter(pipe, value, "new"),
        lambda: set_rank(pipe, value, 1),
    ]
    for call in calls:
        attempt(pipe, call)
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])
    assert list_adapters(pipe) == {"unet": ["one", "two", "plain"], "text_encoder": ["one", "two"]}
    assert not list(tmp_path.iterdir())


@cases(ODD)
def test_options(pipe: Any, value: Any, saved: Path, tmp_path: Path) -> None:
    config, awsvd, one = nora(r=1, inner_r=1, basis="svd"), nora(r=1, inner_r=1), tmp_path / "one"
    calls: list[Callable[[], Any]] = [
        lambda: save_adapter(pipe, one, "one", dtype=value),
        lambda: save_adapter(pipe, one, "one", basis=value),
        lambda: save_adapter(pipe, one, "one", info=value),
        lambda: save_adapter(pipe, one, "one", card=value),
        lambda: load_adapter(pipe, value, "new"),
        lambda: load_adapter(pipe, saved, value, weight="x"),
        lambda: load_adapter(pipe, saved, "new", basis_dir=value, weight="x"),
        lambda: load_adapter(pipe, saved, "new", rank=1 if value is None else value),
        lambda: add_adapter(
            pipe, config, "new", components=["vae"] if not isinstance(value, str | list | tuple) or not value else value
        ),
        lambda: add_adapter(pipe, config, "new", basis_from=saved / "no" if value is None else value),
        lambda: add_adapter(pipe, awsvd, "new", calibration=[3] if value is None else value),
    ]
    if not isinstance(value, str | Path):
        calls += [
            lambda: save_adapter(pipe, value, "one"),
            lambda: save_adapter(pipe, one, "one", basis="shared", basis_dir=value),
        ]
    for number, call in enumerate(calls):
        attempt(pipe, call)
        assert "new" not in list_adapters(pipe)["unet"], number


@cases([*ODD, 1.5, 4, 0, 2.0, torch.tensor(1.5), torch.tensor([1]), "2"])
def test_ranks(pipe: Any, value: Any) -> None:
    error = attempt(pipe, lambda: set_rank(pipe, "two", value))
    ranks = {m.rank for m in pipe.unet.modules() if getattr(m, "masked", False)}
    if error is None:
        assert ranks == {None if value is None else int(value)} and ranks <= {None, 1, 2, 3}
    else:
        assert "rank=" in str(error)
    set_rank(pipe, "two", None)
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), np.uint8(2)])
def test_whole_numbers_are_ranks(pipe: Any, value: Any) -> None:
    set_rank(pipe, "two", value)
    assert {m.rank for m in pipe.unet.modules() if getattr(m, "masked", False)} == {2}
    set_rank(pipe, "two", None)


@pytest.mark.parametrize("field", list(axis_types()))
def test_fields_of_a_config(field: str) -> None:
    """Each value works in a layer, or is refused when the config is made."""
    for value in [*ODD, [0.5], {"to_q": 0.5}, {"to_q": True}, {3: 4}, [None], [float("nan")], {"to_q": float("inf")}]:
        for make in (dylora, nora, mor, malora):
            try:
                config = make(**{field: value})
            except UserError as error:
                assert len(str(error)) < 500
                continue
            except TypeError as error:  # a field that the preset sets itself
                assert "multiple values" in str(error)
                continue
            assert AdapterConfig(**{k: v for k, v in config.to_dict().items() if k in axis_types()}) is not None
            numbers = [getattr(config, name) for name in ("r", "inner_r", "num_experts", "blocks")]
            assert all(type(number) is int and number >= 1 for number in numbers)
            assert 0 < config.scale_for("unet.to_q") < 1e6 and 1 <= config.rank_for("unet.to_q") <= 2**16


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    config = lora(r=np.int64(4), alpha=torch.tensor(2.0), dropout=np.float64(0.5), magnitude=np.bool_(True))  # type: ignore[arg-type]
    assert config.to_dict() == lora(r=4, alpha=2.0, dropout=0.5, magnitude=True).to_dict()
    assert [type(v) for v in (config.r, config.alpha, config.dropout, config.magnitude)] == [int, float, float, bool]
    assert nora(target_modules={"to_v", "to_q"}).target_modules == ["to_q", "to_v"]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", sorted(PRESETS))
@pytest.mark.parametrize("value", [True, 1.5, float("nan"), "4", 10**400, -1, 0, None, [4]])
def test_a_rank_is_a_whole_number(method: str, value: Any) -> None:
    with pytest.raises(UserError, match="r="):
        PRESETS[method](r=value)


def test_a_large_weight_gives_finite_images(pipe: Any) -> None:
    for weight in (100.0, -100.0):
        set_adapters(pipe, ["one"], weight)
        x: Tensor = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
        states = torch.zeros(1, 8, pipe.unet.config.cross_attention_dim)
        with torch.no_grad():
            assert torch.isfinite(pipe.unet(x, 10, states).sample).all()
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])
    assert active_adapters(pipe.unet) == ["one", "two"]
