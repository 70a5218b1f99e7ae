"""What an adapter is shown in a lesson: images of one subject, or of several joined by ``+`` with a trigger each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...data.folder import SCORING_FOLDER
from ...errors import UserError
from ..examples import TRIGGER, scoring_scenes, subject_object, training_scenes
from ..world.render import render
from ..world.scenes import Scene
from ..world.vocabulary import RARE_WORDS, SUBJECTS, with_article

SHOWN_COUNTS = (3, 6)
"""Training images of each subject that a lesson may show."""


def members(subject: str) -> dict[str, str]:
    """The trigger of each subject of ``subject``: one folder name of ``examples/subjects``, or several joined by ``+``.

    Raises :class:`UserError` for unknown and repeated names, and for more than there are triggers.
    """
    slugs = subject.split("+")
    if unknown := [slug for slug in slugs if slug not in SUBJECTS]:
        raise UserError(f"the subject {unknown[0]!r} is unknown: choose among {', '.join(SUBJECTS)}")
    if len(set(slugs)) < len(slugs) or len(slugs) > len(RARE_WORDS):
        raise UserError(f"{subject!r}: join up to {len(RARE_WORDS)} different subjects")
    return dict(zip(slugs, RARE_WORDS, strict=False))


def scenes_of(subject: str, make: Callable[[str], list[Scene]]) -> list[tuple[str, Scene]]:
    """Each member's scenes, with the member's name, captioned with its own trigger."""
    return [
        (slug, replace(scene, caption=scene.caption.replace(TRIGGER, trigger)))
        for slug, trigger in members(subject).items()
        for scene in make(slug)
    ]


def shown_scenes(slug: str, count: int = 6) -> list[Scene]:
    """The training scenes of one subject; three of them are on a plain background, grass and a table."""
    return training_scenes(slug)[:: 6 // count]


def shown_prompt(subject: str) -> str:
    """The instance prompt: "a sks monster" of the first member. Captions replace it."""
    slug, trigger = next(iter(members(subject).items()))
    return with_article(f"{trigger} {subject_object(slug).class_word}")


def write_shown(subject: str, folder: Path, count: int = 6) -> None:
    """Write ``count`` training images of each member with their captions, and the images to score with."""
    for target, make in (
        (folder, lambda slug: shown_scenes(slug, count)),
        (folder / SCORING_FOLDER, scoring_scenes),
    ):
        target.mkdir(parents=True, exist_ok=True)
        for i, (_, scene) in enumerate(scenes_of(subject, make)):
            Image.fromarray(render(scene)).save(target / f"{i}.png", optimize=True)
            (target / f"{i}.txt").write_text(scene.caption + "\n")
