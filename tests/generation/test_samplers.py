"""Samplers: diffusers' own schedulers with the base's noise, only for the time of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from architectures import tiny_pipeline

from nora_diffusion import Sampling, UserError
from nora_diffusion.cli import main
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.samplers import SAMPLERS, sampler_named, scheduler, title_of, using_sampler
from nora_diffusion.generation.sampling import describe_image, sample_images


def sampling(name: str | None, steps: int = 4) -> Sampling:
    return Sampling(steps, 3.0, width=16, height=16, sampler=name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_is_the_scheduler_of_diffusers(name: str, pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    base, own = pipe.scheduler, SAMPLERS[name]
    (image,) = sample_images(pipe, ["a dog"], [1], sampling(name))
    assert pipe.scheduler is base
    (plain,) = sample_images(pipe, ["a dog"], [1], sampling(None))
    pipe.scheduler = getattr(diffusers, own.kind).from_config(base.config, **own.options)
    (expected,) = sample_images(pipe, ["a dog"], [1], sampling(None))
    assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).max() <= 1
    assert own.kind == type(base).__name__ or np.any(np.asarray(image) != np.asarray(plain))
    pipe.scheduler = base
    assert describe_image(pipe, image, "a dog", 1, sampling(name), []).sampler == own.title
    assert sampler_named(own.title.upper()) == sampler_named(name) == name


def test_options_of_the_base_do_not_stay(pipe: Any) -> None:
    base = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert not scheduler(base, "dpmpp_2m").config.use_karras_sigmas
    assert scheduler(base, "dpmpp_2m_karras").config.use_karras_sigmas
    assert scheduler(base, None).config.use_karras_sigmas and scheduler(base, None) is not base


def test_the_base_has_its_own_again_after_an_error(pipe: Any) -> None:
    base = pipe.scheduler
    with pytest.raises(KeyError), using_sampler(pipe, "euler"):
        assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
        raise KeyError
    assert pipe.scheduler is base


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_models_have_only_their_own(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path)
    with pytest.raises(UserError, match="a flow model"):
        sample_images(pipe, ["a dog"], [0], sampling("euler"))
    assert title_of(pipe.scheduler, None) == "FlowMatchEulerDiscreteScheduler"
    assert torch.is_tensor(pipe.scheduler.sigmas)


def test_the_command_line(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--base", str(tiny_base), "--prompt", "a dog", "--width", "16", "--height", "16"]
    words += ["--steps", "3", "--out", str(tmp_path)]
    assert main([*words, "--sampler", "dpmpp_2m_karras"]) == 0
    assert read_settings(next(tmp_path.glob("*.png"))).sampler == "DPM++ 2M Karras"
    assert main([*words, "--sampler", "magic"]) == 2
    assert "the sampler 'magic' is unknown: choose one of ddim, plms" in capsys.readouterr().err
