"""Weightings, losses, noise, timestep ranges and the frozen prior, against formulas and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from runs import Configure
from safetensors.torch import load_file

from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.run.batches import Batches
from nora_diffusion.training.step.noise import draw_noise, draw_timesteps
from nora_diffusion.training.step.objective import Objective, with_zero_snr

T = torch.tensor([1, 300, 700, 999])
DATA: dict[str, Any] = {"instance_data_dir": "photos"}


def scheduler(kind: str) -> Any:
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=2.0)
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_weighting_is_the_same_loss_in_x0_for_all_prediction_types(kind: str, weighting: str) -> None:
    """The weighted error in x_0, solved from the prediction in fp64, is that of the weighting."""
    objective = Objective.of(scheduler(kind), weighting=weighting, gamma=5.0)
    x, e, guess = torch.randn(3, 4, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double().unbind()
    s, n = (v[T].double().view(-1, 1, 1, 1) for v in (objective.signal, objective.noise))
    noisy = s * x + n * e
    clean = {
        "epsilon": (noisy - n * guess) / s,
        "v_prediction": (s * noisy - n * guess) / (s**2 + n**2),
        "sample": guess,
        "flow": noisy - n * guess,
    }[kind]
    snr = (s / n).square().flatten()
    weight = snr.clamp(max=5.0) if weighting == "min_snr" else snr.sqrt()
    expected = (clean - x).square().mean((1, 2, 3)) * weight
    assert torch.allclose(objective.losses(guess, objective.target(x, e, T), T).double(), expected, rtol=2e-3)


def test_huber_is_the_formula_and_nearly_l2_for_small_errors() -> None:
    objective = Objective.of(scheduler("epsilon"), loss="huber", huber_c=0.1)
    d = torch.tensor([1e-4, 0.05, 0.1, 3.0]).view(4, 1, 1, 1)
    expected = [2 * 0.1 * ((v**2 + 0.01) ** 0.5 - 0.1) for v in (1e-4, 0.05, 0.1, 3.0)]
    got = objective.errors(d, torch.zeros_like(d), T).flatten()
    assert torch.allclose(got, torch.tensor(expected), rtol=1e-3, atol=1e-8)
    assert got[0] == pytest.approx(1e-8, rel=0.2) and got[3] < 9 / 10


def test_offset_and_perturbation_have_the_moments_of_the_formulas() -> None:
    shape = torch.Size((64, 4, 16, 16))
    config = TrainConfig(**DATA, noise_offset=0.5, input_perturbation=0.2)
    noise, added = draw_noise(shape, config, torch.Generator().manual_seed(0))
    assert noise.mean((2, 3)).var() == pytest.approx(0.25 + 1 / 256, rel=0.25)  # one z' for each channel
    assert (noise - noise.mean((2, 3), keepdim=True)).var() == pytest.approx(1, rel=0.02)
    assert (added - noise).var() == pytest.approx(0.04, rel=0.02)
    plain, same = draw_noise(shape, TrainConfig(**DATA), torch.Generator().manual_seed(0))
    assert same is plain and torch.equal(plain, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def test_timesteps_stay_in_range_and_logit_normal_favors_the_middle() -> None:
    for sampling in ("uniform", "stratified", "logit_normal"):
        t = draw_timesteps(4000, range(200, 700), sampling, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        assert 200 <= int(t.min()) < 215 and 685 < int(t.max()) < 700
    z = (t.double().add(0.5).sub(200) / 500).logit()
    assert z.mean() == pytest.approx(0, abs=0.05) and z.std() == pytest.approx(1, rel=0.05)


def test_zero_terminal_snr_on_request() -> None:
    rescaled = with_zero_snr(scheduler("v_prediction"))
    plain, zero = Objective.of(scheduler("v_prediction")), Objective.of(rescaled)
    root = plain.signal.double()  # arXiv 2305.08891, algorithm 1
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert torch.allclose(zero.signal.double(), expected, atol=1e-4) and zero.signal[-1] < 1e-4
    for kind in ("epsilon", "flow"):
        with pytest.raises(UserError, match="--rescale_zero_snr needs a base with v-prediction"):
            with_zero_snr(scheduler(kind))


@pytest.mark.parametrize("encoder", [False, True])
def test_the_frozen_prior_is_the_base_prediction_in_the_same_batch(
    encoder: bool, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class rows equal the base's prediction at the first step, and differ from it afterwards."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Batches.mean_loss

    def mean_loss(self: Batches, batch: Any, prediction: torch.Tensor) -> torch.Tensor:
        errors = self.plan.objective.errors(prediction, batch.target, batch.t).mean((1, 2, 3)).detach()
        loss = original(self, batch, prediction)
        size = len(errors) // 2
        assert torch.allclose(loss, errors[:size].mean() + 0.5 * errors[size:].mean())
        seen.append((errors[size:], batch.noisy))
        return loss

    monkeypatch.setattr(Batches, "mean_loss", mean_loss)
    result = train(
        configure(
            with_prior_preservation=True, prior_preservation="frozen", class_prompt="a photo of dog",
            prior_loss_weight=0.5, train_text_encoder=encoder, learning_rate=0.05,
        )
    )  # fmt: skip
    assert not (result.adapter_path.parent / "class_images").exists()
    assert seen[0][0].max() < 1e-10 and all(errors.min() > 1e-7 for errors, _ in seen[1:])
    assert all(len(noisy) == 4 for _, noisy in seen)


def test_every_option_changes_a_run_and_resumes(configure: Configure, tmp_path: Path, tiny_v_base: Path) -> None:
    base = {"pretrained_model_name_or_path": str(tiny_v_base), "checkpointing_steps": 2, "max_train_steps": 3}
    plain = load_file(train(configure(**base)).adapter_path)
    options: dict[str, Any] = {
        "loss_weighting": "debiased", "loss_type": "huber", "noise_offset": 0.1, "input_perturbation": 0.1,
        "timestep_sampling": "logit_normal", "min_timestep": 100, "max_timestep": 900, "rescale_zero_snr": True,
    }  # fmt: skip
    for name, value in options.items():
        if name not in (
            "rescale_zero_snr",
            "min_timestep",
            "max_timestep",
        ):  # the base has zero SNR already; three timesteps may be in range anyway
            changed = load_file(train(configure(**base, output_dir=str(tmp_path / name), **{name: value})).adapter_path)
            assert any(not torch.equal(plain[key], changed[key]) for key in plain), name
    run = {**base, **options, "output_dir": str(tmp_path / "all")}
    whole = train(configure(**run)).adapter_path
    expected = load_file(whole)
    train(configure(**run, resume_from_checkpoint=str(whole.parent / "checkpoints/step-2")))
    assert all(torch.equal(value, expected[key]) for key, value in load_file(whole).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_timestep": 500, "max_timestep": 400}, "must be below max_timestep=400"),
        ({"max_timestep": 1001}, "beyond the 1000 timesteps"),
        ({"loss_weighting": "debiased", "snr_gamma": 5.0}, "--snr_gamma is only for"),
        ({"prior_preservation": "frozen"}, "needs --with_prior_preservation"),
        ({"rescale_zero_snr": True}, "needs a base with v-prediction"),
        ({"text_encoder_frac": 0.5}, "needs --train_text_encoder"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=message):
        train(configure(**settings))
