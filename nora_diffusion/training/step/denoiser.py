"""Model families: how each one encodes prompts and calls its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...pipelines.components import components, denoiser
from ..settings.config import TrainConfig

Family = Literal["sd", "sdxl", "sd3", "flux"]
TextEmbeddings = dict[str, Tensor]
"""``hidden [B, tokens, width]`` and, except for SD 1.x and 2.x, ``pooled [B, width]``."""
TRAINED_ENCODERS: dict[Family, tuple[str, ...]] = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}
"""Text encoders that ``train_text_encoder`` adapts: CLIP but not T5, as in diffusers' scripts."""
SUPPORTED = "Stable Diffusion 1.x, 2.x, SDXL, SD3 and Flux"


def family_of(pipe: Any) -> Family:
    """Model family of a pipeline. Raises :class:`UserError` for an unsupported one."""
    model = denoiser(pipe)
    families: dict[str, Family] = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
    if type(model).__name__ in families:
        return families[type(model).__name__]
    embed_type: Any = getattr(model.config, "addition_embed_type", "none")
    if embed_type is None and getattr(pipe, "text_encoder_2", None) is None:
        return "sd"
    if embed_type == "text_time" and getattr(pipe, "text_encoder_2", None) is not None:
        return "sdxl"
    raise UserError(f"{type(pipe).__name__} is not supported: this trainer takes {SUPPORTED}")


def networks(pipe: Any) -> list[nn.Module]:
    """The denoiser and the text encoders: the models that adapters can be in."""
    return list(components(pipe).values())


def native_resolution(pipe: Any) -> int:
    """Resolution in pixels that the base was trained at."""
    side = getattr(denoiser(pipe).config, "sample_size", None) or pipe.default_sample_size
    return int(side) * int(pipe.vae_scale_factor)


def size_multiple(pipe: Any) -> int:
    """Image sides in pixels must be a multiple of this; Flux packs 2 x 2 latents into one token."""
    return int(pipe.vae_scale_factor) * (2 if family_of(pipe) == "flux" else 1)


def bucket_multiple(pipe: Any) -> int:
    """Bucket sides in pixels are multiples of this, so that latents can be halved at every level of the UNet."""
    levels = len(denoiser(pipe).config.get("block_out_channels", (0, 0)))
    return int(pipe.vae_scale_factor) * 2 ** (levels - 1)


def latent_channels(pipe: Any) -> int:
    """Latent channels of the denoiser's input."""
    return int(denoiser(pipe).config.in_channels) // (4 if family_of(pipe) == "flux" else 1)


def prompt_limit(pipe: Any) -> int | None:
    """Maximum of ``tokenizer_max_length``; 0 if the length is fixed (SDXL), ``None`` without a limit (T5)."""
    limits = {"sd": int(pipe.tokenizer.model_max_length), "sdxl": 0}
    return limits.get(family_of(pipe))


def empty_embeddings(settings: Any, rows: int, dtype: torch.dtype) -> TextEmbeddings:
    """Uninitialized embeddings with the widths in a denoiser's config: 77 tokens, or 512 for transformers."""
    get = settings.get
    width = get("cross_attention_dim") or get("joint_attention_dim")
    pooled = get("pooled_projection_dim")
    if get("addition_embed_type") == "text_time":
        pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    tokens = 77 if get("cross_attention_dim") else 512
    embeddings = {"hidden": torch.empty(rows, tokens, width, dtype=dtype)}
    return embeddings if pooled is None else {**embeddings, "pooled": torch.empty(rows, pooled, dtype=dtype)}


