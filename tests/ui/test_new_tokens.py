"""An adapter with a new token, in the app: only images made with the adapter know the token."""

from __future__ import annotations

from pathlib import Path

import torch

from nora_diffusion import add_adapter, delete_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters import nora
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders.tokens import add_tokens
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.pipelines.components import components
from nora_diffusion.ui.device import Device
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.request import ActiveAdapter, Request
from nora_diffusion.ui.runs import Run

from .conftest import WAIT


def test_a_token_is_added_and_removed_with_its_adapter(base: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(base)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "pet")
    width = pipe.text_encoder.get_input_embeddings().embedding_dim
    add_tokens(pipe, components(pipe), "pet", {"<pet>": {"text_encoder": torch.randn(2, width)}})
    file = save_adapter(pipe, tmp_path / "pet", "pet", info={"trigger": "<pet>"})
    delete_adapter(pipe, "pet")
    engine = Engine(BaseSource(str(base), "cpu"))
    tokenizer = engine.pipe.tokenizer
    images = []
    for number, adapters in enumerate([(), (ActiveAdapter("pet", file),), ()]):
        order = Request((("a <pet>", 0),), Sampling(2, 2.0, width=16, height=16), adapters)
        out = tmp_path / str(number)
        made = Run(
            Device(tmp_path / "lock", max_waiting=1), "images", lambda run, o=order, p=out: engine.make(o, p, run)
        )
        made.join(WAIT)
        assert made.progress.state == "done", made.progress
        images.append(next(out.glob("*.png")))
    settings = read_settings(images[1])
    assert settings.prompt == "a <pet>" and settings.adapters[0]["trigger"] == "<pet>"
    first, with_token, last = (image.read_bytes() for image in images)
    assert with_token != first and last == first and engine.pipe.tokenizer is tokenizer
