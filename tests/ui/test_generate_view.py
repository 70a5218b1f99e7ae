"""The line of a run."""

from __future__ import annotations

import time

import pytest

from nora_diffusion.ui.runs import Progress
from nora_diffusion.ui.tabs import generate_view
from nora_diffusion.ui.tabs.generate_view import status


@pytest.mark.parametrize(
    ("spent", "image", "step", "images", "left"),
    [
        (1.0, 1, 5, 2, ""),  # too early
        (10.0, 1, 0, 2, ""),  # nothing is done
        (10.0, 1, 5, 2, ", about 30 s left"),
        (10.0, 2, 0, 2, ", about 10 s left"),
        (10.0, 2, 10, 2, ""),
        (600.0, 1, 10, 4, ", about 30 minutes left"),
    ],
)
def test_the_time_that_is_left(
    spent: float, image: int, step: int, images: int, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(generate_view.time, "monotonic", lambda: now)
    progress = Progress("working", image=image, images=images, step=step, steps=10, begun=now - spent)
    assert f"step {step} of 10{left}<" in status(progress)
