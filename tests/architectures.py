"""Tiny random pipelines of every architecture that adapters are promised for, built in memory from config classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from factories import write_tokenizer

WIDTH = 16


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    files = write_tokenizer(folder / "tokenizer")
    return CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=16)


def _clip(tokenizer: Any, projected: bool = False, width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(tokenizer: Any, width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _vae(blocks: int = 2, channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels, norm_num_groups=4, sample_size=16, block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )  # fmt: skip


def sd1(folder: Path) -> Any:
    """Stable Diffusion 1.x: ``proj_in`` and ``proj_out`` are 1x1 convolutions."""
    return _stable_diffusion(folder, cross_attention_dim=WIDTH, attention_head_dim=2)


def sd2(folder: Path) -> Any:
    """Stable Diffusion 2.x: linear projections, another head count in each block, v-prediction."""
    return _stable_diffusion(
        folder, "v_prediction", cross_attention_dim=WIDTH, attention_head_dim=(2, 4), use_linear_projection=True
    )


def _stable_diffusion(folder: Path, prediction: str = "epsilon", **settings: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = _tokenizer(folder)
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(tokenizer), tokenizer=tokenizer, unet=_unet(**settings),
        scheduler=DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path) -> Any:
    """SDXL: two CLIP text encoders, several transformer layers in a block, linear projections."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = _tokenizer(folder)
    unet = _unet(
        cross_attention_dim=2 * WIDTH, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(tokenizer), text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def sd3(folder: Path) -> Any:
    """SD3: joint attention over pictures and text; two CLIP encoders and a T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = _tokenizer(folder)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(channels=16),
        text_encoder=_clip(tokenizer, projected=True), tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True), tokenizer_2=tokenizer,
        text_encoder_3=_t5(tokenizer, 2 * WIDTH), tokenizer_3=tokenizer,
    )  # fmt: skip


def flux(folder: Path) -> Any:
    """Flux: double and single blocks; CLIP and T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = _tokenizer(folder)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), text_encoder=_clip(tokenizer), tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer), tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip
    pipe.default_sample_size = 8  # not in any config: 1024 pixels otherwise
    return pipe


def pixart(folder: Path) -> Any:
    """PixArt-Sigma: a DiT with cross-attention; T5 is its only text encoder. It knows no size below 256 pixels."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer = _tokenizer(folder)
    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, cross_attention_dim=16, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer), vae=_vae(4), transformer=transformer,
        scheduler=DDIMScheduler(),
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[Path], Any]] = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart,
}  # fmt: skip


def tiny_pipeline(name: str, folder: Path, seed: int = 0) -> Any:
    """A pipeline of that architecture, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = ARCHITECTURES[name](folder)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                for value in component.parameters():
                    if not value.any():  # blocks that start at zero would hide what adapters do
                        value.data.normal_(std=0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe
