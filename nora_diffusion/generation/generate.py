"""Generate images with any base and any adapters. Torch is imported when all settings and files have been checked."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..formats.hub import locate
from ..io.files import user_errors, write_first_free
from ..pipelines.base import BaseSource
from .addresses import parse_adapter
from .image_settings import ImageSettings, adapter_settings, png_with_settings
from .library import NamedAdapter, find_adapter, list_library, name_adapters
from .retrieval.automatic import Choice, chooser
from .retrieval.settings import Auto
from .settings import MAX_SEED, Sampling, check_prompt, check_range
from .start_image import StartImage
from .tags import Tag, parse_tags

if TYPE_CHECKING:
    from ..loaders import LoadedAdapter


log = logging.getLogger(__name__)


@dataclass
class GenerateConfig:
    """What to generate: ``num`` images of each prompt; image ``i`` has the seed ``seed + i``.

    ``adapters`` (``path[:weight]``) act on every prompt; a tag ``<lora:name:0.8>`` in a prompt overrides their weight.
    The adapters in the folder ``library`` act only on prompts that name them. ``batch`` images are sampled at a time.
    ``subjects_apart``: where a prompt names the subjects of several adapters, each acts on its own subject only.
    ``auto``: choose adapters of the library for prompts without tags; ``report`` gets what was chosen for each.
    ``start``: the image that all of them start from.
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
    subjects_apart: bool = True
    auto: Auto | None = None
    start: StartImage | None = None
    report: Callable[[Choice], object] = log.info

    def check(self) -> None:
        """Raises :class:`UserError` for the first invalid setting."""
        if not self.prompts or not all(p.strip() for p in self.prompts):
            raise UserError("there is no prompt: give --prompt")
        for prompt in self.prompts:
            check_prompt(prompt)
        if self.auto:
            self.auto.check()
            if not self.library:
                raise UserError("--auto chooses among the adapters of a library: give its folder as --library")
        check_range("num", self.num, 1, 10_000)
        check_range("batch", self.batch, 1, 256)
        check_range("seed", self.seed, 0, MAX_SEED - self.num + 1)
        self.sampling.check()
        if self.start:
            self.start.check(self.sampling)


def generate(config: GenerateConfig) -> list[Path]:
    """Generate the images and return their files. Nothing is written unless the base and all adapters load.

    Raises :class:`UserError`.
    """
    config.check()
    given = name_adapters([parse_adapter(text) for text in config.adapters])
    library = list_library(config.library) if config.library else []
    available = given + library
    prompts = [_read_prompt(prompt, given, available) for prompt in config.prompts]
    out = Path(config.out).expanduser()
    _check_writable(out)
    adapters = list(dict.fromkeys(adapter for _, active in prompts for adapter in active))
    for adapter in adapters:
        inspect_adapter(locate(adapter.path))  # fails before a model is loaded
    from .apart import kept_apart
    from .sampling import check_lengths, describe_image, sample_images

    pipe = config.source.open()
    if config.auto:
        prompts = _with_chosen(pipe, config, prompts, library)
        adapters = list(dict.fromkeys(adapter for _, active in prompts for adapter in active))
    loaded = _load_all(pipe, adapters)
    check_lengths(pipe, [*(prompt for prompt, _ in prompts), config.sampling.negative_prompt])
    jobs = [
        Job(prompt, config.seed + i, active, _subjects(prompt, active, loaded) if config.subjects_apart else {})
        for prompt, active in prompts
        for i in range(config.num)
    ]
    files = []
    for batch in _batches(jobs, config.batch):
        active, subjects = batch[0].active, batch[0].subjects
        _activate(pipe, {loaded[adapter].name: tag for adapter, tag in active.items()})
        texts = [job.prompt for job in batch]
        with kept_apart(pipe, subjects, texts) as apart:
            images = sample_images(pipe, texts, [job.seed for job in batch], config.sampling, start=config.start)
        described = [_describe(loaded[adapter], tag, apart) for adapter, tag in active.items()]
        for image, job in zip(images, batch, strict=True):
            settings = describe_image(pipe, image, job.prompt, job.seed, config.sampling, described, config.start)
            files.append(save_new_image(image, out, job.seed, settings))
    return files


Active = dict[NamedAdapter, Tag]
"""The adapters that act on a prompt, with their weights."""


