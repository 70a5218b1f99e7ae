"""The samplers that a request may choose."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import UserError, quoted

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names as A1111's API writes them, with the class of diffusers."""


def check_sampler(name: str | None) -> None:
    """Raises :class:`UserError` for an unknown sampler."""
    if name is not None and name not in SAMPLERS:
        raise UserError(f"the sampler {quoted(name)} is unknown: choose one of {', '.join(SAMPLERS)}")


def scheduler(base: Any, name: str | None) -> Any:
    """A scheduler of its own for a picture. ``base``: the scheduler of the pipeline, whose noise it has.

    Raises :class:`UserError` for a sampler that the base cannot use.
    """
    check_sampler(name)
    if name is None:
        return copy.deepcopy(base)
    if "flow" in type(base).__name__.lower():
        raise UserError(f"the sampler {name} is not for this base, a flow model: leave it out")
    import diffusers

    return getattr(diffusers, SAMPLERS[name]).from_config(base.config)
