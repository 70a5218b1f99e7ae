"""Pictures that the trainer makes itself: the class images of prior preservation, and samples on the way."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data import find_photos
from ..errors import UserError
from ..files import make_folder, write_atomic
from .config import TrainConfig
from .randomness import generator

log = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def count_pictures(folder: Path) -> int:
    """How many pictures a folder holds; 0 where there is none."""
    try:
        return len(find_photos(folder))
    except UserError:
        return 0


def fill_class_images(
    pipe: Any, folder: Path, config: TrainConfig, resolution: int, seed: int, check: Callable[[], None]
) -> int:
    """Generate the missing class pictures, in batches; returns how many were made.

    Each is written whole and has a seed of its own, so that an interrupted filling goes on where it stopped.
    """
    missing = config.num_class_images - count_pictures(folder)
    if missing <= 0:
        return 0
    make_folder(folder)
    names = [f"class-{number:05d}.png" for number in range(config.num_class_images + missing)]
    wanted = [name for name in names if not (folder / name).exists()][:missing]
    dtype = DTYPES[config.prior_generation_precision] if config.prior_generation_precision else None
    for start in tqdm(range(0, missing, config.sample_batch_size), desc="class images", mininterval=1.0):
        check()
        batch = wanted[start : start + config.sample_batch_size]
        images = render(
            pipe,
            [config.class_prompt or ""] * len(batch),
            [generator(seed, "class", name) for name in batch],
            config,
            resolution,
            dtype,
        )
        for name, image in zip(batch, images, strict=True):
            save_png(image, folder / name)
    return missing


def render(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    config: TrainConfig,
    resolution: int,
    autocast: torch.dtype | None = None,
) -> list[Image.Image]:
    """Pictures by the pipeline as it stands, adapters included; the modules keep their modes."""
    modules = [pipe.unet, pipe.text_encoder, pipe.vae]
    modes = [module.training for module in modules]
    device = pipe.unet.device.type
    lower = autocast in (torch.float16, torch.bfloat16)
    try:
        for module in modules:
            module.eval()
        with torch.no_grad(), torch.autocast(device, autocast if lower else None, enabled=lower):
            images: list[Image.Image] = pipe(
                list(prompts),
                height=resolution,
                width=resolution,
                generator=list(generators),
                num_inference_steps=config.sample_steps,
                guidance_scale=config.sample_guidance,
            ).images
        return images
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a picture whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return write_atomic(path, buffer.getvalue())


def save_samples(
    pipe: Any,
    folder: Path,
    step: int,
    config: TrainConfig,
    resolution: int,
    seed: int,
    autocast: torch.dtype | None,
) -> list[Path]:
    """Pictures of ``validation_prompt`` with the same seeds at every call. A failure is only a warning."""
    paths: list[Path] = []
    try:
        with _random_state_kept():
            for number in range(config.num_validation_images):
                source = generator(seed, "sample", number)
                image = render(pipe, [config.validation_prompt or ""], [source], config, resolution, autocast)[0]
                paths.append(save_png(image, folder / f"step-{step:06d}-{number}.png"))
    except (RuntimeError, OSError, ValueError) as error:
        log.warning("no sample pictures at step %d: %s", step, error)
    return paths


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
