"""What differs between architectures in a training step: prompts as the denoiser wants them, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...pipelines.components import component, denoiser_name, text_encoders
from ..settings.config import TrainConfig

Family = Literal["sd", "sdxl", "sd3", "flux"]
TextEmbeddings = dict[str, Tensor]
"""``hidden [B, tokens, width]`` and, but for SD 1.x and 2.x, ``pooled [B, width]``."""
TRAINED_ENCODERS: dict[Family, tuple[str, ...]] = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}
"""The CLIP encoders, which ``train_text_encoder`` adapts; a T5 stays as it is, as in diffusers' scripts."""
KNOWN = "Stable Diffusion 1.x, 2.x, SDXL, SD3 and Flux"


def family_of(pipe: Any) -> Family:
    """Which family a pipeline belongs to. Raises :class:`UserError` for one that this trainer does not know."""
    model = denoiser(pipe)
    kinds: dict[str, Family] = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
    if type(model).__name__ in kinds:
        return kinds[type(model).__name__]
    embeds: Any = getattr(model.config, "addition_embed_type", "none")
    if embeds is None and getattr(pipe, "text_encoder_2", None) is None:
        return "sd"
    if embeds == "text_time" and getattr(pipe, "text_encoder_2", None) is not None:
        return "sdxl"
    raise UserError(f"{type(pipe).__name__} is not known to this trainer: it takes {KNOWN}")


def denoiser(pipe: Any) -> Any:
    """The UNet or the transformer."""
    return component(pipe, denoiser_name(pipe))


def networks(pipe: Any) -> list[nn.Module]:
    """The denoiser and the text encoders: what adapters may sit in, frozen beneath them."""
    return [denoiser(pipe), *text_encoders(pipe)]


def native_resolution(pipe: Any) -> int:
    """The side in pixels of the pictures that the base was trained for."""
    side = getattr(denoiser(pipe).config, "sample_size", None) or pipe.default_sample_size
    return int(side) * int(pipe.vae_scale_factor)


def size_multiple(pipe: Any) -> int:
    """The number that sides in pixels must be a multiple of: Flux packs 2 x 2 latents into one."""
    return int(pipe.vae_scale_factor) * (2 if family_of(pipe) == "flux" else 1)


def bucket_multiple(pipe: Any) -> int:
    """Pixels that a side of a bucket is a multiple of, so that latents halve at every level of the denoiser."""
    levels = len(denoiser(pipe).config.get("block_out_channels", (0, 0)))
    return int(pipe.vae_scale_factor) * 2 ** (levels - 1)


def latent_channels(pipe: Any) -> int:
    """Channels of the latents that the denoiser takes."""
    return int(denoiser(pipe).config.in_channels) // (4 if family_of(pipe) == "flux" else 1)


def prompt_limit(pipe: Any) -> int | None:
    """The most tokens that prompts may be given; 0 where their length is fixed (SDXL), ``None`` for any (a T5)."""
    limits = {"sd": int(pipe.tokenizer.model_max_length), "sdxl": 0}
    return limits.get(family_of(pipe))


def empty_embeddings(settings: Any, rows: int, dtype: torch.dtype) -> TextEmbeddings:
    """Prompts of 77 tokens, of 512 for Flux, in the widths that a denoiser's ``settings`` name; without numbers."""
    get = settings.get
    width = get("cross_attention_dim") or get("joint_attention_dim")
    pooled = get("pooled_projection_dim")
    if get("addition_embed_type") == "text_time":
        pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    tokens = 77 if get("cross_attention_dim") else 512
    embeddings = {"hidden": torch.empty(rows, tokens, width, dtype=dtype)}
    return embeddings if pooled is None else {**embeddings, "pooled": torch.empty(rows, pooled, dtype=dtype)}


def encode_prompts(pipe: Any, prompts: Sequence[str], max_tokens: int | None = None) -> TextEmbeddings:
    """Prompts by the pipeline's own ``encode_prompt``, without guidance; ``max_tokens`` limits a T5's.

    An empty prompt of a base whose guidance takes zeros for one (SDXL) is zeros here as well.
    """
    accepted = inspect.signature(pipe.encode_prompt).parameters
    wanted = {
        "prompt": list(prompts), "prompt_2": None, "prompt_3": None, "device": denoiser(pipe).device,
        "num_images_per_prompt": 1, "do_classifier_free_guidance": False,
    }  # fmt: skip
    if max_tokens is not None:
        wanted["max_sequence_length"] = max_tokens
    encoded = pipe.encode_prompt(**{name: value for name, value in wanted.items() if name in accepted})
    kind = family_of(pipe)
    if kind == "sd":
        return {"hidden": encoded[0]}
    embeddings = {"hidden": encoded[0], "pooled": encoded[1] if kind == "flux" else encoded[2]}
    if zeros_for_empty_prompts(pipe) and not all(prompts):
        said = encoded[0].new_tensor([float(bool(prompt)) for prompt in prompts])
        embeddings = {name: value * said.view(-1, *[1] * (value.ndim - 1)) for name, value in embeddings.items()}
    return embeddings


