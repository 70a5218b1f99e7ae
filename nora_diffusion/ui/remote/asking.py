"""What all requests of the app to a server have in common."""

from __future__ import annotations

from typing import Any

from ...generation.settings import Sampling
from ...serving.client import Event, Failed, ServerError

LOOK_SECONDS = 0.2
"""How often a run looks whether it was interrupted."""


def body_of(prompt: str, seed: int, sampling: Sampling, **others: Any) -> dict[str, Any]:
    """The fields of ``POST /v1/pictures``, without those that are ``None``. ``prompt``: with its tags."""
    given = {
        "prompt": prompt, "negative_prompt": sampling.negative_prompt, "seed": seed, "steps": sampling.steps,
        "guidance": sampling.guidance, "width": sampling.width, "height": sampling.height,
        "sampler": sampling.sampler, **others,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def refuse_failed(event: Event | None) -> None:
    """Raises :class:`.ServerError` for a picture that failed."""
    if isinstance(event, Failed):
        raise ServerError(f"the server made no image: {event.message}", event.status)
