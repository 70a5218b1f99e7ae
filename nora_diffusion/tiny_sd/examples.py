"""The example subjects, rendered: six images each to train on, eight to score with.

``python -m nora_diffusion.tiny_sd.examples --out examples/subjects`` writes the same files every time.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.folder import SCORING_FOLDER
from ..programs import program, run_program
from .world import vocabulary as world
from .world.render import cut_out, render
from .world.scenes import Background, Scene, SceneObject
from .world.vocabulary import with_article

TRIGGER = "sks"
TRAINING_KINDS = ("grass", "beach", "table", "snow")
SCORING_KINDS = ("forest", "desert", "mountains", "road", "wall", "sea")
DEMO_PROMPTS = (  # {} is the subject, %s one or two colors
    "{} at night",
    "{} at sunset",
    "{} wearing a top hat on %s background",
    "{} wearing a crown in the forest",
    "{} on %s striped background",
    "{} next to a tree in the mountains",
)


def subject_object(slug: str) -> SceneObject:
    """The held-out object of a subject. Raises KeyError for an unknown name."""
    name, color = world.SUBJECTS[slug]
    return SceneObject(world.HELDOUT_VARIANTS.get(name, name), color)


def instance_prompt(slug: str) -> str:
    """The trigger and the class word, for example "a sks monster"."""
    return f"a {TRIGGER} {subject_object(slug).class_word}"


@cache
def contrasting_colors(slug: str) -> tuple[str, ...]:
    """Color words by contrast with the subject, strongest first."""
    pixels = np.asarray(cut_out(subject_object(slug)).convert("RGBA")).reshape(-1, 4).astype(float)
    mean = pixels[pixels[:, 3] > 128, :3].mean(0)
    distance = {c: float(np.abs(np.array(rgb) - mean).sum()) for c, rgb in world.COLORS.items()}
    own = world.SUBJECTS[slug][1]
    return tuple(sorted((c for c in distance if c != own), key=lambda c: -distance[c]))


def subject_scene(slug: str, background: Background, jitter: int) -> Scene:
    """The subject alone on that background, captioned with the trigger and its class word."""
    return Scene((subject_object(slug),), background, f"{instance_prompt(slug)} {background.phrase}", jitter)


def training_scenes(slug: str) -> list[Scene]:
    """Six scenes to train on."""
    a, b = contrasting_colors(slug)[:2]
    backgrounds = [Background("solid", a), Background("solid", b), *map(Background, TRAINING_KINDS)]
    return [subject_scene(slug, background, 1000 + i) for i, background in enumerate(backgrounds)]


def scoring_scenes(slug: str) -> list[Scene]:
    """Eight reference scenes to score generated images with, on backgrounds that are not in the training scenes."""
    a, _, c, d = contrasting_colors(slug)[:4]
    backgrounds = [Background("solid", c), Background("dotted", d, a), *map(Background, SCORING_KINDS)]
    return [subject_scene(slug, background, 1100 + i) for i, background in enumerate(backgrounds)]


def demo_prompts(slug: str) -> list[str]:
    """Six prompts with backgrounds and accessories that are not in the training scenes; "{}" is the subject."""
    colors = contrasting_colors(slug)
    plain, striped = with_article(colors[4]), f"{with_article(colors[3])} and {colors[4]}"
    return [p % (striped if "striped" in p else plain) if "%s" in p else p for p in DEMO_PROMPTS]


def write_subject(slug: str, folder: Path) -> None:
    """Write one subject's images, captions and ``subject.json``."""
    scoring = scoring_scenes(slug)
    for target, scenes in ((folder, training_scenes(slug)), (folder / SCORING_FOLDER, scoring)):
        target.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(scenes):
            Image.fromarray(render(scene)).save(target / f"{i}.png", optimize=True)
            (target / f"{i}.txt").write_text(scene.caption + "\n")
    name, color = world.SUBJECTS[slug]
    class_word = subject_object(slug).class_word
    info = {
        "name": slug,
        "class_word": class_word,
        "object": name,
        "colour": color,
        "trigger": TRIGGER,
        "instance_prompt": instance_prompt(slug),
        "class_prompt": f"a {class_word}",
        "heldout": [f"{SCORING_FOLDER}/{i}.png" for i in range(len(scoring))],
        "demo_prompts": demo_prompts(slug),
        "license": "SIL-OFL-1.1 (Noto Color Emoji)" if name not in world.HELDOUT_VARIANTS else "Apache-2.0",
    }
    (folder / "subject.json").write_text(json.dumps(info, indent=1) + "\n")


@program
def main() -> int:
    """Write the images, captions and descriptions of all example subjects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("examples/subjects"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args()
    for slug in world.SUBJECTS:
        write_subject(slug, args.out / slug)
    print(f"Wrote {len(world.SUBJECTS)} subjects to {args.out}.")
    return 0


if __name__ == "__main__":
    run_program(main)
