"""Every number of steps is either sampled or refused in words, whatever the scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from nora_diffusion import UserError
from nora_diffusion.generation.sampling import check_steps, sample_images
from nora_diffusion.generation.settings import Sampling

KINDS = ("PNDM", "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep",
         "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "KDPM2Discrete", "LCM", "TCD", "DDIMInverse",
         "FlowMatchEulerDiscrete")  # fmt: skip


def scheduler_of(kind: str, **changes: Any) -> Any:
    cls = getattr(diffusers, f"{kind}Scheduler")
    known = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in changes.items() if name in known})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1])
def test_a_number_of_steps_is_refused_exactly_if_the_scheduler_fails(kind: str, offset: int) -> None:
    scheduler = scheduler_of(kind, steps_offset=offset, timestep_spacing="leading", num_train_timesteps=100)
    for steps in (1, 2, 3, 49, 50, 51, 99, 100, 101):
        latents, failed = torch.zeros(1, 4, 2, 2), False
        try:
            scheduler.set_timesteps(steps)
            for timestep in scheduler.timesteps:
                latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
        except Exception:
            failed = True
        if failed:
            with pytest.raises(UserError, match=rf"steps={steps} is not possible with {kind}Scheduler.*choose \d+$"):
                check_steps(scheduler, steps)
        else:
            check_steps(scheduler, steps)


def test_pndm_with_all_its_timesteps(pipe: Any) -> None:
    pipe.scheduler = PNDMScheduler(num_train_timesteps=1000, steps_offset=1, skip_prk_steps=True)
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match=r"steps=1000 is not possible with PNDMScheduler.*choose 999"):
        sample_images(pipe, ["a dog"], [0], Sampling(1000, 2.0, width=16, height=16))
    check_steps(pipe.scheduler, 999)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_scheduler_that_the_trial_does_not_fit_is_not_refused() -> None:
    class NeedsMore(DDIMScheduler):
        def set_timesteps(self, *args: Any, mu: float, **kwargs: Any) -> None:
            """As flow matching with dynamic shifting."""

    check_steps(NeedsMore(), 1000)
