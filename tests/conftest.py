"""Fixtures shared by all tests; nothing here asks the network for anything."""

from __future__ import annotations

import gc
import os
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from factories import tiny_random_pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many: at the end a long file would keep one worker busy."""
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    """What has been imported stays, so the garbage collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the cache of whoever runs them."""
    os.environ["NORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline in the layout of Stable Diffusion 1.5."""
    return tiny_random_pipeline(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def opened(tiny_base: Path) -> Any:
    """That pipeline, which no test may change."""
    from nora_diffusion import open_pipeline

    return open_pipeline(tiny_base)


@pytest.fixture
def pipe(opened: Any) -> Any:
    """A fresh copy of that pipeline; copying takes a third of the time of opening."""
    return deepcopy(opened)


@pytest.fixture
def render() -> Any:
    """``render(pipe)``: a seeded picture as a float tensor, for comparing pipelines."""

    def picture(pipe: Any) -> torch.Tensor:
        out = pipe(
            "a dog", num_inference_steps=2, height=16, width=16, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return torch.from_numpy(out.images)

    return picture
