"""The subjects of an evaluation: real images of them, and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import read_images, read_source
from ..data.captions import with_article
from ..data.images import Pixels, SourceImage
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo

DESCRIPTION = "subject.json"

# The prompts of DreamBooth (arXiv 2208.12242): "{}" is the subject with its article, "{noun}" without.
SCENES = (
    "{} in the jungle", "{} in the snow", "{} on the beach", "{} on a cobblestone street", "{} on top of pink fabric",
    "{} on top of a wooden floor", "{} with a city in the background", "{} with a mountain in the background",
    "{} with a blue house in the background", "{} on top of a purple rug in a forest",
)  # fmt: skip
CHANGES = ("a red {noun}", "a purple {noun}", "a shiny {noun}", "a wet {noun}", "a cube shaped {noun}")
PROMPTS = {
    "object": (
        *SCENES, "{} with a wheat field in the background", "{} with a tree and autumn leaves in the background",
        "{} with the Eiffel Tower in the background", "{} floating on top of water", "{} floating in an ocean of milk",
        "{} on top of green grass with sunflowers around it", "{} on top of a mirror",
        "{} on top of the sidewalk in a crowded street", "{} on top of a dirt road", "{} on top of a white rug",
        *CHANGES,
    ),
    "live": (
        *SCENES, "{} wearing a red hat", "{} wearing a santa hat", "{} wearing a rainbow scarf",
        "{} wearing a black top hat and a monocle", "{} in a chef outfit", "{} in a firefighter outfit",
        "{} in a police outfit", "{} wearing pink glasses", "{} wearing a yellow shirt", "{} in a purple wizard outfit",
        *CHANGES,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class EvaluatedSubject:
    """A subject: its name, real images to compare with, prompt templates, and its phrases if known.

    ``phrase`` names it with the trigger word ("a sks mug"), ``class_phrase`` without ("a mug"). ``held_out``: images
    that are known not to be trained on.
    """

    name: str
    references: Sequence[Image.Image]
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

    ``prompts``: ``object``, ``live`` or a text file with one template per line. Raises :class:`UserError`.
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


def read_templates(prompts: str) -> tuple[str, ...]:
    """The templates named ``object`` or ``live``, or those of a text file. Raises :class:`UserError`."""
    if prompts in PROMPTS:
        return PROMPTS[prompts]
    try:
        lines = Path(prompts).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompts!r} is not a text file of prompts: give one, or 'object' or 'live'") from error
    templates = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not templates:
        raise UserError(f"{prompts} has no prompts: write one per line, such as '{{}} on the beach'")
    for template in templates:
        if "{}" not in template and "{noun}" not in template:
            raise UserError(f"{prompts}: {template!r} has no placeholder for the subject: write '{{}} on the beach'")
    return templates
