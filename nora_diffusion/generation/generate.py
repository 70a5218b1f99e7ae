"""Generating pictures with any base and any adapters."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..io.files import user_errors
from ..loaders import LoadedAdapter, list_adapters, load_adapter, set_adapters
from ..loaders.load import located
from ..pipelines.base import base_id, best_device, default_guidance, default_steps, open_pipeline
from ..pipelines.components import denoiser
from ..pipelines.precision import AUTO, check_dtype, dtype_name, keeping_dtype
from ..versions import versions
from .image_settings import ImageSettings, save_image
from .library import Known, adapters_in, given, resolve
from .tags import Tag, parse_tags, parse_weight

OnStep = Callable[[int, Any], None]
MAX_STEPS, MAX_SIDE, MAX_PROMPT = 1000, 4096, 4000


@dataclass
class GenerateConfig:
    """What to generate: ``num`` pictures of each prompt; picture ``i`` has the seed ``seed + i``.

    ``adapters`` act on every prompt, at their weight or at the one that a prompt's ``<lora:name:0.8>`` gives; those in
    the folder ``library`` only on prompts that name them. ``None`` is what suits the base. ``dtype``, ``variant`` and
    ``revision`` are as :func:`open_pipeline` has them.
    """

    prompts: list[str]
    base: str | None = None
    adapters: list[str] = field(default_factory=list)
    library: str | None = None
    negative_prompt: str = ""
    num: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    batch: int = 4
    device: str | None = None
    out: str = "outputs"
    dtype: str = AUTO
    variant: str | None = None
    revision: str | None = None

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting that makes no sense."""
        if not self.prompts or not all(p.strip() for p in self.prompts):
            raise UserError("there is no prompt: give --prompt")
        if max(map(len, self.prompts)) > MAX_PROMPT:
            raise UserError(f"a prompt has more than {MAX_PROMPT} characters: shorten it")
        ranges = {"num": 10_000, "steps": MAX_STEPS, "batch": 256, "seed": 2**63, "guidance": 100}
        for name, high in ranges.items():
            value, low = getattr(self, name), 0 if name in ("seed", "guidance") else 1
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: choose {low} to {high}")
        check_dtype(self.dtype)
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and not (8 <= side <= MAX_SIDE and side % 8 == 0):
                raise UserError(f"{name}={side} will not do: choose a multiple of 8 up to {MAX_SIDE}")


def parse_adapter(text: str) -> tuple[str, float]:
    """Split ``path[:weight]`` at its last colon, where what follows is a number (``C:\\dog`` stays whole)."""
    path, colon, tail = text.rpartition(":")
    if not colon or not path or "/" in tail or "\\" in tail:
        return text, 1.0
    return path, parse_weight(tail, f"--adapter {text!r}")


def generate(config: GenerateConfig) -> list[Path]:
    """Make the pictures and return their files. Nothing is written unless base and adapters load."""
    config.check()
    known = given([parse_adapter(text) for text in config.adapters])
    shelf = known + (adapters_in(config.library) if config.library else [])
    wanted = [_read_prompt(prompt, known, shelf) for prompt in config.prompts]
    out = Path(config.out).expanduser()
    _check_writable(out)
    for adapter in dict.fromkeys(adapter for _, live in wanted for adapter in live):
        inspect_adapter(located(adapter.path))  # refuse before a model is loaded
    pipe = open_pipeline(config.base, config.dtype, config.device or best_device(), config.revision, config.variant)
    loaded = _load_all(pipe, [adapter for _, live in wanted for adapter in live])
    guidance = default_guidance(config.base) if config.guidance is None else config.guidance
    steps = config.steps or default_steps(config.base)
    jobs = [(prompt, config.seed + i, live) for prompt, live in wanted for i in range(config.num)]
    files = []
    for batch, live in _batches(jobs, config.batch):
        _use(pipe, {loaded[adapter].name: tag for adapter, tag in live.items()})
        images = run(
            pipe, [p for p, _ in batch], [s for _, s in batch], steps, guidance,
            config.negative_prompt, config.width, config.height,
        )  # fmt: skip
        described = [_describe(loaded[adapter], tag) for adapter, tag in live.items()]
        for image, (prompt, seed) in zip(images, batch, strict=True):
            settings = image_settings(pipe, image, prompt, seed, steps, guidance, config.negative_prompt, described)
            files.append(save_image(image, free_name(out, seed), settings))
    return files


Live = dict[Known, Tag]
"""The adapters that act on a prompt, and how."""


def _read_prompt(prompt: str, known: list[Known], shelf: list[Known]) -> tuple[str, Live]:
    clean, tags = parse_tags(prompt)
    if not clean.strip():
        raise UserError(f"there is no prompt beside the tags in {prompt!r}")
    live = {adapter: adapter.always for adapter in known if adapter.always is not None}
    named: Live = {}
    for tag in tags:
        adapter = resolve(tag, shelf)
        if adapter in named:
            raise UserError(f"{named[adapter]} and {tag} are one adapter, {adapter.path}: write one tag")
        named[adapter] = tag
    return clean, live | named


