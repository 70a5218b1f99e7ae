"""Prompt templates: "{}" is the subject with its article, "{noun}" without.

``object`` and ``live`` are the lists of DreamBooth (arXiv 2208.12242). ``extended`` is a list of our own with the kinds
and levels of DreamBench++ (arXiv 2406.16855).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.files import read_text

SCENES = (
    "{} in the jungle", "{} in the snow", "{} on the beach", "{} on a cobblestone street", "{} on top of pink fabric",
    "{} on top of a wooden floor", "{} with a city in the background", "{} with a mountain in the background",
    "{} with a blue house in the background", "{} on top of a purple rug in a forest",
)  # fmt: skip
CHANGES = ("a red {noun}", "a purple {noun}", "a shiny {noun}", "a wet {noun}", "a cube shaped {noun}")
EXTENDED = {
    "photorealistic, easy": ("a photo of {} on a kitchen table", "a photo of {} on a park bench"),
    "photorealistic, medium": (
        "a photo of {} beside a window with raindrops at dusk",
        "a photo of {} half hidden behind ferns in a greenhouse",
    ),
    "photorealistic, hard": (
        "a photo of three people looking at {} in a museum",
        "a photo of {} and its reflection in a puddle, with a red bus behind it",
    ),
    "style, easy": ("a pencil sketch of {}", "a watercolor painting of {}"),
    "style, medium": ("a woodcut print of {} under a full moon", "a stained glass window that shows {}"),
    "style, hard": (
        "a low-poly 3D model of {} in the colors of a sunset",
        "a page of a comic book in which {} appears twice",
    ),
    "imaginative, easy": ("{} floating in space", "a giant {noun} between skyscrapers"),
    "imaginative, medium": ("{} folded from paper", "{} as the figurehead of a pirate ship"),
    "imaginative, hard": ("{} that casts the shadow of a dragon on a castle wall", "a tiny city on the back of {}"),
}
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
    "extended": tuple(template for templates in EXTENDED.values() for template in templates),
}  # fmt: skip
KINDS = {template: kind for kind, templates in EXTENDED.items() for template in templates}
"""The kind and level of each prompt of ``extended``."""


def read_templates(prompts: str) -> tuple[str, ...]:
    """The templates of a list in :data:`PROMPTS`, or those of a text file. Raises :class:`UserError`."""
    if prompts in PROMPTS:
        return PROMPTS[prompts]
    try:
        lines = read_text(Path(prompts).expanduser()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        names = "'object', 'live' or 'extended'"
        raise UserError(f"{prompts!r} is not a text file of prompts: give one, or {names}") from error
    templates = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not templates:
        raise UserError(f"{prompts} has no prompts: write one per line, such as '{{}} on the beach'")
    for template in templates:
        if "{}" not in template and "{noun}" not in template:
            raise UserError(f"{prompts}: {template!r} has no placeholder for the subject: write '{{}} on the beach'")
    return templates
