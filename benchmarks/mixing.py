"""The image and the tables of docs/mixing.md: two subjects mixed in every mode, and how much adapters overlap.

    python benchmarks/mixing.py [--work outputs/mixing] [--picture docs/images/mixing.png] [--steps N]

Trains adapters of example subjects on the embedded base with the defaults of `nora-diffusion train`; those that are in
``--work`` already are not trained again. Takes about 15 minutes on one core. The first table has a row per variant:

- *rank*, *error*: of the mix, as :func:`nora_diffusion.mix` reports them;
- *mug*, *monster*: subject scores of the tiny CLIP over four scenes.

The second table groups pairs of adapters (same or different subject, seed and method), and has the lowest and the
highest *overlap* in each group.
"""

from __future__ import annotations

import argparse
import io
from itertools import combinations
from pathlib import Path
from typing import Any

from nora_diffusion import load_adapter, load_base, mix, overlap_files, set_adapters, train
from nora_diffusion.composition.modes import MODES
from nora_diffusion.demo import open_example
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.io.files import write_atomic
from nora_diffusion.reports.sheets import contact_sheet
from nora_diffusion.scoring.judges import load_judge, subject_score
from nora_diffusion.training import TrainConfig

SUBJECTS = ("stripemug-red", "cyclops-purple")
RUNS = [("nora", slug, seed) for slug, seed in [
    ("stripemug-red", 0), ("stripemug-red", 1), ("cyclops-purple", 0), ("cyclops-purple", 1), ("tiger", 0)
]] + [("lora", "stripemug-red", 0), ("lora", "stripemug-red", 1), ("lora", "cyclops-purple", 0)]  # fmt: skip
WEIGHT = 0.8
RANK = 16
SCENES = ("{} in the forest", "{} at night", "{} on the beach", "{} in the snow")


def folder(work: Path, method: str, slug: str, seed: int) -> Path:
    return work / f"{slug}-{method}-{seed}"


def learn(target: Path, method: str, slug: str, seed: int, steps: int | None) -> None:
    """Train one adapter, unless it exists."""
    if (target / "nora_adapter.safetensors").is_file():
        return
    example = open_example(slug)
    train(TrainConfig(
        instance_data_dir=str(example.folder), instance_prompt=example.phrase, use_captions=True, method=method,
        class_word=example.class_word, output_dir=str(target), seed=seed, max_train_steps=steps,
    ))  # fmt: skip


def overlaps(work: Path) -> list[str]:
    """Table rows: groups of pairs, with the lowest and the highest overlap."""
    groups: dict[str, list[float]] = {}
    for one, two in combinations(RUNS, 2):
        subject = "one subject" if one[1] == two[1] else "two subjects"
        seeds = "one seed" if one[2] == two[2] else "two seeds"
        group = f"{subject}, {seeds}" if one[0] == two[0] else f"NoRA and LoRA, {subject}"
        overlap = overlap_files(folder(work, *one), folder(work, *two))
        groups.setdefault(group, []).append(overlap.score)
    ranked = sorted(groups.items(), key=lambda item: -max(item[1]))
    return [f"| {group} | {len(scores)} | {min(scores):.3f} to {max(scores):.3f} |" for group, scores in ranked]


def variants(pipe: Any) -> dict[str, Any]:
    """The rows of the first table, each with a function that activates it: one subject, both active, every mode."""

    def both() -> None:
        set_adapters(pipe, ["one", "two"], [WEIGHT, WEIGHT])

    def by_mode(mode: Any) -> Any:
        return lambda: mix(pipe, {"one": WEIGHT, "two": WEIGHT}, mode, f"by_{mode}", rank=RANK)

    alone = {"mug alone": lambda: set_adapters(pipe, "one"), "monster alone": lambda: set_adapters(pipe, "two")}
    return {**alone, "both active": both, **{mode: by_mode(mode) for mode in MODES}}


def picture(work: Path, target: Path) -> list[str]:
    """Write the image of both subjects in every variant; return the rows of the first table."""
    pipe, judge, rows, columns = load_base(), load_judge(), [], []
    examples = [open_example(slug) for slug in SUBJECTS]
    for name, slug in zip(("one", "two"), SUBJECTS, strict=True):
        load_adapter(pipe, folder(work, "nora", slug, 0), name)
    for title, prepare in variants(pipe).items():
        report = prepare()
        scores, cells = [], []
        for example in examples:
            prompts = [scene.format(example.phrase) for scene in SCENES]
            images = sample_images(pipe, prompts, list(range(len(prompts))), Sampling.for_base(None))
            scores.append(subject_score(judge, images, example.heldout_images()))
            cells += [(image, title.replace("_", " ")) for image in images[:2]]
        columns.append(cells)
        error = f"{report.rank} | {report.error:.1%}" if report else " | "
        rows.append(f"| {title} | {error} | {scores[0]:.3f} | {scores[1]:.3f} |")
    titles = [scene.format(example.phrase) for example in examples for scene in SCENES[:2]]
    sheet = contact_sheet([list(row) for row in zip(*columns, strict=True)], titles, side=96)
    buffer = io.BytesIO()
    sheet.quantize(192).save(buffer, "PNG", optimize=True)
    write_atomic(target, buffer.getvalue())
    return rows


def main() -> None:
    """Train, write the image and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/mixing"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/mixing.png"))
    parser.add_argument("--steps", type=int, help="training steps (default: the trainer's)")
    args = parser.parse_args()
    for method, slug, seed in RUNS:
        learn(folder(args.work, method, slug, seed), method, slug, seed, args.steps)
    print("| variant | rank | error | mug | monster |\n| --- | --- | --- | --- | --- |")
    print("\n".join(picture(args.work, args.picture)))
    print("\n| pairs | number | overlap |\n| --- | --- | --- |")
    print("\n".join(overlaps(args.work)))


if __name__ == "__main__":
    main()