def zeros_for_empty_prompts(pipe: Any) -> bool:
    """Whether a pipeline's guidance takes zeros for an empty prompt, not what its encoders say of one."""
    return bool(pipe.config.get("force_zeros_for_empty_prompt", False))


def predict(pipe: Any, noisy: Tensor, times: Tensor, embeddings: TextEmbeddings, class_labels: Tensor | None) -> Tensor:
    """The denoiser's answer to ``noisy [B, C, h, w]`` at the scheduler's timesteps ``times [B]``."""
    model, kind = denoiser(pipe), family_of(pipe)
    embeddings = {name: value.to(noisy.dtype) for name, value in embeddings.items()}
    if kind == "flux":
        return _flux(pipe, model, noisy, times, embeddings)
    if kind == "sd3":
        return model(
            noisy, embeddings["hidden"], pooled_projections=embeddings["pooled"], timestep=times, return_dict=False
        )[0]
    added = None
    if kind == "sdxl":
        added = {"text_embeds": embeddings["pooled"], "time_ids": time_ids(noisy, pipe.vae_scale_factor)}
    return model(
        noisy,
        times,
        embeddings["hidden"],
        added_cond_kwargs=added,
        return_dict=False,
        class_labels=class_labels,
    )[0]


def time_ids(latents: Tensor, scale: int) -> Tensor:
    """SDXL's ``(original size, crop's corner, target size) [B, 6]``: the crop counts as the whole picture.

    A photo then is learned under the sizes that it is asked for with, not under those of its file.
    """
    height, width = latents.shape[-2] * scale, latents.shape[-1] * scale
    return latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)


def _flux(pipe: Any, model: Any, noisy: Tensor, times: Tensor, embeddings: TextEmbeddings) -> Tensor:
    count, channels, height, width = noisy.shape
    packed = pipe._pack_latents(noisy, count, channels, height, width)
    places = pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
    words = noisy.new_zeros(embeddings["hidden"].shape[1], 3)
    # A guidance-distilled model is trained at guidance 1: the plain prediction, which is what the photos show.
    guidance = torch.ones(count, device=noisy.device) if model.config.guidance_embeds else None
    answer = model(
        hidden_states=packed,
        timestep=times / 1000,
        guidance=guidance,
        encoder_hidden_states=embeddings["hidden"],
        pooled_projections=embeddings["pooled"],
        txt_ids=words,
        img_ids=places,
        return_dict=False,
    )[0]
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(answer, height * scale, width * scale, scale)


def check_pipeline(config: TrainConfig, pipe: Any) -> None:
    """Refuse pipelines that this trainer does not know, by what they lack."""
    lacking = [part for part in ("vae", "text_encoder", "tokenizer", "scheduler") if not hasattr(pipe, part)]
    if lacking:
        raise UserError(f"{type(pipe).__name__} has no {lacking[0]}: this trainer takes {KNOWN}")
    channels = latent_channels(pipe)
    if channels != pipe.vae.config.latent_channels:
        raise UserError(f"the denoiser takes {channels} channels (inpainting?): use the text-to-image model")
    if config.resolution is not None and config.resolution % size_multiple(pipe):
        raise UserError(f"resolution={config.resolution} must be a multiple of {size_multiple(pipe)}")
    for name in ("text_encoder_use_attention_mask", "class_labels_conditioning"):
        if getattr(config, name) and family_of(pipe) != "sd":
            raise UserError(f"--{name} is for Stable Diffusion 1.x and 2.x: leave it out for {type(pipe).__name__}")
    length, limit = config.tokenizer_max_length, prompt_limit(pipe)
    if length is None or limit is None:
        return
    if not limit:
        raise UserError("--tokenizer_max_length has no meaning for SDXL: its prompts have one length")
    if length > limit:
        raise UserError(f"tokenizer_max_length={length} exceeds the {limit} tokens of the text encoder")
