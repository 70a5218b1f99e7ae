"""From training states to the released folders: a diffusers pipeline and the judge, in fp16 safetensors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import UserError
from ..world.render import sample
from .configs import Size
from .loop import state_path
from .stage_clip import build_judge
from .stage_diffusion import TRAINING_FILE, build_diffusion, build_scheduler
from .stage_vae import build_vae, read_vae, to_tensor
from .tokenizer import build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def ema_weights(run: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights in a training state of a run. Raises :class:`UserError` if the state is missing."""
    path = state_path(run, name)
    if not path.exists():
        raise UserError(f"{path} is missing: train that stage first")
    return {k[4:]: v for k, v in load_file(path).items() if k.startswith("ema.")}


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``target``, then rename it to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(fresh)
        fresh.chmod(0o755)
        old = target.with_name(f".{target.name}-old")
        if target.exists():
            target.replace(old)
        fresh.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold ``(z - mean) / std`` of each latent channel into the 1x1 convolutions around the latent.

    A Stable Diffusion pipeline has only one ``scaling_factor`` for all channels; after this it is 1.
    """
    means = [vae.encode(batch).latent_dist.mean for batch in images.split(64)]
    z = torch.cat(means).transpose(0, 1).flatten(1)
    mean, std = z.mean(1), z.std(1)
    n = len(mean)
    vae.quant_conv.weight[:n].div_(std.view(-1, 1, 1, 1))
    vae.quant_conv.bias[:n].sub_(mean).div_(std)
    vae.quant_conv.bias[n:].sub_(2 * std.log())
    vae.post_quant_conv.bias.add_(torch.einsum("oi,i->o", vae.post_quant_conv.weight[:, :, 0, 0], mean))
    vae.post_quant_conv.weight.mul_(std.view(1, -1, 1, 1))


def frozen_vae(size: Size, run: Path, seed: int, init: Path | None = None) -> AutoencoderKL:
    """The autoencoder in ``run/vae``, made on the first call from the run's VAE stage or from the pipeline ``init``."""
    folder = run / "vae"
    if not folder.exists():
        vae = finish_vae(size, run, seed) if init is None else continued_vae(size, run, init, seed)
        replace_folder(folder, lambda fresh: vae.save_pretrained(fresh))
    return read_vae(folder)


def continued_vae(size: Size, run: Path, init: Path, seed: int) -> AutoencoderKL:
    """The autoencoder of the pipeline ``init``, with the weights that this run has trained further, if any."""
    vae = read_vae(init / "vae")
    if state_path(run, "vae").exists():
        trained = ema_weights(run, "vae")
        vae.load_state_dict(trained, strict=False)
        if any(name.startswith("encoder.") for name in trained):
            normalize_latents(vae, normalizing_images(size, seed))
    return vae


def finish_vae(size: Size, run: Path, seed: int) -> AutoencoderKL:
    """The trained autoencoder: averaged weights, latents of mean 0 and deviation 1, scaling factor 1."""
    vae = build_vae(size, seed)
    vae.load_state_dict(ema_weights(run, "vae"))
    normalize_latents(vae, normalizing_images(size, seed))
    vae.register_to_config(scaling_factor=1.0)
    return vae.eval()


def normalizing_images(size: Size, seed: int) -> Tensor:
    """The scenes whose latents get mean 0 and deviation 1."""
    return to_tensor(np.stack([sample(seed + 10, i)[0] for i in range(size.normalizing)]))


def export_pipeline(size: Size, run: Path, target: Path, seed: int) -> None:
    """Write the diffusers pipeline (fp16) from the states of the VAE and diffusion stages."""
    from diffusers import StableDiffusionPipeline

    def write(folder: Path) -> None:
        tokenizer = build_tokenizer(folder / "tokenizer")
        model = build_diffusion(size, tokenizer, seed)
        model.load_state_dict(ema_weights(run, "diffusion"))
        components: dict[str, Any] = {
            "vae": frozen_vae(size, run, seed),
            "text_encoder": model["text_encoder"],
            "unet": model["unet"],
            "tokenizer": tokenizer,
            "scheduler": build_scheduler(),
        }
        pipe = StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipe.to(dtype=torch.float16).save_pretrained(folder)
        build_tokenizer(folder / "tokenizer")  # again, because transformers 5 saves tokenizer.json only

    replace_folder(target, write)


def export_judge(size: Size, run: Path, target: Path, seed: int) -> None:
    """Write the judge (CLIPModel, tokenizer, image processor) in fp16."""
    from transformers import CLIPImageProcessor

    def write(folder: Path) -> None:
        judge = build_judge(size, build_tokenizer(folder), seed)
        judge.load_state_dict(ema_weights(run, "judge"))
        judge.half().save_pretrained(folder)
        side = size.judge["vision"]["image_size"]
        CLIPImageProcessor(
            size={"height": side, "width": side},
            crop_size={"height": side, "width": side},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)

    replace_folder(target, write)


def export_all(size: Size, run: Path, target: Path, seed: int = 0) -> None:
    """Write ``pipeline`` and, if it is trained, ``judge`` from the states of a run."""
    export_pipeline(size, run, target / "pipeline", seed)
    if (run / TRAINING_FILE).exists():
        shutil.copyfile(run / TRAINING_FILE, target / TRAINING_FILE)
    if state_path(run, "judge").exists():
        export_judge(size, run, target / "judge", seed)
