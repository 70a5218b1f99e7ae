"""Pictures of an engine beside runs of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import randomize

from nora_diffusion import add_adapter, load_adapter, open_pipeline, save_adapter, set_adapters
from nora_diffusion.adapters import AdapterConfig, dora, lora, mor, nora, nora_input
from nora_diffusion.composition.mixing import mix_gated
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.tickets import Ticket

SUBJECTS: dict[str, AdapterConfig] = {
    "dog": nora(r=4, inner_r=2, basis="svd"),
    "cat": lora(r=3),
    "mug": nora_input(r=4, inner_r=3, basis="svd"),
    "hat": dora(r=2),
    "mix": mor(r=4, num_experts=3),
}
NAMES = (*SUBJECTS, "gated")
COMPONENTS = ("unet", "text_encoder")


def write_library(base: Path, folder: Path) -> Path:
    """Adapters of several methods, as weak as trained ones: strong ones turn rounding into another picture."""
    pipe = open_pipeline(base)
    for seed, (name, config) in enumerate(SUBJECTS.items()):
        _write(pipe, config, folder / name, seed, COMPONENTS)
    with tempfile.TemporaryDirectory() as parts:
        paths = [_write(pipe, lora(r=3), Path(parts, f"part-{seed}"), seed, ("unet",)) for seed in range(2)]
        mix_gated([(path, 1.0) for path in paths], Path(parts, "gated"), "pooled_outputs")
        load_adapter(pipe, Path(parts, "gated"), "gated")
    randomize(pipe, "gated", 7, size=3.0)
    save_adapter(pipe, folder / "gated", "gated")
    return folder


def _write(pipe: Any, config: AdapterConfig, path: Path, seed: int, components: tuple[str, ...]) -> Path:
    add_adapter(pipe, config, path.name, components)
    randomize(pipe, path.name, seed, size=0.02)
    save_adapter(pipe, path, path.name)
    delete_adapter(pipe, path.name)
    return path


def ask(prompt: str, steps: int = 3, guidance: float = 4.0, sampler: str | None = None, **others: Any) -> Request:
    return Request(prompt, Sampling(steps, guidance, width=16, height=16, sampler=sampler), **others)


class Alone:
    """Makes pictures on a pipeline of its own, one at a time, with the adapters of a library."""

    def __init__(self, base: Path, library: Path) -> None:
        self._pipe = open_pipeline(base)
        self._pipe.set_progress_bar_config(disable=True)
        self._library, self._loaded = library, set[str]()

    def images(self, request: Request) -> list[Any]:
        """The pictures of a request."""
        return [image for image, _ in self.made(request)]

    def made(self, request: Request) -> list[tuple[Any, torch.Tensor]]:
        """The pictures of a request, each with its last latents."""
        weights = {tag.name: tag.unet for tag in request.tags}
        for name in weights.keys() - self._loaded:
            load_adapter(self._pipe, self._library / name, name)
            self._loaded.add(name)
        set_adapters(self._pipe, list(weights), list(weights.values()))
        found, latents = [], list[torch.Tensor]()

        def keep(_: int, now: torch.Tensor) -> None:
            latents[:] = [now]

        for seed in range(request.seed, request.seed + request.count):
            (image,) = sample_images(self._pipe, [request.text], [seed], request.sampling, keep)
            found.append((image, latents[0]))
        return found


def gray_levels_apart(one: Any, two: Any) -> float:
    """The largest difference of two pictures."""
    return float(np.abs(np.asarray(one, float) - np.asarray(two, float)).max())


def assert_equal_to_runs_alone(base: Path, library: Path, tickets: Sequence[Ticket]) -> None:
    """Compare within a gray level. The runs alone come last: opening a pipeline changes torch's default dtype."""
    found, alone = [[picture.image for picture in ticket.pictures()] for ticket in tickets], Alone(base, library)
    for ticket, images in zip(tickets, found, strict=True):
        for ours, theirs in zip(images, alone.images(ticket.request), strict=True):
            assert gray_levels_apart(ours, theirs) <= 1, ticket.request