@dataclass(frozen=True)
class Job:
    """An image to generate. ``subjects``: the words of the subjects that are kept apart, by adapter."""

    prompt: str
    seed: int
    active: Active
    subjects: dict[str, str]


def _subjects(prompt: str, active: Active, loaded: dict[NamedAdapter, LoadedAdapter]) -> dict[str, str]:
    from .apart import subjects_in

    infos = {loaded[adapter].name: loaded[adapter].info for adapter in active}
    return subjects_in(prompt, {name: (info.trigger, info.class_word) for name, info in infos.items()})


def _read_prompt(prompt: str, given: list[NamedAdapter], available: list[NamedAdapter]) -> tuple[str, Active]:
    """The prompt without tags, and its adapters: those of its tags, and the given ones that it does not name."""
    clean, tags = parse_tags(prompt)
    if not clean.strip():
        raise UserError(f"there is no prompt besides the tags in {prompt!r}")
    named: Active = {}
    for tag in tags:
        adapter = find_adapter(tag, available)
        if adapter in named:
            raise UserError(f"{named[adapter]} and {tag} name the same adapter, {adapter.path}: write one tag")
        named[adapter] = tag
    return clean, {adapter: adapter.default for adapter in given if adapter.default} | named


def _with_chosen(
    pipe: Any, config: GenerateConfig, prompts: Sequence[tuple[str, Active]], library: Sequence[NamedAdapter]
) -> list[tuple[str, Active]]:
    """The prompts, those without tags with the adapters of the library that suit them."""
    assert config.auto
    choose = chooser(pipe, config.auto, library)
    found = []
    for written, (prompt, active) in zip(config.prompts, prompts, strict=True):
        if parse_tags(written)[1]:
            found.append((prompt, active))
            continue
        config.report(choice := choose(prompt))
        found.append((choice.prompt, active | choice.active))
    return found


def _load_all(pipe: Any, adapters: Sequence[NamedAdapter]) -> dict[NamedAdapter, LoadedAdapter]:
    """Load each adapter under a name of our own, because PEFT allows few characters in a name."""
    from ..loaders import load_adapter

    return {
        adapter: load_adapter(pipe, adapter.path, f"adapter_{i}", activate=False) for i, adapter in enumerate(adapters)
    }


def _activate(pipe: Any, tags: dict[str, Tag]) -> None:
    """Make exactly these adapters active; ``tags`` has their weights by their names in the pipeline.

    A textual inversion has no layers to activate: it acts wherever a prompt has its token.
    """
    from ..loaders import list_adapters, set_adapters

    loaded = list_adapters(pipe)
    components = {name: [component for component, names in loaded.items() if name in names] for name in tags}
    active = [name for name in tags if components[name]]
    set_adapters(pipe, active, [_weights(tags[name], components[name]) for name in active])


def _weights(tag: Tag, components: Sequence[str]) -> float | dict[str, float]:
    if tag.unet == tag.te:
        return tag.unet
    return {component: tag.te if component.startswith("text_encoder") else tag.unet for component in components}


def _check_writable(folder: Path) -> None:
    """Raises :class:`UserError` if ``folder`` cannot be written. It is created with the first image."""
    with user_errors(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
    if not writable:
        raise UserError(f"cannot write {folder}: {existing} is not a folder you can write to; choose another one")


def _describe(loaded: LoadedAdapter, tag: Tag, apart: Mapping[str, str]) -> dict[str, Any]:
    words = {"words": apart[loaded.name]} if loaded.name in apart else {}
    return adapter_settings(loaded.info, loaded.info.path, tag.name, tag.unet, tag.te) | words


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Batches with the same adapters at the same weights and the same subjects, of at most ``size`` images."""
    for _, group in itertools.groupby(jobs, key=lambda job: (list(job.active.items()), job.subjects)):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def save_new_image(image: Any, folder: Path, seed: int, settings: ImageSettings) -> Path:
    """Write an image as ``NNNN-seed.png`` with the next free number in ``folder``; other processes may do the same."""
    numbers = [int(match[1]) for f in folder.glob("*.png") if (match := re.match(r"(\d{4,9})-", f.name, re.ASCII))]
    names = (folder / f"{number:04d}-{seed}.png" for number in itertools.count(max(numbers, default=-1) + 1))
    return write_first_free(names, png_with_settings(image, settings))
