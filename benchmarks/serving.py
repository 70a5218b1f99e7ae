"""Pictures a minute of many subjects: by the engine, and one after another.

    python benchmarks/serving.py [--subjects 32] [--pictures 32] [--at_once 1 4 16] [--base FOLDER_OR_ID]

All pictures are there at the start; their subjects follow Zipf's law, and their steps differ. Ways:

- *engine*: :class:`nora_diffusion.serving.engine.Engine` with so many pictures at work, NoRA adapters loaded from files
  as they are needed;
- *one by one*: the same adapters with `load_adapter` and `delete_adapter`, a picture at a time;
- *diffusers*: the same adapters, exported as LoRAs, with `load_lora_weights` and `unload_lora_weights`.

Each way starts without adapters. Prints seconds, pictures a minute and the ratio to diffusers; and how many gray levels
the engine's pictures differ at most from those that were made one by one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nora_diffusion import add_adapter, export_lora, load_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.generation.library import list_library
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import delete_adapter, trainable_parameters
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.request import Request


def write_subjects(base: str, count: int, folder: Path) -> None:
    """Random NoRA adapters in one basis, weak enough that rounding does not become another picture."""
    pipe = open_pipeline(base)
    for number in range(count):
        torch.manual_seed(number)
        add_adapter(pipe, nora(basis="svd"), "subject")
        for parameter in trainable_parameters(pipe, "subject").values():
            parameter.data.normal_(std=0.05)
        save_adapter(pipe, folder / "nora" / f"s{number}", "subject")
        delete_adapter(pipe, "subject")
        export_lora(folder / "nora" / f"s{number}", folder / "lora" / f"s{number}.safetensors")


def requests(subjects: int, pictures: int) -> list[Request]:
    """The pictures to make."""
    draw = random.Random(0)
    names = draw.choices(range(subjects), [1 / (rank + 1) for rank in range(subjects)], k=pictures)
    return [
        Request(f"a red car <lora:s{name}>", Sampling(draw.choice((8, 12, 16)), 5.0), seed=seed)
        for seed, name in enumerate(names)
    ]


def by_engine(base: str, folder: Path, todo: Sequence[Request], at_once: int) -> tuple[float, list[Any]]:
    """Seconds and pictures of the engine."""
    with Engine(open_pipeline(base), list_library(folder / "nora"), at_once=at_once, waiting=len(todo)) as engine:
        started = time.perf_counter()
        tickets = [engine.submit(request) for request in todo]
        return _timed(started, lambda: [ticket.pictures()[0].image for ticket in tickets])


def _timed(started: float, make: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    images = make()
    return time.perf_counter() - started, images


def one_by_one(base: str, folder: Path, todo: Sequence[Request], diffusers: bool) -> tuple[float, list[Any]]:
    """Seconds and pictures of a pipeline that has one adapter at a time."""
    pipe = open_pipeline(base)
    pipe.set_progress_bar_config(disable=True)

    def make() -> list[Any]:
        images = []
        for request in todo:
            name = request.tags[0].name
            if diffusers:
                pipe.load_lora_weights(folder / "lora", weight_name=f"{name}.safetensors")
            else:
                load_adapter(pipe, folder / "nora" / name, "subject")
            images += sample_images(pipe, [request.text], [request.seed], request.sampling)
            if diffusers:
                pipe.unload_lora_weights()
            else:
                delete_adapter(pipe, "subject")
        return images

    return _timed(time.perf_counter(), make)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--base", default=str(EMBEDDED_WEIGHTS / "pipeline"))
    args = parser.parse_args()
    todo = requests(args.subjects, args.pictures)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lora").mkdir()
        write_subjects(args.base, args.subjects, folder)
        slow, _ = one_by_one(args.base, folder, todo, diffusers=True)
        alone, expected = one_by_one(args.base, folder, todo, diffusers=False)
        print(f"{'':24} {'seconds':>8} {'a minute':>9} {'ratio':>6}")
        _print("diffusers", slow, slow, todo)
        _print("one by one", alone, slow, todo)
        for at_once in args.at_once:
            seconds, images = by_engine(args.base, folder, todo, at_once)
            _print(f"engine, {at_once} at once", seconds, slow, todo)
            most = max(
                np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in zip(images, expected, strict=True)
            )
            print(f"{'':24} differs by {most:.0f} gray levels at most")


def _print(name: str, seconds: float, reference: float, todo: Sequence[Request]) -> None:
    print(f"{name:24} {seconds:8.1f} {60 * len(todo) / seconds:9.1f} {reference / seconds:6.2f}", flush=True)


if __name__ == "__main__":
    main()
