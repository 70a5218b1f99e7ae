"""The subjects of an evaluation: real images of them, and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import read_images, read_source
from ..data.captions import with_article
from ..data.images import Pixels, SourceImage
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
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
    own = tuple(map(str, values.get("demo_prompts", ())))
    templates = read_templates(prompts) if prompts else own or PROMPTS["object"]
    names = [str(name) for name in values.get("heldout", ())]
    held_out = [read_source(folder / name) for name in names]
    return EvaluatedSubject(
        folder.resolve().name, Pixels(held_out or read_images(folder)), templates,
        str(values.get("instance_prompt", "")), str(values.get("class_prompt", "")), held_out,
    )  # fmt: skip


def _description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"there is no subject at {folder}: give a folder of photos, such as examples/subjects/tiger")
    file = folder / DESCRIPTION
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON: repair or remove it") from error
    if not isinstance(values, dict) or bool(values.get("instance_prompt")) != bool(values.get("class_prompt")):
        raise UserError(f'{file} must be an object with both "instance_prompt" and "class_prompt", or neither')
    return values
