"""Optimizers, exact resuming, LoRA+, the norm limit, EMA and fractions of a run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, resolve
from safetensors.torch import load_file
from torch import nn

from nora_diffusion import load_adapter, open_pipeline
from nora_diffusion.adapters import NoraLayer
from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, main, train
from nora_diffusion.training.run import run
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.settings.checks import check_config
from nora_diffusion.training.step.averaging import Average
from nora_diffusion.training.step.optimization import bound_norms, build_optimizer

PACKAGES = {"prodigy": "prodigyopt", "schedulefree": "schedulefree", "adamw8bit": "bitsandbytes"}
VARIATIONS: dict[str, dict[str, Any]] = {
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedulefree": {"optimizer": "schedulefree", "lr_warmup_steps": 2, "validation_prompt": "a dog"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd", "lr_scheduler": "cosine"},
    "lora_pro": {"optimizer": "lora_pro", "method": "lora", "inner_rank": None, "basis": None},
    "lora_pro, factors": {"optimizer": "lora_pro", "lora_pro_moments": "factors"},
    "lora_rite": {"optimizer": "lora_rite", "gradient_accumulation_steps": 2, "ema_decay": 0.9},
    "lora_rite, magnitude": {"optimizer": "lora_rite", "magnitude": True, "train_text_encoder": True},
    "average": {"ema_decay": 0.99, "validation_prompt": "a dog", "validation_steps": 1},
    "LoRA+ and norm limit": {"loraplus_lr_ratio": 4.0, "scale_weight_norms": 0.05},
    "fractions": {"train_text_encoder": True, "text_encoder_frac": 0.5, "denoiser_frac": 0.75},
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_it_resumes_bit_for_bit_at_every_step(variation: dict[str, Any], configure: Configure, tmp_path: Path) -> None:
    if not find_spec(PACKAGES.get(variation.get("optimizer", ""), "torch")):
        pytest.skip(f"{variation['optimizer']} is not installed")
    settings = {"max_train_steps": 4, "checkpointing_steps": 1, **variation}
    whole = train(configure(**settings)).adapter_path
    expected, log = load_file(whole), (whole.parent / "log.jsonl").read_text().splitlines()
    last = load_file(whole.parent / "checkpoints/step-4/optimizer.safetensors")
    assert any(value.any() for key, value in expected.items() if key.endswith(("B_in", "nora_B")))
    for step in (1, 2, 3):
        train(configure(**settings, resume_from_checkpoint=str(whole.parent / f"checkpoints/step-{step}")))
        assert all(torch.equal(value, expected[key]) for key, value in load_file(whole).items())
        again = load_file(whole.parent / "checkpoints/step-4/optimizer.safetensors")
        assert again.keys() == last.keys() and all(torch.equal(again[key], last[key]) for key in last)
        now = (whole.parent / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in now] == [json.loads(line)["loss"] for line in log]


def test_prodigy_has_one_rate_also_with_new_tokens(configure: Configure) -> None:
    """With any learning rate; the config.yaml of the run repeats it."""
    pytest.importorskip("prodigyopt")
    words = {"instance_prompt": "a photo of <pet> dog", "train_text_encoder_ti": True, "validation_prompt": "a <pet>"}
    config = configure(optimizer="prodigy", learning_rate=0.5, **words)
    train(config)
    assert main(["--config", str(config.folder / "config.yaml"), "--overwrite_output_dir"]) == 0


def test_adamw_steps_equal_torchs_loop_bit_for_bit(configure: Configure) -> None:
    """On a CPU, where our optimizer does not leave the choice to torch."""
    source, found = torch.Generator().manual_seed(0), []
    shapes = [(8, 33), (160, 8), (5,)]
    starts = [torch.randn(shape, generator=source) for shape in shapes]
    gradients = [[torch.randn(shape, generator=source) for shape in shapes] for _ in range(5)]
    for loop in (False, True):
        parameters = {f"unet.{n}.nora_A": nn.Parameter(start.clone()) for n, start in enumerate(starts)}
        optimizer = build_optimizer(resolve(configure(learning_rate=5e-3)), parameters)
        assert optimizer.defaults["foreach"]
        optimizer.param_groups[0]["foreach"] = not loop
        for step in gradients:
            for parameter, gradient in zip(parameters.values(), step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        found.append([*parameters.values()])
    assert all(map(torch.equal, *found))


def test_lora_plus_is_a_rate_for_the_up_factors() -> None:
    names = [
        "unet.a.nora_A_in",
        "unet.a.nora_B_in",
        "unet.a.nora_B",
        "text_encoder_2.b.nora_A",
        "text_encoder.b.nora_B",
    ]
    parameters = {name: nn.Parameter(torch.ones(2)) for name in names}
    config = resolve(TrainConfig(learning_rate=1e-3, text_encoder_lr=1e-4, loraplus_lr_ratio=16.0))
    optimizer = build_optimizer(config, parameters)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    got = [rates[id(parameters[name])] for name in names]
    assert got == pytest.approx([1e-3, 1.6e-2, 1.6e-2, 1e-4, 1.6e-3])


@pytest.mark.parametrize("optimizer", ["lora_pro", "lora_rite"])
@pytest.mark.parametrize("method", ["lora", "dora", "nora", "nora_input", "lora_mini", "melora", "dylora"])
def test_pairs_of_every_method_are_stepped_together(optimizer: str, method: str, configure: Configure) -> None:
    """Each pair with the scale of its layer; nothing but magnitudes is left to AdamW."""
    own = {"blocks": 2} if method == "melora" else {}
    frozen = ("nora", "nora_input", "lora_mini")
    config = configure(method=method, optimizer=optimizer, rank=4, alpha=2.0, basis=None, **own)
    config.inner_rank = 2 if method in frozen else None
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        original = run.build_optimizer
        patch.setattr(run, "build_optimizer", lambda *args: seen.append((args[1], original(*args))) or seen[-1][1])
        path = train(config).adapter_path
    ((parameters, built),) = seen
    paired = [group for group in built.param_groups if group["scales"] is not None]
    others = {id(value) for group in built.param_groups if group["scales"] is None for value in group["params"]}
    assert {scale for group in paired for scale in group["scales"]} == {0.5}
    assert {name for name, value in parameters.items() if id(value) in others} == {
        name for name in parameters if name.endswith(".nora_m")
    }
    assert all(value.isfinite().all() for value in load_file(path).values())


def test_lora_pros_rate_follows_from_its_moments() -> None:
    """In units of AdamW's: those of the full matrix make steps of the update itself."""
    kinds: list[dict[str, Any]] = [
        {"optimizer": "adamw"},
        {"optimizer": "lora_rite"},
        {"optimizer": "lora_pro"},
        {"optimizer": "lora_pro", "lora_pro_moments": "factors"},
    ]
    for method, shares in {"lora": [1, 1, 0.25, 2], "nora": [1, 1, 0.5, 2], "lora_mini": [1, 1, 0.5, 2]}.items():
        rates = [resolve(TrainConfig(method=method, **kind)).learning_rate for kind in kinds]
        assert [rate / rates[0] for rate in rates] == pytest.approx(shares)


