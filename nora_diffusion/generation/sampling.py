"""The pipeline call that makes images of sampling settings."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import UserError
from ..loaders.tokens import expanded
from ..pipelines.base import base_id
from ..pipelines.components import components, denoiser, tokenizer_name
from ..pipelines.names import DENOISERS
from ..pipelines.precision import dtype_name, keeping_dtype
from ..pipelines.sizes import native_side, side_multiple
from ..versions import versions
from .derived import image_pipeline
from .image_settings import ImageSettings
from .samplers import title_of, using_sampler
from .settings import Sampling, steps_of
from .start_image import StartImage
from .wrapping import noise_in_fp32, predictions

USUAL_STEPS = 20

OnStep = Callable[[int, Any], None]


def check_steps(scheduler: Any, steps: int) -> None:
    """Raises :class:`UserError` if the scheduler cannot sample in this many steps, which its config does not state."""
    kind: Any = type(scheduler)
    config = scheduler.to_json_string()
    if _samples(kind, config, steps) or not _samples(kind, config, USUAL_STEPS):  # else the trial itself fails
        return
    near = (n for distance in range(1, 5) for n in (steps - distance, steps + distance) if n > 0)
    possible = next((n for n in near if _samples(kind, config, n)), USUAL_STEPS)
    raise UserError(f"steps={steps} is not possible with {kind.__name__}, the base's scheduler: choose {possible}")


@functools.lru_cache
def _samples(kind: Any, config: str, steps: int) -> bool:
    """Whether a scheduler makes ``steps`` steps, tried on a single number."""
    import torch

    scheduler, latents = kind.from_config(json.loads(config)), torch.zeros(1, 1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        try:
            scheduler.set_timesteps(steps)
            for timestep in scheduler.timesteps:
                latents = scheduler.step(torch.zeros_like(latents), timestep, latents, return_dict=False)[0]
        except Exception:  # schedulers fail in many ways
            return False
    return True


def check_lengths(pipe: Any, prompts: Sequence[str]) -> None:
    """Raises :class:`UserError` for a prompt whose end no text encoder would read.

    A pipeline would cut it off silently, and the settings in the file would claim all of it. To be called when the
    adapters are loaded, since their tokens may have several vectors.
    """
    encoders = [name for name in components(pipe) if name not in DENOISERS]
    for prompt in dict.fromkeys(prompts):
        found = [_unread(pipe, getattr(pipe, tokenizer_name(name)), prompt) for name in encoders]
        unread = [each for each in found if each is not None]
        if unread and len(unread) == len(found):
            limit, rest = max(unread)  # of the encoder that reads most
            raise UserError(
                f"a prompt is longer than the {limit} tokens that this base reads: shorten it, or its end "
                f"'{rest if len(rest) <= 80 else rest[:80] + '…'}' would have no effect"
            )


def _unread(pipe: Any, tokenizer: Any, prompt: str) -> tuple[int, str] | None:
    """The number of tokens that an encoder reads, and the rest of the prompt; ``None`` if it reads all of it."""
    (text,) = expanded(pipe, [prompt], tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    longest = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    limits = [tokenizer.model_max_length, *([longest.default] if longest and longest.default else [])]
    limit = min(limits) - tokenizer.num_special_tokens_to_add()
    return (limit, tokenizer.decode(tokens[limit:])) if len(tokens) > limit else None


def sample_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: OnStep | None = None,
    check: Callable[[], None] | None = None,
    start: StartImage | None = None,
) -> list[Any]:
    """Make one image per prompt. Raises :class:`UserError` as :func:`check_steps`, :func:`.samplers.scheduler`
    and :func:`.derived.image_pipeline`.

    Each image has its own generator, so its noise does not depend on the batch. ``on_step(step, latents)`` is called
    after each step, counted from 1, with the step's prediction of the clean latents if the scheduler returns it, else
    with the noisy latents. ``check()`` is called many times within a step. An exception raised in either ends the call.
    ``start``: the image that all of them start from, in place of noise.
    """
    with using_sampler(pipe, sampling.sampler), keeping_dtype(pipe.vae), _checking(pipe, check):
        check_steps(pipe.scheduler, sampling.steps)
        # diffusers upcasts a VAE that overflows in fp16, and leaves it in fp32 if memory runs out while decoding.
        sampler = _Sampler(list(prompts), list(seeds), sampling, on_step)
        if start is None:
            images = sampler.run(pipe, width=sampling.width, height=sampling.height)
        else:
            frame = start.frame(native_side(pipe), side_multiple(pipe), sampling.width, sampling.height)
            masks = {} if frame.mask is None else {"mask_image": [frame.mask] * len(prompts)}
            made = sampler.run_from(pipe, [frame.image] * len(prompts), start.strength, **masks)
            images = [frame.finished(image) for image in made]
        if sampling.hires_scale > 1:
            multiple = side_multiple(pipe)
            size = [max(1, round(side * sampling.hires_scale / multiple)) * multiple for side in images[0].size]
            larger = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
            images = sampler.run_from(pipe, larger, sampling.hires_strength)
    return images


def steps_in_all(sampling: Sampling, start: StartImage | None = None) -> int:
    """The number of steps that :func:`sample_images` makes."""
    first = sampling.steps if start is None else steps_of(sampling.steps, start.strength)
    return first + (steps_of(sampling.steps, sampling.hires_strength) if sampling.hires_scale > 1 else 0)


@dataclass
class _Sampler:
    """Calls pipelines, which all have the same prompts, and counts their steps."""

    prompts: list[str]
    seeds: list[int]
    sampling: Sampling
    on_step: OnStep | None
    made: int = 0

    def run_from(self, pipe: Any, images: list[Any], strength: float, **masks: Any) -> list[Any]:
        """Call the pipeline that starts from images, all of one size."""
        width, height = images[0].size
        derived = image_pipeline(pipe, inpaint=bool(masks))
        return self.run(derived, image=images, strength=strength, width=width, height=height, **masks)

    def run(self, pipe: Any, **arguments: Any) -> list[Any]:
        """Call the pipeline once; arguments that it does not have are left out, as are those without a value."""
        import torch

        on_step, before = self.on_step, self.made
        recorded: AbstractContextManager[list[Any]] = predictions(pipe.scheduler) if on_step else nullcontext([])
        possible = inspect.signature(pipe.__call__).parameters
        with noise_in_fp32(pipe), recorded as predicted:

            def callback(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
                self.made = before + step + 1
                if on_step is not None:
                    on_step(self.made, predicted.pop() if predicted else values["latents"])
                return values

            # Left out if there is none: the default of some pipelines is "" and not None.
            negative = self.sampling.negative_prompt
            images: list[Any] = pipe(
                self.prompts, num_inference_steps=self.sampling.steps, guidance_scale=self.sampling.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in self.seeds],
                callback_on_step_end=callback if on_step else None,
                **({"negative_prompt": [negative] * len(self.prompts)} if negative else {}),
                **{name: value for name, value in arguments.items() if name in possible and value is not None},
            ).images  # fmt: skip
        return images


@contextmanager
def _checking(pipe: Any, check: Callable[[], None] | None) -> Iterator[None]:
    """Call ``check`` before each module of the pipeline runs."""
    models = [*components(pipe).values(), pipe.vae] if check else []
    hooks = [
        module.register_forward_pre_hook(lambda *_: check() if check else None)
        for model in models
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def describe_image(
    pipe: Any,
    image: Any,
    prompt: str,
    seed: int,
    sampling: Sampling,
    adapters: list[dict[str, Any]],
    start: StartImage | None = None,
) -> ImageSettings:
    """The settings to write into an image's file."""
    scale = sampling.hires_scale
    width, height = (round(side / scale) for side in image.size)
    if start and start.padding is not None:  # the image keeps its own size
        width = height = native_side(pipe)
    return ImageSettings(
        prompt=prompt, seed=seed, steps=sampling.steps, guidance=sampling.guidance, width=sampling.width or width,
        height=sampling.height or height, negative_prompt=sampling.negative_prompt,
        sampler=title_of(pipe.scheduler, sampling.sampler), base=base_id(pipe), adapters=adapters, versions=versions(),
        dtype=dtype_name(denoiser(pipe).dtype), start=start.settings() if start else {},
        hires={"scale": scale, "strength": sampling.hires_strength} if scale > 1 else {},
    )  # fmt: skip
