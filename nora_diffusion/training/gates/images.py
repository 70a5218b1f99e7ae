"""The images from which gates are learned, where only prompts are given: drawn by the base with the adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...data.captions import has_word
from ...errors import UserError
from ...formats.adapter_file import inspect_adapter
from ...formats.hub import locate
from ...generation.addresses import parse_adapter
from ...generation.generate import GenerateConfig, generate
from ...generation.settings import Sampling
from ...io.files import write_atomic
from ...pipelines.base import BaseSource


def draw(folder: Path, adapters: Sequence[str], prompts: Sequence[str], num: int, seed: int, source: BaseSource) -> int:
    """Draw the missing images of ``num`` for each prompt into ``folder``, with captions; return their number.

    A prompt that names the subjects of one or several adapters is drawn by these alone, and several are kept apart as
    :func:`.apart.subjects_apart` does; any other is drawn by all. So gates learn to do without regions what is right
    with them. The seeds depend on the prompt's number only, so that an interrupted drawing goes on.
    Raises :class:`UserError` for a folder with images of other prompts.
    """
    for number, prompt in enumerate(prompts):
        caption = _file(folder, number, 0).with_suffix(".txt")
        if caption.exists() and caption.read_text(encoding="utf-8") != prompt:
            raise UserError(f"{folder} holds images of other prompts: choose another output folder")
    todo = [number for number in range(len(prompts)) if not _file(folder, number, num - 1).exists()]
    groups: dict[tuple[str, ...], list[int]] = {}
    for number in todo:
        groups.setdefault(named(prompts[number], adapters), []).append(number)
    for active, numbers in groups.items():
        for number, files in _drawn(folder / "drawing", active, [(n, prompts[n]) for n in numbers], num, seed, source):
            for position, file in enumerate(files):
                target = _file(folder, number, position)
                write_atomic(target.with_suffix(".txt"), prompts[number])
                file.replace(target)
    shutil.rmtree(folder / "drawing", ignore_errors=True)
    return len(todo) * num


def _file(folder: Path, number: int, position: int) -> Path:
    return folder / f"{number:03d}-{position:02d}.png"


def _drawn(
    folder: Path, adapters: Sequence[str], prompts: Sequence[tuple[int, str]], num: int, seed: int, source: BaseSource
) -> Iterator[tuple[int, list[Path]]]:
    config = GenerateConfig(
        [text for _, text in prompts], Sampling.for_base(source.base), source, list(adapters), num=num,
        seed=seed, out=str(folder),
    )  # fmt: skip
    files = generate(config)
    for position, (number, _) in enumerate(prompts):
        yield number, files[position * num : (position + 1) * num]


def named(prompt: str, adapters: Sequence[str]) -> tuple[str, ...]:
    """The adapters whose trigger is in a prompt; all if none is."""
    found = [a for a in adapters if (trigger := _trigger(a)) and has_word(prompt, trigger)]
    return tuple(found or adapters)


def _trigger(adapter: str) -> str:
    path, _ = parse_adapter(adapter)
    return inspect_adapter(locate(path), hashed=False).trigger