def encode_prompts(pipe: Any, prompts: Sequence[str], max_tokens: int | None = None) -> TextEmbeddings:
    """Encode prompts with the pipeline's ``encode_prompt``, without guidance; ``max_tokens`` is the limit for T5.

    Empty prompts become zeros if the pipeline does so for guidance (SDXL's ``force_zeros_for_empty_prompt``).
    """
    accepted = inspect.signature(pipe.encode_prompt).parameters
    arguments = {
        "prompt": list(prompts), "prompt_2": None, "prompt_3": None, "device": denoiser(pipe).device,
        "num_images_per_prompt": 1, "do_classifier_free_guidance": False,
    }  # fmt: skip
    if max_tokens is not None:
        arguments["max_sequence_length"] = max_tokens
    encoded = pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in accepted})
    family = family_of(pipe)
    if family == "sd":
        return {"hidden": encoded[0]}
    embeddings = {"hidden": encoded[0], "pooled": encoded[1] if family == "flux" else encoded[2]}
    if zeros_for_empty_prompts(pipe) and not all(prompts):
        nonempty = encoded[0].new_tensor([float(bool(prompt)) for prompt in prompts])
        embeddings = {name: value * nonempty.view(-1, *[1] * (value.ndim - 1)) for name, value in embeddings.items()}
    return embeddings


def zeros_for_empty_prompts(pipe: Any) -> bool:
    """Whether the pipeline's guidance uses zeros instead of the embeddings of an empty prompt."""
    return bool(pipe.config.get("force_zeros_for_empty_prompt", False))


def predict(pipe: Any, noisy: Tensor, times: Tensor, embeddings: TextEmbeddings, class_labels: Tensor | None) -> Tensor:
    """Prediction of the denoiser for ``noisy [B, C, h, w]`` at timesteps ``times [B]``."""
    model, family = denoiser(pipe), family_of(pipe)
    embeddings = {name: value.to(noisy.dtype) for name, value in embeddings.items()}
    if family == "flux":
        return _flux(pipe, model, noisy, times, embeddings)
    if family == "sd3":
        return model(
            noisy, embeddings["hidden"], pooled_projections=embeddings["pooled"], timestep=times, return_dict=False
        )[0]
    added = None
    if family == "sdxl":
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
    """SDXL's ``(original size, crop corner, target size) [B, 6]``, as if each crop were a whole image.

    Training then uses the sizes that generation will use, instead of those of the image file.
    """
    height, width = latents.shape[-2] * scale, latents.shape[-1] * scale
    return latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)


def _flux(pipe: Any, model: Any, noisy: Tensor, times: Tensor, embeddings: TextEmbeddings) -> Tensor:
    count, channels, height, width = noisy.shape
    packed = pipe._pack_latents(noisy, count, channels, height, width)
    image_ids = pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
    text_ids = noisy.new_zeros(embeddings["hidden"].shape[1], 3)
    # Guidance-distilled models are trained at guidance 1, which is the prediction without guidance.
    guidance = torch.ones(count, device=noisy.device) if model.config.guidance_embeds else None
    prediction = model(
        hidden_states=packed,
        timestep=times / 1000,
        guidance=guidance,
        encoder_hidden_states=embeddings["hidden"],
        pooled_projections=embeddings["pooled"],
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(prediction, height * scale, width * scale, scale)


def check_pipeline(config: TrainConfig, pipe: Any) -> None:
    """Raise :class:`UserError` for unsupported pipelines, and for settings that the pipeline does not support."""
    missing = [name for name in ("vae", "text_encoder", "tokenizer", "scheduler") if not hasattr(pipe, name)]
    if missing:
        raise UserError(f"{type(pipe).__name__} has no {missing[0]}: this trainer takes {SUPPORTED}")
    channels = latent_channels(pipe)
    if channels != pipe.vae.config.latent_channels:
        raise UserError(f"the denoiser takes {channels} channels (inpainting?): use the text-to-image model")
    if config.resolution is not None and config.resolution % size_multiple(pipe):
        raise UserError(f"resolution={config.resolution} must be a multiple of {size_multiple(pipe)}")
    for name in ("text_encoder_use_attention_mask", "class_labels_conditioning"):
        if getattr(config, name) and family_of(pipe) != "sd":
            raise UserError(
                f"--{name} is only for Stable Diffusion 1.x and 2.x: leave it out for {type(pipe).__name__}"
            )
    length, limit = config.tokenizer_max_length, prompt_limit(pipe)
    if length is None or limit is None:
        return
    if not limit:
        raise UserError(
            "--tokenizer_max_length is not supported for SDXL, whose prompts have a fixed length: leave it out"
        )
    if length > limit:
        raise UserError(f"tokenizer_max_length={length} exceeds the {limit} tokens of the text encoder")
