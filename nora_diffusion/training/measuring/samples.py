"""Images that the trainer generates: class images for prior preservation, and samples during the run."""

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

from ...data.folder import enumerated
from ...generation.image_settings import ImageSettings, save_image
from ...generation.sampling import describe_image, sample_images
from ...generation.settings import MAX_SEED, Sampling
from ...io.files import locked_folder
from ...io.run_layout import image_name
from ...pipelines.components import denoiser
from ...pipelines.precision import MIXED_DTYPES, lowered
from ..data.class_images import read_class_images
from ..data.subject import class_folder
from ..settings.resolved import ResolvedConfig
from ..step.denoiser import networks
from ..step.seeds import derive

log = logging.getLogger(__name__)


def fill_class_images(pipe: Any, config: ResolvedConfig, prompt: str, check: Callable[[], None]) -> int:
    """Generate the missing class images in batches; return how many were generated.

    Each image has its own seed and is written atomically, so that an interrupted run continues where it stopped. Waits
    while another training fills the same folder. ``check`` is called before each batch and may raise.
    """
    folder = class_folder(config)
    with locked_folder(folder):
        missing = config.num_class_images - len(read_class_images(config).images)
        if missing > 0:
            _generate_class_images(pipe, folder, config, prompt, missing, check)
        return max(missing, 0)


def _generate_class_images(
    pipe: Any, folder: Path, config: ResolvedConfig, prompt: str, missing: int, check: Callable[[], None]
) -> None:
    names = [f"class-{number:05d}.png" for number in range(config.num_class_images + missing)]
    missing_names = [name for name in names if not (folder / name).exists()][:missing]
    deleted = [name for name in missing_names if any((folder / later).exists() for later in names[names.index(name) :])]
    if deleted:
        log.warning(
            "%s: the seed of a class image depends on its name and on --seed, so deleted ones come back the same (%s): "
            "to replace one, put another image in its place", folder, enumerated(deleted),
        )  # fmt: skip
    autocast = MIXED_DTYPES[config.prior_generation_precision or _fast_precision(pipe)]
    for start in tqdm(range(0, missing, config.sample_batch_size), desc="class images", mininterval=1.0):
        check()
        batch = missing_names[start : start + config.sample_batch_size]
        seeds = [derive(config.seed, "class", name) for name in batch]
        images = generate_images(pipe, prompt, seeds, config, autocast)
        for name, seed, image in zip(batch, seeds, images, strict=True):
            save_image(image, folder / name, sample_settings(pipe, prompt, seed, image, config))


def _fast_precision(pipe: Any) -> str:
    return "fp16" if denoiser(pipe).device.type == "cuda" else "no"


def generate_images(
    pipe: Any, prompt: str, seeds: Sequence[int], config: ResolvedConfig, autocast: torch.dtype
) -> list[Image.Image]:
    """Generate one image of ``prompt`` per seed, with the settings of ``config``: see :func:`sample`."""
    return sample(pipe, [prompt] * len(seeds), seeds, _sampling(config), autocast)


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, autocast: torch.dtype
) -> list[Image.Image]:
    """Generate an image per prompt with the pipeline and its active adapters; train or eval mode is restored after."""
    context = lowered(autocast, denoiser(pipe).device)
    with evaluating(pipe), torch.no_grad(), _decoding_precisely(pipe.vae), context:
        return sample_images(pipe, prompts, seeds, sampling)


@contextlib.contextmanager
def _decoding_precisely(vae: Any) -> Iterator[None]:
    """Run ``vae.decode`` in the dtype of its weights: SDXL's VAE overflows in fp16, which gives black images."""
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
def evaluating(pipe: Any) -> Iterator[None]:
    modules = [*networks(pipe), pipe.vae]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def save_samples(
    pipe: Any, folder: Path, step: int, prompt: str, config: ResolvedConfig, autocast: torch.dtype
) -> list[Path]:
    """Save images of ``prompt``, each with its :func:`sample_seed`. A failure is logged as a warning."""
    paths: list[Path] = []
    try:
        for number in range(config.num_validation_images):
            seed = sample_seed(config, number)
            image = generate_images(pipe, prompt, [seed], config, autocast)[0]
            settings = sample_settings(pipe, prompt, seed, image, config, step)
            paths.append(save_image(image, folder / image_name(step, number), settings))
    except Exception as error:  # failed samples must not end the training
        log.warning("no samples at step %d: %s", step, error)
    return paths


def sample_seed(config: ResolvedConfig, number: int) -> int:
    """The seed of a sample: ``seed``, ``seed + 1`` ..., from 0 again after the largest."""
    return (config.seed + number) % (MAX_SEED + 1)


def sample_settings(
    pipe: Any, prompt: str, seed: int, image: Image.Image, config: ResolvedConfig, step: int | None = None
) -> ImageSettings:
    """The settings to save with an image. ``step``: the adapter's step; ``None`` for an image of the base."""
    adapter = {"name": config.folder.name, "weight": 1.0, "sha256": "", "path": str(config.folder), "step": step}
    return describe_image(pipe, image, prompt, seed, _sampling(config), [] if step is None else [adapter])


def _sampling(config: ResolvedConfig) -> Sampling:
    return Sampling(config.sample_steps, config.sample_guidance, width=config.resolution, height=config.resolution)
