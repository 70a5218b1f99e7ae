"""``python -m nora_diffusion.tiny_sd.evaluate``: scores and fixed-seed images of the embedded base."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..io.files import write_atomic
from ..pipelines.base import EMBEDDED_WEIGHTS, open_pipeline
from ..programs import program, run_program
from ..quiet import hide_known_warnings
from ..reports.sheets import contact_sheet
from ..scoring.judges import Judge, image_features, load_judge, text_features
from .measures.following import measure
from .measures.probes import heldout_images
from .measures.prompt_sets import new_scenes
from .recipe.stage_vae import to_tensor
from .world.render import sample
from .world.scenes import TEST_SEED

BATCH = 12
PROMPTS = (
    "a fox in the snow",
    "a koala on a blue background",
    "a red monster in the grass",
    "a rose on a yellow background",
    "an owl at night",
    "a green mug on a wooden table",
    "a sedan on the road",
    "a sailboat in the sea",
    "a kitten wearing a top hat on a pink background",
    "a puppy wearing a crown in the grass",
    "a strawberry on a white and black checkered background",
    "a donut on a red and white striped background",
    "two birds in the snow",
    "three fruits on a wooden table",
    "a fox next to a tree in the grass",
    "a lion in the desert",
    "a blue cat on the beach",
    "a small turtle on a purple background on the left",
    "a firetruck in front of a brick wall",
    "a cottage in the mountains",
    "a whale in the sea",
    "a purple robot in the forest",
    "a basketball on an orange and blue dotted background",
    "a chick at sunset",
)


def generate(pipe: Any, prompts: list[str], seed: int = 0) -> np.ndarray:
    """One image for each prompt: uint8 (N, 64, 64, 3). Image ``i`` has the seed ``seed + i``."""
    from ..generation.sampling import sample_images  # late: its imports log what main() silences first
    from ..generation.settings import Sampling

    images: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        seeds = range(seed + start, seed + start + len(batch))
        images += map(np.asarray, sample_images(pipe, batch, seeds, Sampling.for_base(None)))
    return np.stack(images)


def seconds_for_four(pipe: Any, times: int = 3) -> float:
    """Median time of generating four images with guidance, after one warm-up."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        generate(pipe, list(PROMPTS[:4]))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def as_images(arrays: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, 3) to a list of images."""
    return [Image.fromarray(array) for array in arrays]


def sheet(arrays: np.ndarray, captions: list[str] | None = None, columns: int = 8) -> Image.Image:
    """Images in rows of ``columns``, with their captions below."""
    cells = [(image, captions[i] if captions else "") for i, image in enumerate(as_images(arrays))]
    return contact_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


@torch.no_grad()
def vae_report(vae: Any, count: int = 128) -> tuple[float, np.ndarray]:
    """PSNR (dB, mean over images) on unseen scenes; and originals above their reconstructions, for :func:`sheet`."""
    images = np.stack([sample(TEST_SEED, i)[0] for i in range(count)])
    x = to_tensor(images)
    y = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in x.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))
    decoded = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return psnr.mean().item(), np.concatenate([images[:8], decoded[:8], images[8:16], decoded[8:16]])


def judge_top1(judge: Judge, count: int = 512, among: int = 64) -> float:
    """Share of unseen scenes whose own caption scores highest among ``among`` captions."""
    hits = 0
    for start in range(0, count, among):
        pairs = [sample(TEST_SEED, 10_000 + start + i) for i in range(among)]
        captions = [caption for _, caption in pairs]
        images = [Image.fromarray(array) for array, _ in pairs]
        scores = image_features(judge, images) @ text_features(judge, captions).T
        hits += sum(captions[int(j)] == captions[i] for i, j in enumerate(scores.argmax(1)))
    return hits / count


def subject_auc(judge: Judge, each: int = 8) -> float:
    """P(a pair of one subject scores above a pair of two), for held-out subjects on random backgrounds."""
    names, arrays = heldout_images(TEST_SEED, each)
    features = image_features(judge, as_images(arrays))
    scores = (features @ features.T).numpy()
    subject = np.array(names)
    upper = np.triu(np.ones_like(scores, dtype=bool), 1)
    same = subject[:, None] == subject[None, :]
    positive, negative = scores[upper & same], np.sort(scores[upper & ~same])
    return float(np.searchsorted(negative, positive).mean() / len(negative))


def evaluate(weights: Path, images: Path | None, prompts: int = 0) -> dict[str, float]:
    """All scores of the base. Writes ``base_grid.png`` and ``base_vae.png`` to the folder ``images`` if given.

    ``prompts``: number of unseen captions for the independent probe (0: leave it out).
    """
    pipe = open_pipeline(weights / "pipeline")
    psnr, rows = vae_report(pipe.vae)
    report = {"vae_psnr_db": psnr, "seconds_for_4_pictures": seconds_for_four(pipe)}
    generated = generate(pipe, list(PROMPTS))
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        sheet(generated, list(PROMPTS)).save(images / "base_grid.png", optimize=True)
        sheet(rows).save(images / "base_vae.png", optimize=True)
    if (weights / "judge").exists():
        judge = load_judge(weights / "judge")
        scores = image_features(judge, as_images(generated)) @ text_features(judge, PROMPTS).T
        n = len(PROMPTS)
        report |= {
            "judge_top1_of_64": judge_top1(judge),
            "judge_subject_auc": subject_auc(judge),
            "clip_own_prompt": scores.diag().mean().item(),
            "clip_other_prompts": (scores.sum() - scores.diag().sum()).item() / (n * (n - 1)),
            "generated_top1_of_24": (scores.argmax(1) == torch.arange(n)).float().mean().item(),
        }
    if prompts:
        report |= measure(weights, lambda captions: generate(pipe, captions), prompts).report()
    return {k: round(v, 4) for k, v in report.items()}


def evaluate_teaching(weights: Path, images: Path | None) -> dict[str, float]:
    """LoRA, NoRA and the plain base on held-out subjects (takes minutes); ``base_taught.png`` goes to ``images``."""
    from .measures.classroom import teach_all  # late, as in generate()

    report, lessons = teach_all(weights)
    if images is not None:
        rows = [
            [(image, s.caption) for image, s in zip(lesson.images["scenes"], new_scenes(lesson.subject), strict=True)]
            for lesson in lessons
        ]
        titles = [
            f"{lesson.method}, {lesson.subject}: subject right {lesson.scores['subject_right']:.0%}, "
            f"background right {lesson.scores['background_right']:.0%}, trained in {lesson.seconds:.0f} s"
            for lesson in lessons
        ]
        contact_sheet(rows, titles).save(images / "base_taught.png", optimize=True)
    return {k: round(v, 4) for k, v in report.items()}


@program
def main() -> int:
    """Measure the embedded base and print the scores as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS, help="folder of the base (default: shipped)")
    parser.add_argument("--images", type=Path, help="folder to write contact sheets to (default: none)")
    parser.add_argument("--report", type=Path, help="JSON file to write the scores to (default: none)")
    parser.add_argument("--prompts", type=int, default=200,
                        help="unseen captions for the probe, 0 to leave it out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--teach", action="store_true", help="also train adapters on four held-out subjects (minutes)")
    args = parser.parse_args()
    hide_known_warnings()
    report = evaluate(args.weights, args.images, args.prompts)
    if args.teach:
        report |= evaluate_teaching(args.weights, args.images)
    print(json.dumps(report, indent=1))
    if args.report:
        write_atomic(args.report, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)
