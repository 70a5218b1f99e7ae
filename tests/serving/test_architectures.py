"""The engine makes the pictures of every architecture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_pipeline
from factories import randomize
from torch import nn

from nora_diffusion import add_adapter, load_adapter, save_adapter
from nora_diffusion.adapters import lora, nora
from nora_diffusion.generation.library import list_library
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.request import Request


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "flux", "pixart"])
def test_pictures_equal_runs_of_their_own(name: str, tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(name, tmp_path / "parts")
    for seed, (subject, config) in enumerate({"dog": nora(r=4, inner_r=2, basis="svd"), "cat": lora(r=2)}.items()):
        add_adapter(pipe, config, subject)
        randomize(pipe, subject, seed, size=0.02)
        save_adapter(pipe, tmp_path / "library" / subject, subject)
        delete_adapter(pipe, subject)
    requests = [
        Request("a dog <lora:dog>", Sampling(3, 4.0, width=16, height=16)),
        Request("a cat <lora:cat:0.5>", Sampling(2, 4.0, width=16, height=16), seed=1),
        Request("a car", Sampling(2, 4.0, width=16, height=16), seed=2),
    ]
    solo = copy.deepcopy(pipe)
    with Engine(pipe, list_library(tmp_path / "library"), at_once=3) as engine:
        tickets = [engine.submit(request) for request in requests]
        found = [ticket.pictures()[0].image for ticket in tickets]
    for request, image in zip(requests, found, strict=True):
        for tag in request.tags:
            load_adapter(solo, tmp_path / "library" / tag.name, tag.name, weight=tag.unet)
        (expected,) = sample_images(solo, [request.text], [request.seed], request.sampling)
        for tag in request.tags:
            delete_adapter(solo, tag.name)
        assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).max() <= 1, request


def test_sdxl_in_fp16_casts_its_autoencoder_once(tmp_path: Path) -> None:
    """Its pipeline casts it to fp32 and back for each picture, also while another one waits for it."""
    pipe: Any = tiny_pipeline("sdxl", tmp_path / "parts")
    channels = pipe.vae.config.latent_channels
    pipe.vae.post_quant_conv = nn.Conv2d(channels, channels, 1)  # which tells the pipeline the dtype
    pipe.to(torch.float16)
    solo, request = copy.deepcopy(pipe), Request("a car", Sampling(2, 4.0, width=16, height=16), count=3)
    with Engine(pipe, at_once=3) as engine:
        found = [picture.image for picture in engine.submit(request).pictures()]
    for seed, image in enumerate(found):
        (expected,) = sample_images(solo, [request.text], [seed], request.sampling)
        assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).max() <= 2
