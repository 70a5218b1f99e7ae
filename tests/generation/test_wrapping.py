"""A call wraps methods of the pipeline and its scheduler, and puts back what was there."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling

SMALL = Sampling(2, 2.0, width=16, height=16)


class Draws(TorchFunctionMode):
    """Records the dtypes in which ``torch.randn`` is called at last."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            self.dtypes.append((kwargs or {}).get("dtype"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["DDIM", "EulerAncestralDiscrete"])
def test_noise_is_drawn_in_fp32(pipe: Any, kind: str) -> None:
    """In half precision torch draws other numbers than in fp32, depending on its release and the size."""
    pipe.to(torch.bfloat16)
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")(steps_offset=1)
    with Draws() as recorded:
        sample_images(pipe, ["a dog"], [0], SMALL)
    assert set(recorded.dtypes) == {torch.float32}


def test_methods_are_put_back(pipe: Any) -> None:
    sample_images(pipe, ["a dog"], [0], SMALL, on_step=lambda step, latents: None)
    assert "step" not in vars(pipe.scheduler) and "prepare_latents" not in vars(pipe)
    pipe.scheduler.step = own = pipe.scheduler.step
    with pytest.raises(KeyboardInterrupt):
        sample_images(pipe, ["a dog"], [0], SMALL, on_step=_interrupt)
    assert vars(pipe.scheduler)["step"] is own


def _interrupt(step: int, latents: Any) -> None:
    raise KeyboardInterrupt