def test_pairs_have_the_rates_of_their_component_and_lora_plus() -> None:
    shapes = {
        "unet.a.nora_A": (2, 5), "unet.a.nora_B": (7, 2), "text_encoder.b.nora_A": (2, 5),
        "text_encoder.b.nora_B": (7, 2), "tokens.0.text_encoder": (3, 5),
    }  # fmt: skip
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    config = resolve(TrainConfig(method="lora", learning_rate=1e-3, text_encoder_lr=1e-4, loraplus_lr_ratio=16.0))
    config.optimizer, config.token_lr = "lora_rite", 1e-2
    groups = build_optimizer(config, parameters, scales={"unet.a": 0.25}).param_groups
    assert [(group["lr"], group["lr_ratio"], group["scales"]) for group in groups] == [
        (1e-3, 16.0, [0.25]), (1e-4, 16.0, [1.0]), (1e-2, 16.0, None),
    ]  # fmt: skip
    assert groups[2]["weight_decay"] == 0.0
    with pytest.raises(UserError, match="no layer has such a pair"):
        build_optimizer(config, {"unet.a.nora_R": nn.Parameter(torch.zeros(2, 2))})


@pytest.mark.parametrize("method", ["nora", "lora", "lora_xs", "melora"])
def test_updates_are_limited_to_exactly_the_norm(method: str, configure: Configure) -> None:
    """Against the dense ``dW``: larger updates are scaled to the norm, smaller ones are unchanged."""
    foreign = {} if method == "nora" else {"inner_rank": None, "basis": "svd" if method == "lora_xs" else None}
    blocks = {"blocks": 2} if method == "melora" else {}
    result = train(configure(method=method, learning_rate=0.05, **foreign, **blocks))
    pipe = open_pipeline(configure().pretrained_model_name_or_path)
    load_adapter(pipe, result.adapter_path, "dog")
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, NoraLayer)]
    before = [layer.get_delta_weight("dog").double() for layer in layers]
    max_norm = float(torch.stack([dw.norm() for dw in before]).median()) * 1.001  # between two of them
    assert 0 < sum(float(dw.norm()) > max_norm for dw in before) < len(before)
    with pytest.MonkeyPatch.context() as patch:  # each of these would synchronize with the GPU
        for read in ("__float__", "__bool__", "item"):
            patch.setattr(torch.Tensor, read, None)
        bound_norms(layers, "dog", max_norm)
    for layer, dw in zip(layers, before, strict=True):
        after = layer.get_delta_weight("dog").double()
        assert torch.allclose(after, dw * min(1.0, max_norm / float(dw.norm())), atol=1e-6)


