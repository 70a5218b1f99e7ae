"""Pictures that the trainer makes itself: the class images of prior preservation, and samples on the way."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ...data import find_images
from ...errors import UserError
from ...generation.image_settings import ImageSettings, save_image
from ...generation.sampling import Sampling, describe_image, sample_images
from ...io.files import locked_folder
from ...io.run_layout import image_name
from ...pipelines.base import default_steps
from ...pipelines.precision import MIXED_DTYPES
from ..settings.checks import folder_of
from ..settings.config import TrainConfig
from ..step.denoiser import denoiser, networks
from ..step.randomness import derive

log = logging.getLogger(__name__)


def count_images(folder: Path) -> int:
    """How many pictures a folder holds; 0 where there is none."""
    try:
        return len(find_images(folder))
    except UserError:
        return 0


def class_folder(config: TrainConfig) -> Path:
    """Where the class pictures of prior preservation are."""
    return folder_of(config.class_data_dir) if config.class_data_dir else config.folder / "class_images"


def fill_class_images(pipe: Any, folder: Path, config: TrainConfig, seed: int, check: Callable[[], None]) -> int:
    """Generate the missing class pictures, in batches; returns how many were made.

    Each is written whole and has a seed of its own, so that an interrupted filling goes on where it stopped. Another
    training that fills the same folder is waited for.
    """
    with locked_folder(folder):
        missing = config.num_class_images - count_images(folder)
        if missing > 0:
            _draw_class_images(pipe, folder, config, seed, missing, check)
        return max(missing, 0)


def _draw_class_images(
    pipe: Any, folder: Path, config: TrainConfig, seed: int, missing: int, check: Callable[[], None]
) -> None:
    names = [f"class-{number:05d}.png" for number in range(config.num_class_images + missing)]
    wanted = [name for name in names if not (folder / name).exists()][:missing]
    autocast = MIXED_DTYPES[config.prior_generation_precision or _fast_precision(pipe)]
    for start in tqdm(range(0, missing, config.sample_batch_size), desc="class images", mininterval=1.0):
        check()
        batch = wanted[start : start + config.sample_batch_size]
        seeds = [derive(seed, "class", name) for name in batch]
        images = render(pipe, config.class_prompt or "", seeds, config, autocast)
        for name, picture_seed, image in zip(batch, seeds, images, strict=True):
            settings = describe(pipe, config.class_prompt or "", picture_seed, image, config)
            save_image(image, folder / name, settings)


def _fast_precision(pipe: Any) -> str:
    return "fp16" if denoiser(pipe).device.type == "cuda" else "no"


def render(
    pipe: Any, prompt: str, seeds: Sequence[int], config: TrainConfig, autocast: torch.dtype
) -> list[Image.Image]:
    """Pictures by the pipeline as it stands, adapters included; the modules keep their modes."""
    device, lower = denoiser(pipe).device.type, autocast != torch.float32
    lowered = torch.autocast(device, autocast if lower else None, enabled=lower)
    with _evaluating(pipe), torch.no_grad(), _decoding_precisely(pipe.vae), lowered:
        return sample_images(pipe, [prompt] * len(seeds), seeds, _sampling(config))


@contextlib.contextmanager
def _decoding_precisely(vae: Any) -> Iterator[None]:
    """Keep ``vae.decode`` in its weights' precision: in fp16 SDXL's overflows, and its pictures are black."""
    decode = vae.decode

    @functools.wraps(decode)
    def decode_precisely(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = decode_precisely
    try:
        yield
    finally:
        del vae.decode


@contextlib.contextmanager
def _evaluating(pipe: Any) -> Iterator[None]:
    modules = [*networks(pipe), pipe.vae]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def save_samples(pipe: Any, folder: Path, step: int, config: TrainConfig, autocast: torch.dtype) -> list[Path]:
    """Pictures of ``validation_prompt`` with the seeds ``seed, seed + 1 ...``. A failure is only a warning."""
    paths: list[Path] = []
    prompt = config.validation_prompt or ""
    try:
        for number in range(config.num_validation_images):
            seed = (config.seed or 0) + number
            image = render(pipe, prompt, [seed], config, autocast)[0]
            settings = describe(pipe, prompt, seed, image, config, step)
            paths.append(save_image(image, folder / image_name(step, number), settings))
    except Exception as error:  # whatever a sampler stumbles over
        log.warning("no sample pictures at step %d: %s", step, error)
    return paths


def describe(
    pipe: Any, prompt: str, seed: int, image: Image.Image, config: TrainConfig, step: int | None = None
) -> ImageSettings:
    """The settings that a picture carries. ``step``: that of the adapter in it, which has no file of its own yet."""
    learned = {"name": config.folder.name, "weight": 1.0, "sha256": "", "path": str(config.folder), "step": step}
    return describe_image(pipe, image, prompt, seed, _sampling(config), [] if step is None else [learned])


def _sampling(config: TrainConfig) -> Sampling:
    steps = config.sample_steps or default_steps(config.pretrained_model_name_or_path)
    side = config.resolution
    return Sampling(steps, config.sample_guidance or 0.0, width=side, height=side)
