"""A tiny random pipeline with a few subjects, and requests for small pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import randomize

from nora_diffusion import add_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters import lora, nora
from nora_diffusion.generation.library import list_library
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.tickets import Ticket

Ask = Callable[..., Request]
SUBJECTS = {"dog": nora(r=4, inner_r=2, basis="svd"), "cat": lora(r=3), "hat": lora(r=2)}


@pytest.fixture(scope="module")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters dog, cat and hat."""
    folder, pipe = tmp_path_factory.mktemp("library"), open_pipeline(tiny_base)
    for seed, (name, config) in enumerate(SUBJECTS.items()):
        add_adapter(pipe, config, name, ("unet",))
        randomize(pipe, name, seed, size=0.02)
        save_adapter(pipe, folder / name, name)
        delete_adapter(pipe, name)
    return folder


@pytest.fixture(scope="session")
def ask() -> Ask:
    """``ask("a sks dog <lora:dog>", steps=3)``: a request for a small picture."""

    def request(prompt: str, steps: int = 2, sampler: str | None = None, **others: Any) -> Request:
        return Request(prompt, Sampling(steps, 4.0, width=16, height=16, sampler=sampler), **others)

    return request


@pytest.fixture
def equal_to_an_engine(tiny_base: Path, library: Path) -> Callable[[Sequence[Ticket]], None]:
    """Assert that the pictures of tickets are those of an engine in this process, within a gray level."""

    def check(tickets: Sequence[Ticket]) -> None:
        found = [[picture.image for picture in ticket.pictures()] for ticket in tickets]
        with Engine(open_pipeline(tiny_base), list_library(library)) as engine:
            expected = [engine.submit(ticket.request) for ticket in tickets]
            for images, ticket in zip(found, expected, strict=True):
                for ours, theirs in zip(images, ticket.pictures(), strict=True):
                    assert np.abs(np.asarray(ours, float) - np.asarray(theirs.image, float)).max() <= 1

    return check