def test_the_ema_equals_its_formula_and_is_saved(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[dict[str, torch.Tensor]] = []
    original = Average.update

    def update(self: Average, parameters: Any, done: int) -> None:
        history.append({name: value.detach().clone() for name, value in parameters.items()})
        original(self, parameters, done)

    monkeypatch.setattr(Average, "update", update)
    result = train(configure(ema_decay=0.25, max_train_steps=4))
    saved = load_file(result.adapter_path)
    raw = load_file(result.adapter_path.parent / "checkpoints/step-4/nora_adapter.safetensors")
    start = load_file(train(configure(max_train_steps=1, learning_rate=1e-30, overwrite_output_dir=True)).adapter_path)
    for name in history[0]:
        value = start[name].double()
        for done, step in enumerate(history, start=1):
            decay = min(0.25, (1 + done) / (10 + done))
            value = decay * value + (1 - decay) * step[name].double()
        assert torch.allclose(saved[name].double(), value, atol=1e-6)
        assert torch.equal(raw[name], history[-1][name])


def test_a_component_stops_training_at_its_fraction(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[set[str]] = []
    original = Updates._update

    def update(self: Stepper, step: int) -> float:
        before = {name: value.detach().clone() for name, value in self.run.parameters.items()}
        norm = original(self, step)
        changed = {n for n, value in self.run.parameters.items() if not torch.equal(value, before[n])}
        moved.append({name.split(".")[0] for name in changed})
        return norm

    monkeypatch.setattr(Updates, "_update", update)
    train(configure(max_train_steps=4, train_text_encoder=True, text_encoder_frac=0.5, denoiser_frac=0.75))
    assert moved == [{"unet", "text_encoder"}, {"unet", "text_encoder"}, {"unet"}, set()]


def test_a_run_with_gradient_scaler_continues_without_gradients(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradScaler fails on a step without gradients."""
    original = Stepper.run_steps

    def run_steps(self: Stepper) -> list[float]:
        self.run.scaler = torch.amp.GradScaler("cpu")
        return original(self)

    monkeypatch.setattr(Stepper, "run_steps", run_steps)
    assert train(configure(denoiser_frac=0.5)).steps == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "prodigy", "loraplus_lr_ratio": 2.0},
            "prodigy estimates one learning rate|needs the package prodigyopt",
        ),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "needs no schedule|needs the package"),
        ({"use_8bit_adam": True, "optimizer": "sgd"}, "exclude each other"),
        ({"optimizer": "lora_pro", "method": "mor"}, "--method mor trains no such pair: use --method nora"),
        ({"optimizer": "lora_rite", "method": "lora_xs"}, "--method lora_xs trains no such pair"),
        ({"optimizer": "lora_rite", "core": "diagonal"}, "--core diagonal has none"),
        ({"optimizer": "lora_rite", "lora_pro_moments": "factors"}, "is a setting of --optimizer lora_pro"),
        ({"ema_decay": 1.0}, "must be at least 0 and below 1"),
        ({"denoiser_frac": 1.5}, "is a fraction of the run"),
        ({"method": "mor", "scale_weight_norms": 1.0}, "does not support mor"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(TrainConfig(instance_data_dir="photos", **settings))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match="--optimizer adamw8bit needs the package bitsandbytes"):
        check_config(TrainConfig(instance_data_dir="photos", optimizer="adamw8bit"))
