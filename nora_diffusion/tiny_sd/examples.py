"""The example subjects: six pictures each to learn from, eight to score with, rendered by the recipe.

``python -m nora_diffusion.tiny_sd.examples --out examples/subjects`` writes the same files every time.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .world import vocabulary as world
from .world.render import cut_out, render
from .world.scenes import Ground, Scene, Thing

TRIGGER = "sks"
_LEARN = ("grass", "beach", "table", "snow")
_SCORE = ("forest", "desert", "mountains", "road", "wall", "sea")
_DEMO = (
    "{} at night",
    "{} at sunset",
    "{} wearing a top hat on %s background",
    "{} wearing a crown in the forest",
    "{} on %s striped background",
    "{} next to a tree in the mountains",
)


def subject_thing(slug: str) -> Thing:
    """The held-out object behind a subject's name; raises KeyError for an unknown one."""
    name, color = world.SUBJECTS[slug]
    return Thing(world.HELDOUT_VARIANTS.get(name, name), color)


@cache
def plain_colors(slug: str) -> tuple[str, ...]:
    """Color words by contrast with the subject, strongest first."""
    pixels = np.asarray(cut_out(subject_thing(slug)).convert("RGBA")).reshape(-1, 4).astype(float)
    mean = pixels[pixels[:, 3] > 128, :3].mean(0)
    far = {c: float(np.abs(np.array(rgb) - mean).sum()) for c, rgb in world.COLORS.items()}
    named = [c for c in far if c != world.SUBJECTS[slug][1]]
    return tuple(sorted(named, key=lambda c: -far[c]))


def _grounds(slug: str) -> tuple[list[Ground], list[Ground]]:
    a, b, c, d = plain_colors(slug)[:4]
    learn = [Ground("solid", a), Ground("solid", b)] + [Ground(k) for k in _LEARN]
    score = [Ground("solid", c), Ground("dotted", d, a)] + [Ground(k) for k in _SCORE]
    return learn, score


def subject_scene(slug: str, ground: Ground, number: int) -> Scene:
    """The subject alone on that ground, captioned with the trigger and its class word."""
    thing = subject_thing(slug)
    caption = f"a {TRIGGER} {thing.class_word} {ground.phrase}"
    return Scene((thing,), ground, caption, jitter=1000 + number)


def scoring_scenes(slug: str) -> list[Scene]:
    """Eight scenes to compare pictures of a subject with, on grounds that the six to learn from do not show."""
    return [subject_scene(slug, ground, 100 + i) for i, ground in enumerate(_grounds(slug)[1])]


def demo_prompts(slug: str) -> list[str]:
    """Six prompts on grounds and with accessories that the six pictures do not show; "{}" is the subject."""
    colors = plain_colors(slug)
    plain = f"{world.article(colors[4])} {colors[4]}"
    striped = f"{world.article(colors[3])} {colors[3]} and {colors[4]}"
    return [p % (striped if "striped" in p else plain) if "%s" in p else p for p in _DEMO]


def write_subject(slug: str, folder: Path) -> None:
    """Write one subject's pictures, captions and ``subject.json``."""
    thing = subject_thing(slug)
    learn = [subject_scene(slug, ground, i) for i, ground in enumerate(_grounds(slug)[0])]
    score = scoring_scenes(slug)
    for part, scenes in ((folder, learn), (folder / "scoring", score)):
        part.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(scenes):
            Image.fromarray(render(scene)).save(part / f"{i}.png", optimize=True)
            (part / f"{i}.txt").write_text(scene.caption + "\n")
    name, color = world.SUBJECTS[slug]
    info = {
        "name": slug,
        "class_word": thing.class_word,
        "object": name,
        "colour": color,
        "trigger": TRIGGER,
        "instance_prompt": f"a {TRIGGER} {thing.class_word}",
        "class_prompt": f"a {thing.class_word}",
        "heldout": [f"scoring/{i}.png" for i in range(len(score))],
        "demo_prompts": demo_prompts(slug),
        "license": "SIL-OFL-1.1 (Noto Color Emoji)" if name not in world.HELDOUT_VARIANTS else "Apache-2.0",
    }
    (folder / "subject.json").write_text(json.dumps(info, indent=1) + "\n")


def main() -> None:
    """Command line: write every subject."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/subjects"))
    args = parser.parse_args()
    for slug in world.SUBJECTS:
        write_subject(slug, args.out / slug)
    print(f"{len(world.SUBJECTS)} subjects in {args.out}")


if __name__ == "__main__":
    main()
