"""A run that is ready for its first step, to be stepped by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from runs import Configure

from nora_diffusion.training.run.launch import build_accelerator
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.train import prepared, run_folder, set_up
from nora_diffusion.training.signals import StopRequests
from nora_diffusion.training.step.randomness import forked

Ready = Callable[..., Stepper]


@pytest.fixture
def ready(configure: Configure) -> Iterator[Ready]:
    """``ready(key=value)``: the stepper of a run with these settings."""
    with ExitStack() as stack:

        def build(**changes: object) -> Stepper:
            subject, config = prepared(configure(**changes))
            accelerator = build_accelerator(config)
            folder = stack.enter_context(run_folder(config, accelerator))
            stop = stack.enter_context(StopRequests())
            stack.enter_context(forked(accelerator.device))
            return Stepper(set_up(config, subject, accelerator, folder, stop), accelerator, folder, stop, False)

        yield build
