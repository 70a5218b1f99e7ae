"""The samplers that can take the place of a base's own, by short names and by those of A1111."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, quoted


@dataclass(frozen=True)
class Sampler:
    """A sampler: A1111's name for it, the scheduler class of diffusers, and its options."""

    title: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIM", "DDIMScheduler"),
    "plms": Sampler("PLMS", "PNDMScheduler"),
    "euler": Sampler("Euler", "EulerDiscreteScheduler"),
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": Sampler("Heun", "HeunDiscreteScheduler"),
    "dpm2": Sampler("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2_a": Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": Sampler("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", SDE | KARRAS),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler"),
    "lcm": Sampler("LCM", "LCMScheduler"),
}
"""By the names that the command line and the server take."""


def check_sampler(name: str | None) -> None:
    """Raises :class:`UserError` for an unknown sampler."""
    if name is not None and name not in SAMPLERS:
        raise UserError(f"the sampler {quoted(name)} is unknown: choose one of {', '.join(SAMPLERS)}")


def sampler_named(title: str) -> str | None:
    """The sampler with a short name, or with A1111's name, in any case; ``None`` if there is none."""
    wanted = title.lower()
    return next((name for name, own in SAMPLERS.items() if wanted in (name, own.title.lower())), None)


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

    own = SAMPLERS[name]
    off = dict.fromkeys(KARRAS, False)  # the base's own must not stay
    return getattr(diffusers, own.kind).from_config(base.config, **(off | own.options))


@contextmanager
def using_sampler(pipe: Any, name: str | None) -> Iterator[None]:
    """Give a pipeline another sampler inside the context. Raises as :func:`scheduler`."""
    before = pipe.scheduler
    if name is not None:
        pipe.scheduler = scheduler(before, name)
    try:
        yield
    finally:
        pipe.scheduler = before


def title_of(base: Any, name: str | None) -> str:
    """What an image's file records: A1111's name of a chosen sampler, else the class of the base's scheduler."""
    return type(base).__name__ if name is None else SAMPLERS[name].title
