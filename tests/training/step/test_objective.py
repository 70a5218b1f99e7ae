"""The objective against formulas written out densely, and random numbers derived from (seed, step)."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from nora_diffusion.errors import UserError
from nora_diffusion.training.step.noise import draw_timesteps
from nora_diffusion.training.step.objective import Objective
from nora_diffusion.training.step.randomness import generator, shuffled_indices
from nora_diffusion.training.step.seeds import derive

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(kind: str, zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip


def alphas_by_hand() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_dense_formula(kind: str, gamma: float) -> None:
    objective = Objective.of(scheduler(kind), gamma)
    source = torch.Generator().manual_seed(0)
    x, e, guess = (torch.randn(4, 4, 3, 3, generator=source) for _ in range(3))
    t = torch.tensor([0, 10, 500, 999])
    expected = []
    for row in range(4):
        a = float(alphas_by_hand()[t[row]])
        target = {"epsilon": e[row], "v_prediction": a**0.5 * e[row] - (1 - a) ** 0.5 * x[row], "sample": x[row]}[kind]
        snr = a / (1 - a)
        weight = {"epsilon": min(snr, gamma) / snr, "v_prediction": min(snr, gamma) / (snr + 1)}.get(
            kind, min(snr, gamma)
        )
        expected.append(((guess[row] - target) ** 2).mean() * (weight if gamma else 1))
    assert torch.allclose(objective.losses(guess, objective.target(x, e, t), t), torch.stack(expected), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_added_noise_equals_diffusers(kind: str) -> None:
    x, e, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    reference = DDPMScheduler.from_config(scheduler(kind, True).config)
    objective = Objective.of(scheduler(kind, True))
    assert torch.allclose(objective.add_noise(x, e, t), reference.add_noise(x, e, t), atol=1e-6)
    if kind == "v_prediction":
        assert torch.allclose(objective.target(x, e, t), reference.get_velocity(x, e, t), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_terminal_snr_gives_finite_weights(kind: str) -> None:
    objective = Objective.of(scheduler(kind, zero_snr=True), 5.0)
    weights = objective.weights(torch.arange(1000))
    assert objective.signal[-1] < 1e-3
    assert torch.isfinite(weights).all() and (weights >= 0).all()


def test_an_unknown_prediction_type_is_refused() -> None:
    unknown = scheduler("epsilon")
    unknown.register_to_config(prediction_type="guess")
    with pytest.raises(UserError, match="prediction_type='guess'"):
        Objective.of(unknown)


def test_a_learned_variance_is_dropped() -> None:
    objective = Objective.of(scheduler("epsilon"))
    x, e, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([1, 2])
    both = torch.cat([e, torch.randn(2, 4, 2, 2)], dim=1)
    assert objective.losses(both, objective.target(x, e, t), t).abs().max() == 0


def test_indices_are_whole_epochs_and_depend_on_the_start() -> None:
    rows = shuffled_indices(3, "photos", 5, 0, 20)
    assert [sorted(rows[i : i + 5]) for i in (0, 5, 10, 15)] == [list(range(5))] * 4
    assert rows[7:14] == shuffled_indices(3, "photos", 5, 7, 7)
    assert rows != shuffled_indices(4, "photos", 5, 0, 20)


def test_timesteps_and_seeds() -> None:
    drawn = draw_timesteps(8, range(1000), "stratified", generator(1, "t"))
    assert sorted(int(t) // 125 for t in drawn) == list(range(8))
    assert torch.equal(drawn, draw_timesteps(8, range(1000), "stratified", generator(1, "t")))
    assert draw_timesteps(500, range(10), "uniform", generator(1)).unique().numel() == 10
    assert len({derive(seed, "a", step) for seed in range(5) for step in range(5)}) == 25
