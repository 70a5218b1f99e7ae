"""Writes the files that every later release has to read: ``python tests/stored/make.py`` adds those of a new version.

A file that is there is left alone: what it holds was written by the release of its time. The base's numbers follow from
a formula, not from a random generator, so that it is the same on every machine and with every release of PyTorch.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for factories, as pytest does

from factories import tiny_random_pipeline, write_photos

from nora_diffusion import add_adapter, create_pack, delete_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters import AdapterConfig, dora, lora, mor, nora
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.loaders.tokens import add_tokens
from nora_diffusion.pipelines.components import components
from nora_diffusion.training import TrainConfig, train

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected.json"
TOKENS = "A stored <word>"
CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=4, inner_r=2, alpha=2.0, basis="svd"),
    "conv": lambda: nora(r=4, inner_r=2, basis="svd", target_modules=["conv"]),
    "lora": lambda: lora(r=2, alpha=4.0),
    "dora": lambda: dora(r=2),
    "mor": lambda: mor(r=4, num_experts=3, router="prompt"),
}


def formula(name: str, shape: torch.Size, scale: float) -> Tensor:
    """Numbers that look random and are the same everywhere."""
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return (scale * torch.sin(count * 12.9898 + zlib.crc32(name.encode()) % 1000)).reshape(shape).float()


def stored_base() -> Any:
    """The pipeline that the stored adapters belong to."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = open_pipeline(tiny_random_pipeline(Path(folder) / "base"))
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        fill(part)
    pipe.register_to_config(_name_or_path="stored-base")
    return pipe


@torch.no_grad()
def fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        matrix = parameter.ndim > 1
        parameter.copy_(formula(name, parameter.shape, 0.25 if matrix else 0.1))
        if name.endswith("weight") and not matrix:
            parameter.add_(1.0)  # of a norm


@torch.no_grad()
def learn(pipe: Any, name: str) -> None:
    for key, parameter in trainable_parameters(pipe, name).items():
        parameter.add_(formula(key, parameter.shape, 0.2))


@torch.no_grad()
def answers(pipe: Any, prompt: str = "a dog") -> list[float]:
    """Some numbers of what the pipeline computes, text encoder and denoiser."""
    told = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    hidden = pipe.encode_prompt(prompt, **told)[0]
    noisy = formula("noise", torch.Size([1, 4, 8, 8]), 1.0)
    out = pipe.unet(noisy, torch.tensor([500]), hidden).sample
    return [round(value, 6) for value in (*out.flatten()[::32].tolist(), *hidden.flatten()[::64].tolist())]


def write(place: Path) -> dict[str, list[float]]:
    """All files of today's versions; returns what the pipeline computes with each."""
    pipe, computed = stored_base(), {}
    computed["base"] = answers(pipe)
    for name, config in CONFIGS.items():
        parts = ["unet"] if name in ("conv", "mor") else ["unet", "text_encoder"]
        add_adapter(pipe, config(), "one", parts)
        learn(pipe, "one")
        save_adapter(pipe, place / f"adapter-1/{name}", "one", info={"trigger": "sks", "step": 7})
        if name == "nora":
            save_adapter(pipe, place / "adapter-1/shared", "one", basis="shared")
        computed[name] = answers(pipe)
        delete_adapter(pipe, "one")
    computed["shared"] = computed["nora"]
    add_adapter(pipe, CONFIGS["nora"](), "one")
    learn(pipe, "one")
    add_tokens(pipe, components(pipe), "one", {"<word>": {"text_encoder": formula("word", torch.Size([2, 16]), 0.5)}})
    save_adapter(pipe, place / "adapter-2/tokens", "one")
    computed["tokens"] = answers(pipe, TOKENS)
    delete_adapter(pipe, "one")
    create_pack(
        place / "pack-1/two.nora_pack.safetensors",
        {name: place / f"adapter-1/{name}/nora_adapter.safetensors" for name in ("nora", "shared")},
    )
    computed["checkpoint"] = _checkpoint(place / "checkpoint-1")
    return computed


def _checkpoint(place: Path) -> list[float]:
    from nora_diffusion import load_adapter

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        stored_base().save_pretrained(base)
        config = TrainConfig(
            pretrained_model_name_or_path=str(base), instance_data_dir=str(write_photos(Path(folder) / "photos", 3)),
            instance_prompt="a sks dog", output_dir=str(Path(folder) / "out"), rank=4, inner_rank=2, basis="svd",
            max_train_steps=2, checkpointing_steps=2, resolution=16, seed=0, learning_rate=1e-2, ema_decay=0.5,
        )  # fmt: skip
        train(config)
        shutil.copytree(Path(folder) / "out/checkpoints/step-2", place)
    pipe = stored_base()
    load_adapter(pipe, place, "checkpoint")
    return answers(pipe)


def main() -> None:
    """Write into a folder of its own, then add what is not there yet."""
    known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        computed = write(Path(folder))
        for made in sorted(Path(folder).iterdir()):
            if not (HERE / made.name).exists():
                shutil.copytree(made, HERE / made.name)
    EXPECTED.write_text(json.dumps({**computed, **known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
