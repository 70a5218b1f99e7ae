"""``python -m nora_diffusion.tiny_sd.evaluate``: numbers and fixed-seed pictures of the shipped base."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.base import EMBEDDED_GUIDANCE, EMBEDDED_WEIGHTS
from ..quiet import hush
from ..reports.sheets import contact_sheet
from ..scoring.judges import Judge, image_features, load_judge, text_features
from .measures.following import measure
from .measures.teaching import heldout_pictures, new_scenes, teach_all
from .recipe.stage_vae import to_tensor
from .world.render import sample

TEST_SEED = 900_001  # no training stage draws from it
STEPS = 20
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
    """One picture a prompt: uint8 (N, 64, 64, 3); the i-th takes the seed ``seed + i``."""
    out = []
    for start in range(0, len(prompts), 12):
        part = prompts[start : start + 12]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        out.append(
            pipe(
                part,
                num_inference_steps=STEPS,
                guidance_scale=EMBEDDED_GUIDANCE,
                height=64,
                width=64,
                generator=generators,
                output_type="np",
            ).images
        )
    return (np.concatenate(out) * 255).round().astype(np.uint8)


def seconds_for_four(pipe: Any, times: int = 3) -> float:
    """Median time of four pictures with guidance, as the machine is (after one run that is not counted)."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        generate(pipe, list(PROMPTS[:4]))
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def as_images(pictures: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, 3) to pictures."""
    return [Image.fromarray(picture) for picture in pictures]


def sheet(pictures: np.ndarray, captions: list[str] | None = None, columns: int = 8) -> Image.Image:
    """Pictures in rows of ``columns``, with their captions beneath."""
    cells = [(p, captions[i] if captions else "") for i, p in enumerate(as_images(pictures))]
    return contact_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


@torch.no_grad()
def vae_report(vae: Any, count: int = 128) -> tuple[float, np.ndarray]:
    """PSNR (dB, mean over pictures) on unseen scenes, and originals above their reconstructions."""
    pictures = np.stack([sample(TEST_SEED, i)[0] for i in range(count)])
    x = to_tensor(pictures)
    y = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in x.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))
    back = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return psnr.mean().item(), np.concatenate([pictures[:8], back[:8], pictures[8:16], back[8:16]])


def judge_top1(judge: Judge, count: int = 512, among: int = 64) -> float:
    """Share of unseen scenes whose own caption scores highest among 64 captions."""
    hits = 0
    for start in range(0, count, among):
        pairs = [sample(TEST_SEED, 10_000 + start + i) for i in range(among)]
        captions = [c for _, c in pairs]
        scores = image_features(judge, [Image.fromarray(p) for p, _ in pairs]) @ text_features(judge, captions).T
        hits += sum(captions[int(j)] == captions[i] for i, j in enumerate(scores.argmax(1)))
    return hits / count


def subject_auc(judge: Judge, each: int = 8) -> float:
    """P(same subject scores above another subject), pictures of held-out subjects on random grounds."""
    names, pictures = heldout_pictures(TEST_SEED, each)
    features = image_features(judge, as_images(pictures))
    scores = (features @ features.T).numpy()
    owner = np.array(names)
    upper = np.triu(np.ones_like(scores, dtype=bool), 1)
    same = owner[:, None] == owner[None, :]
    positive, negative = scores[upper & same], np.sort(scores[upper & ~same])
    return float(np.searchsorted(negative, positive).mean() / len(negative))


def evaluate(weights: Path, images: Path | None, prompts: int = 0) -> dict[str, float]:
    """All numbers of the base; writes ``base_grid.png`` and ``base_vae.png`` to ``images`` if given.

    ``prompts``: on how many unseen captions the independent probe judges (0: not at all).
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(weights / "pipeline", dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    psnr, rows = vae_report(pipe.vae)
    report = {"vae_psnr_db": psnr, "seconds_for_4_pictures": seconds_for_four(pipe)}
    pictures = generate(pipe, list(PROMPTS))
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        sheet(pictures, list(PROMPTS)).save(images / "base_grid.png", optimize=True)
        sheet(rows).save(images / "base_vae.png", optimize=True)
    if (weights / "judge").exists():
        judge = load_judge(weights / "judge")
        scores = image_features(judge, as_images(pictures)) @ text_features(judge, PROMPTS).T
        n = len(PROMPTS)
        report |= {
            "judge_top1_of_64": judge_top1(judge),
            "judge_subject_auc": subject_auc(judge),
            "clip_own_prompt": scores.diag().mean().item(),
            "clip_other_prompts": (scores.sum() - scores.diag().sum()).item() / (n * (n - 1)),
            "generated_top1_of_24": (scores.argmax(1) == torch.arange(n)).float().mean().item(),
        }
    if prompts:
        report |= measure(weights, lambda texts: generate(pipe, texts), prompts).report()
    return {k: round(v, 4) for k, v in report.items()}


def evaluate_teaching(weights: Path, images: Path | None) -> dict[str, float]:
    """LoRA and NoRA against the base on held-out subjects, in some minutes; ``base_taught.png`` goes to ``images``."""
    report, lessons = teach_all(weights)
    if images is not None:
        rows = [[(p, scene.caption) for p, scene in zip(lesson.pictures, new_scenes(lesson.subject), strict=True)]
                for lesson in lessons]  # fmt: skip
        titles = [
            f"{one.method}, {one.subject}: subject read right in {one.subject_right:.0%}, "
            f"background in {one.background_right:.0%}, learned in {one.seconds:.0f} s"
            for one in lessons
        ]
        contact_sheet(rows, titles).save(images / "base_taught.png", optimize=True)
    return {k: round(v, 4) for k, v in report.items()}


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS)
    parser.add_argument("--images", type=Path, help="where to write the two pictures")
    parser.add_argument("--report", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--prompts", type=int, default=200, help="unseen captions for the probe; 0: no probe")
    parser.add_argument("--teach", action="store_true", help="also teach it four held-out subjects (some minutes)")
    args = parser.parse_args()
    hush()
    report = evaluate(args.weights, args.images, args.prompts)
    if args.teach:
        report |= evaluate_teaching(args.weights, args.images)
    print(json.dumps(report, indent=1))
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
