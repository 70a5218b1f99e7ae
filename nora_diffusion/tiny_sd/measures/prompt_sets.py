"""What a trained adapter is asked for: sets of ten scenes of a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from ..examples import SCORING_KINDS, TRIGGER, contrasting_colors, instance_prompt, subject_object, subject_scene
from ..world import vocabulary as world
from ..world.scenes import Background, Scene, SceneObject
from ..world.vocabulary import with_article
from .shown import scenes_of

NEW_KINDS = (*SCORING_KINDS, "sky", "night", "sunset")
"""Backgrounds that are not in the training images."""
HATS = tuple(name for name in world.ACCESSORIES if name != "sunglasses")
"""The accessories that every subject can wear: not all have eyes."""
BESIDE = ("puppy", "sedan", "apple")
"""Known objects to stand beside a subject, called by their class words."""


def new_scenes(slug: str) -> list[Scene]:
    """The subject alone on ten backgrounds that are not in its training images."""
    backgrounds = [*map(Background, NEW_KINDS), Background("solid", contrasting_colors(slug)[2])]
    return [subject_scene(slug, background, jitter=0) for background in backgrounds]


def companion_scenes(slug: str) -> list[Scene]:
    """The subject with one of four hats, beside a tree or another object, or two or three of it: none was trained."""
    subject, word = subject_object(slug), subject_object(slug).class_word
    prompt, plain = instance_prompt(slug), Background("solid", contrasting_colors(slug)[2])
    places = [plain, *map(Background, NEW_KINDS)]
    others = [SceneObject(name) for name in BESIDE if world.class_word_of(name) != word][:2]
    scenes = [_scene(subject, f"{prompt} wearing {with_article(hat)}", accessory=hat) for hat in HATS]
    scenes += [_scene(subject, f"{prompt} next to a tree", tree=True) for _ in range(2)]
    for other in others:
        scene = _scene(subject, f"{prompt} next to {with_article(other.class_word)}")
        scenes.append(replace(scene, objects=(subject, other)))
    for count, number in world.NUMBERS.items():
        scene = _scene(subject, f"{number} {TRIGGER} {world.plural(word)}")
        scenes.append(replace(scene, objects=(subject,) * count))
    return [
        replace(scene, background=place, caption=f"{scene.caption} {place.phrase}")
        for scene, place in zip(scenes, places, strict=True)
    ]


def class_scenes(slug: str) -> list[Scene]:
    """The new scenes by the class word alone, without the trigger: what the base drew there should not change."""
    return [replace(scene, caption=scene.caption.replace(f"{TRIGGER} ", "")) for scene in new_scenes(slug)]


def _scene(subject: SceneObject, caption: str, accessory: str = "", tree: bool = False) -> Scene:
    return Scene((subject,), Background("solid", "white"), caption, 0, accessory=accessory, tree=tree)


PROMPT_SETS: Mapping[str, Callable[[str], list[Scene]]] = MappingProxyType(
    {"scenes": new_scenes, "companions": companion_scenes, "class": class_scenes}
)
"""The sets by name. All generate the subject of a lesson; the last one only by its class word."""


def asked(name: str, subject: str) -> list[tuple[str, Scene]]:
    """The scenes of a set with the member that each shows, for one subject or several joined by ``+``."""
    return scenes_of(subject, PROMPT_SETS[name])
