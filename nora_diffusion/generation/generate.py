"""Generating pictures with any base and any adapters."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..io.files import user_errors
from ..loaders import LoadedAdapter, list_adapters, load_adapter, set_adapters
from ..loaders.load import located
from ..pipelines.base import BaseSource
from .image_settings import save_image
from .library import Known, adapters_in, given, resolve
from .sampling import MAX_SEED, Sampling, check_prompt, check_range, describe_image, sample_images
from .tags import Tag, parse_tags, parse_weight


@dataclass
class GenerateConfig:
    """What to generate: ``num`` images of each prompt; image ``i`` has the seed ``seed + i``.

    ``adapters`` act on every prompt, at their weight or at the one that a prompt's ``<lora:name:0.8>`` gives; those in
    the folder ``library`` only on prompts that name them. ``batch`` images are generated at a time.
    """

    prompts: list[str]
    sampling: Sampling
    source: BaseSource = field(default_factory=BaseSource)
    adapters: list[str] = field(default_factory=list)
    library: str | None = None
    num: int = 1
    seed: int = 0
    batch: int = 4
    out: str = "outputs"

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting that makes no sense."""
        if not self.prompts or not all(p.strip() for p in self.prompts):
            raise UserError("there is no prompt: give --prompt")
        for prompt in self.prompts:
            check_prompt(prompt)
        check_range("num", self.num, 1, 10_000)
        check_range("batch", self.batch, 1, 256)
        check_range("seed", self.seed, 0, MAX_SEED)
        self.sampling.check()


def parse_adapter(text: str) -> tuple[str, float]:
    """Split ``path[:weight]`` at its last colon, where what follows is a number (``C:\\dog`` stays whole)."""
    path, colon, tail = text.rpartition(":")
    if not colon or not path or "/" in tail or "\\" in tail:
        return text, 1.0
    return path, parse_weight(tail, f"--adapter {text!r}")


def generate(config: GenerateConfig) -> list[Path]:
    """Make the pictures and return their files. Nothing is written unless base and adapters load."""
    config.check()
    known = given([parse_adapter(text) for text in config.adapters])
    shelf = known + (adapters_in(config.library) if config.library else [])
    wanted = [_read_prompt(prompt, known, shelf) for prompt in config.prompts]
    out = Path(config.out).expanduser()
    _check_writable(out)
    for adapter in dict.fromkeys(adapter for _, live in wanted for adapter in live):
        inspect_adapter(located(adapter.path))  # refuse before a model is loaded
    pipe = config.source.open()
    loaded = _load_all(pipe, [adapter for _, live in wanted for adapter in live])
    jobs = [(prompt, config.seed + i, live) for prompt, live in wanted for i in range(config.num)]
    files = []
    for batch, live in _batches(jobs, config.batch):
        _use(pipe, {loaded[adapter].name: tag for adapter, tag in live.items()})
        images = sample_images(pipe, [p for p, _ in batch], [s for _, s in batch], config.sampling)
        described = [_describe(loaded[adapter], tag) for adapter, tag in live.items()]
        for image, (prompt, seed) in zip(images, batch, strict=True):
            settings = describe_image(pipe, image, prompt, seed, config.sampling, described)
            files.append(save_image(image, free_name(out, seed), settings))
    return files


Live = dict[Known, Tag]
"""The adapters that act on a prompt, and how."""


def _read_prompt(prompt: str, known: list[Known], shelf: list[Known]) -> tuple[str, Live]:
    clean, tags = parse_tags(prompt)
    if not clean.strip():
        raise UserError(f"there is no prompt beside the tags in {prompt!r}")
    live = {adapter: adapter.always for adapter in known if adapter.always is not None}
    named: Live = {}
    for tag in tags:
        adapter = resolve(tag, shelf)
        if adapter in named:
            raise UserError(f"{named[adapter]} and {tag} are one adapter, {adapter.path}: write one tag")
        named[adapter] = tag
    return clean, live | named


def _load_all(pipe: Any, adapters: Sequence[Known]) -> dict[Known, LoadedAdapter]:
    """Each adapter once, under a name of our own: PEFT takes few signs in one, and files may be called anything."""
    return {
        adapter: load_adapter(pipe, adapter.path, f"adapter_{i}", activate=False)
        for i, adapter in enumerate(dict.fromkeys(adapters))
    }


def _use(pipe: Any, tags: dict[str, Tag]) -> None:
    """Make exactly these adapters active, by the names that the pipeline knows them under.

    A textual inversion is not among those: it is a word, and acts where a prompt has it.
    """
    held = list_adapters(pipe)
    parts = {name: [part for part, names in held.items() if name in names] for name in tags}
    live = [name for name in tags if parts[name]]
    set_adapters(pipe, live, [_weights(tags[name], parts[name]) for name in live])


def _weights(tag: Tag, parts: Sequence[str]) -> float | dict[str, float]:
    if tag.unet == tag.te:
        return tag.unet
    return {part: tag.te if part.startswith("text_encoder") else tag.unet for part in parts}


def _check_writable(folder: Path) -> None:
    """Refuse before anything is loaded; the folder is made with the first picture, so that a mistake leaves none."""
    with user_errors(folder):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
    if not writable:
        raise UserError(f"cannot write {folder}: {there} is no folder that you may write to; choose another one")


def _describe(loaded: LoadedAdapter, tag: Tag) -> dict[str, Any]:
    info = loaded.info
    said = {"name": tag.name, "weight": tag.unet, "sha256": info.sha256, "path": info.path, "trigger": info.trigger}
    return said if tag.te == tag.unet else {**said, "te": tag.te}


def _batches(jobs: list[tuple[str, int, Live]], size: int) -> Iterator[tuple[list[tuple[str, int]], Live]]:
    """``(prompt, seed)`` of pictures that are made together, which have the same adapters at the same weights."""
    for _, group in itertools.groupby(jobs, key=lambda job: list(job[2].items())):
        same = list(group)
        for start in range(0, len(same), size):
            yield [(prompt, seed) for prompt, seed, _ in same[start : start + size]], same[0][2]


def free_name(folder: Path, seed: int) -> Path:
    """The next ``NNNN-seed.png``; nothing is ever overwritten."""
    taken = [int(match[1]) for f in folder.glob("*.png") if (match := re.match(r"(\d{4,})-", f.name))]
    return folder / f"{max(taken, default=-1) + 1:04d}-{seed}.png"