def _load_all(pipe: Any, adapters: Sequence[Known]) -> dict[Known, LoadedAdapter]:
    """Each adapter once, under a name of our own: PEFT takes few signs in one, and files may be called anything."""
    return {
        adapter: load_adapter(pipe, adapter.path, f"adapter_{i}", activate=False)
        for i, adapter in enumerate(dict.fromkeys(adapters))
    }


def _use(pipe: Any, tags: dict[str, Tag]) -> None:
    """Make exactly these adapters active, by the names that the pipeline knows them under.

    A textual inversion is not among those: it is a word, and acts where a prompt has it.
    """
    held = list_adapters(pipe)
    parts = {name: [part for part, names in held.items() if name in names] for name in tags}
    live = [name for name in tags if parts[name]]
    set_adapters(pipe, live, [_weights(tags[name], parts[name]) for name in live])


def _weights(tag: Tag, parts: Sequence[str]) -> float | dict[str, float]:
    if tag.unet == tag.te:
        return tag.unet
    return {part: tag.te if part.startswith("text_encoder") else tag.unet for part in parts}


def run(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, negative: str = "",
    width: int | None = None, height: int | None = None, on_step: OnStep | None = None,
) -> list[Any]:  # fmt: skip
    """One call of the pipeline; each picture has a generator of its own, so that batches do not matter.

    ``on_step(step, latents)`` is called after each step, counted from 1; what it raises ends the call at once. It gets
    the clean latents that this step predicts, where the scheduler tells them, else the noisy ones.
    """
    import torch

    # diffusers decodes in fp32 where fp16 overflows, and would leave the VAE so when memory runs out there.
    with keeping_dtype(pipe.vae), _predictions(pipe.scheduler, wanted=on_step is not None) as predicted:

        def callback(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, predicted.pop() if predicted else values["latents"])
            return values

        images: list[Any] = pipe(
            list(prompts), negative_prompt=[negative] * len(prompts) if negative else None, num_inference_steps=steps,
            guidance_scale=guidance, generator=[torch.Generator().manual_seed(seed) for seed in seeds], width=width,
            height=height, callback_on_step_end=callback if on_step else None,
        ).images  # fmt: skip
    return images


@contextmanager
def _predictions(scheduler: Any, wanted: bool) -> Iterator[list[Any]]:
    """A list that holds the last step's ``pred_original_sample``, which pipelines ask the scheduler to leave out."""
    predicted: list[Any] = []
    if not wanted:
        yield predicted
        return
    step = scheduler.step

    def listening(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **{**kwargs, "return_dict": True})
        clean = getattr(result, "pred_original_sample", None)
        predicted[:] = [] if clean is None else [clean]
        return (result.prev_sample,)

    scheduler.step = functools.wraps(step)(listening)  # pipelines look at its signature
    try:
        yield predicted
    finally:
        del scheduler.step


def image_settings(
    pipe: Any, image: Any, prompt: str, seed: int, steps: int, guidance: float, negative: str,
    adapters: list[dict[str, Any]],
) -> ImageSettings:  # fmt: skip
    """What made a picture, as it is written into its file."""
    return ImageSettings(
        prompt=prompt, seed=seed, steps=steps, guidance=guidance, width=image.width, height=image.height,
        negative_prompt=negative, sampler=type(pipe.scheduler).__name__, base=base_id(pipe), adapters=adapters,
        versions=versions(), dtype=dtype_name(denoiser(pipe).dtype),
    )  # fmt: skip


def _check_writable(folder: Path) -> None:
    """Refuse before anything is loaded; the folder is made with the first picture, so that a mistake leaves none."""
    with user_errors(folder):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
    if not writable:
        raise UserError(f"cannot write {folder}: {there} is no folder that you may write to; choose another one")


def _describe(loaded: LoadedAdapter, tag: Tag) -> dict[str, Any]:
    info = loaded.info
    said = {"name": tag.name, "weight": tag.unet, "sha256": info.sha256, "path": info.path, "trigger": info.trigger}
    return said if tag.te == tag.unet else {**said, "te": tag.te}


def _batches(jobs: list[tuple[str, int, Live]], size: int) -> Iterator[tuple[list[tuple[str, int]], Live]]:
    """``(prompt, seed)`` of pictures that are made together, which have the same adapters at the same weights."""
    for _, group in itertools.groupby(jobs, key=lambda job: list(job[2].items())):
        same = list(group)
        for start in range(0, len(same), size):
            yield [(prompt, seed) for prompt, seed, _ in same[start : start + size]], same[0][2]


def free_name(folder: Path, seed: int) -> Path:
    """The next ``NNNN-seed.png``; nothing is ever overwritten."""
    taken = [int(match[1]) for f in folder.glob("*.png") if (match := re.match(r"(\d{4,})-", f.name))]
    return folder / f"{max(taken, default=-1) + 1:04d}-{seed}.png"
