"""The subjects of an evaluation: real images of them, and prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from ..data import read_images, read_source
from ..data.captions import with_article
from ..data.images import Pixels, SourceImage
from ..errors import UserError, first_line
from ..formats.adapter_info import AdapterInfo
from ..io.untrusted import conform, parse_json
from .prompts import PROMPTS, read_templates

DESCRIPTION = "subject.json"


@dataclass(frozen=True)
class EvaluatedSubject:
    """A subject: its name, real images to compare with, prompt templates, and its phrases if known.

    ``phrase`` names it with the trigger word ("a sks mug"), ``class_phrase`` without ("a mug"). ``held_out``: images
    that are known not to be trained on.
    """

    name: str
    references: Pixels
    templates: tuple[str, ...]
    phrase: str = ""
    class_phrase: str = ""
    held_out: Sequence[SourceImage] = ()

    def phrases(self, adapters: Sequence[AdapterInfo]) -> tuple[str, str]:
        """``(phrase, class_phrase)``: the subject's own, else from the first adapter that records its class word.

        Raises :class:`UserError` if none does.
        """
        if self.phrase:
            return self.phrase, self.class_phrase
        for info in adapters:
            if info.class_word:
                return with_article(f"{info.trigger} {info.class_word}".strip()), with_article(info.class_word)
        raise UserError(
            f"the subject {self.name!r} has no trigger and class word: train with --trigger and --class_word, or put "
            f'a {DESCRIPTION} with "instance_prompt" and "class_prompt" beside its photos'
        )


def read_subject(folder: Path, prompts: str | None = None) -> EvaluatedSubject:
    """A folder of photos as a subject; a ``subject.json`` in it gives its phrases, prompts and held-out images.

    ``prompts``: the name of a list in :data:`.prompts.PROMPTS`, or a text file with one template per line. Raises
    :class:`UserError`.
    """
    values = _description(folder)
    templates = read_templates(prompts) if prompts else values.demo_prompts or PROMPTS["object"]
    held_out = [read_source(folder / name) for name in values.heldout]
    return EvaluatedSubject(
        Path(os.path.abspath(folder)).name, Pixels(held_out or read_images(folder)), tuple(templates),  # noqa: PTH100
        values.instance_prompt, values.class_prompt, held_out,
    )  # fmt: skip


@dataclass(frozen=True)
class _Description:
    """What an evaluation reads of a ``subject.json``, which may hold more."""

    instance_prompt: str = ""
    class_prompt: str = ""
    demo_prompts: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def _description(folder: Path) -> _Description:
    if not folder.is_dir():
        raise UserError(f"there is no subject at {folder}: give a folder of photos, such as examples/subjects/tiger")
    file = folder / DESCRIPTION
    if not file.is_file():
        return _Description()
    try:
        values = parse_json(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        hints = get_type_hints(_Description)
        found = _Description(**{key: conform(values[key], hints[key], key, 0) for key in hints if key in values})
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid ({first_line(error)}): repair or remove it") from error
    if bool(found.instance_prompt) != bool(found.class_prompt):
        raise UserError(f'{file} must be an object with both "instance_prompt" and "class_prompt", or neither')
    if outside := [name for name in found.heldout if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{file} names the held-out image {outside[0]!r}, which is not in its folder: correct it")
    return found
