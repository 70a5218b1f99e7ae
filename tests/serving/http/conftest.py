"""A server around a tiny random pipeline, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from factories import randomize

from nora_diffusion import add_adapter, load_base, open_pipeline, save_adapter
from nora_diffusion.adapters import lora, nora
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.http.access.keys import Keys
from nora_diffusion.serving.http.catalog import Catalog
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.state import State
from nora_diffusion.serving.http.uploads import Uploads

Serve = Callable[..., Any]


def save(pipe: Any, folder: Path, name: str, config: Any, seed: int) -> None:
    add_adapter(pipe, config, name, ("unet",))
    randomize(pipe, name, seed, size=0.02)
    save_adapter(pipe, folder / name, name, info={"trigger": "sks"})
    delete_adapter(pipe, name)


@pytest.fixture(scope="session")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shown/``: the adapters dog and cat; ``other/``: hat; ``alien/``: one of the embedded base."""
    folder, pipe = tmp_path_factory.mktemp("library"), open_pipeline(tiny_base)
    save(pipe, folder / "shown", "dog", nora(r=4, inner_r=2, basis="svd"), 0)
    save(pipe, folder / "shown", "cat", lora(r=3), 1)
    save(pipe, folder / "other", "hat", lora(r=2), 2)
    save(load_base(), folder / "alien", "alien", lora(r=2), 3)
    return folder


@pytest.fixture
def serve(tiny_base: Path, library: Path, pipe: Any, tmp_path: Path) -> Iterator[Serve]:
    """``serve(at_once=1, keys=Keys(...))``: a client of a server; its ``state`` is the server's."""
    from starlette.testclient import TestClient

    from nora_diffusion.serving.http.application import application

    with ExitStack() as stack:

        def started(keys: Keys | None = None, uploads: bool = True, **settings: Any) -> Any:
            config = ServeConfig(BaseSource(str(tiny_base)), [str(library / "shown")], **settings)
            catalog = Catalog(config.subjects, Uploads(tmp_path / "uploads") if uploads else None)
            engine = Engine(pipe, catalog.adapters, at_once=config.at_once, waiting=config.waiting)
            state = State(config, stack.enter_context(engine), catalog, keys)
            client = TestClient(application(state), base_url="http://localhost")
            client.state = state  # type: ignore[attr-defined]
            return client

        yield started
