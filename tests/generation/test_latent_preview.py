"""Previews of latents that a pipeline packs."""

from __future__ import annotations

import torch

from nora_diffusion.generation.latent_preview import LatentPreview


def test_packed_latents_give_the_same_preview() -> None:
    from diffusers import FluxPipeline

    generator = torch.Generator().manual_seed(0)
    preview = LatentPreview(torch.rand(5, 3, generator=generator))
    latents = torch.rand(1, 4, 6, 10, generator=generator)
    packed = FluxPipeline._pack_latents(latents, 1, 4, 6, 10)
    assert preview.image(packed[0], 10 / 6).tobytes() == preview.image(latents[0]).tobytes()
