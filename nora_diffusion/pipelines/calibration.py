"""Activation statistics: mean ``|x|`` per input channel of each projection, on generic prompts or on a subject."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.tuner.merging import bit_sum
from ..errors import UserError, quoted
from ..io import tensor_cache
from ..io.tensors import tensor_hash
from .components import Modules, canonical, components, projections, tokenizers, without_adapters

GENERIC_PROMPTS = (
    "a dog in the grass",
    "a red car on the road",
    "a cup on a wooden table",
    "a bird in the sky",
    "a house in the snow",
    "a flower on a blue background",
    "a portrait of a person at night",
    "a boat on the sea at sunset",
)
"""Generic prompts: a basis that is calibrated on them can be shared by all subjects."""
VERSION = 1
STEPS = 4
GUIDANCE = 5.0
BATCH_SIZE = 2
"""Prompts per batch: limits memory, does not change results."""

Strengths = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Calibration:
    """Inputs of the calibration run: prompts and, optionally, images of a subject.

    ``latents [n, c, h, w]``: scaled latents of one image per prompt; by default the base generates its own. A basis
    that is calibrated on a subject belongs to that subject and cannot be shared.
    """

    prompts: Sequence[str] = GENERIC_PROMPTS
    latents: Tensor | None = None

    def __post_init__(self) -> None:
        prompts = self.prompts if isinstance(self.prompts, list | tuple) else []
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                f"prompts={quoted(self.prompts)} is not a list of prompts: give at least one prompt, in a list"
            )
        if self.latents is not None and len(self.latents) != len(self.prompts):
            raise UserError(f"{len(self.latents)} images but {len(self.prompts)} prompts: give one prompt per image")


class _MeanAbs:
    """Running mean of ``|x|`` per input channel of one layer."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs:
            return
        x = inputs[0].detach().float().abs()
        x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
        rows = x.reshape(-1, x.shape[-1])
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += rows.shape[0]

    def mean(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.count).cpu()


def activation_strengths(pipe: Any, calibration: Calibration | None = None) -> Strengths:
    """``mean |x|`` per input channel ``[d_in]`` of every projection that was called, by component and path.

    Measured during a short seeded sampling run of the base without adapters (4 steps, guidance 5) and cached on disk.
    Raises :class:`UserError` for latents in a pipeline without a UNet.
    """
    calibration = calibration or Calibration()
    if calibration.latents is not None and getattr(pipe, "unet", None) is None:
        raise UserError(f"{type(pipe).__name__} has no UNet and cannot be calibrated on images: use prompts")
    modules = components(pipe)
    name = f"calibration-{_entry_key(pipe, modules, calibration)}"
    stored = tensor_cache.load(name)
    if stored is None:
        measured = _measure(pipe, modules, calibration)
        stored = {f"{component} {path}": mean for component, means in measured.items() for path, mean in means.items()}
        tensor_cache.store(name, stored)
    strengths: Strengths = {component: {} for component in modules}
    for key, mean in stored.items():
        component, path = key.split(" ", 1)
        strengths[component][path] = mean
    return strengths


def _measure(pipe: Any, modules: Modules, calibration: Calibration) -> Strengths:
    meters: dict[str, dict[str, _MeanAbs]] = {component: {} for component in modules}
    with ExitStack() as stack:
        for component, module in modules.items():
            for path, layer in projections(module).items():
                meter = meters[component][path] = _MeanAbs()
                stack.callback(layer.register_forward_pre_hook(meter).remove)
        stack.enter_context(without_adapters(modules))
        short_run(pipe, calibration)
    return {
        component: {path: meter.mean() for path, meter in group.items() if meter.count}
        for component, group in meters.items()
    }


def short_run(pipe: Any, calibration: Calibration) -> None:
    """Run the pipeline for a few seeded steps on the calibration inputs; callers measure through hooks."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            for start in range(0, len(calibration.prompts), BATCH_SIZE):
                rows = slice(start, start + BATCH_SIZE)
                prompts = list(calibration.prompts[rows])
                images = {} if calibration.latents is None else _noised_inputs(pipe, calibration.latents[rows])
                pipe(
                    prompt=prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
                    generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts))], **images,
                )  # fmt: skip
    finally:
        pipe.set_progress_bar_config(**bar)


def _noised_inputs(pipe: Any, latents: Tensor) -> dict[str, Any]:
    """Call arguments that replace the latents by noised ``latents``, from the second step on."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def replace(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        old, next_timestep = values["latents"], pipe.scheduler.timesteps[step + 1 : step + 2]
        if not len(next_timestep):
            return {}
        clean = latents.to(old.device, torch.float32)
        noised: Tensor = pipe.scheduler.add_noise(clean, noise.to(old.device), next_timestep.expand(len(clean)))
        return {"latents": noised.to(old.dtype)}

    return {"callback_on_step_end": replace, "height": _pixels(pipe, latents, 2), "width": _pixels(pipe, latents, 3)}


def _pixels(pipe: Any, latents: Tensor, side: int) -> int:
    return int(latents.shape[side] * pipe.vae_scale_factor)


def _entry_key(pipe: Any, modules: Modules, calibration: Calibration) -> str:
    """SHA-256 of everything the result depends on; weights are represented by a sum over their bits, which is fast."""
    inputs = {
        "version": VERSION,
        "pipeline": type(pipe).__name__,
        "scheduler": dict(pipe.scheduler.config),
        "tokens": [tokenizer(list(calibration.prompts), truncation=True).input_ids for tokenizer in tokenizers(pipe)],
        "prompts": list(calibration.prompts),
        "latents": None if calibration.latents is None else tensor_hash(calibration.latents),
        "components": {component: _description(module) for component, module in modules.items()},
        "run": [STEPS, GUIDANCE],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _description(module: Any) -> list[Any]:
    settings = module.config if isinstance(module.config, dict) else module.config.to_dict()
    weights = {
        canonical(name): [str(value.dtype), list(value.shape), bit_sum(value)]
        for name, value in module.named_parameters()
        if not any(part.startswith(("nora_", "lora_")) for part in name.split("."))
    }
    return [{key: value for key, value in dict(settings).items() if not key.startswith("_")}, weights]
