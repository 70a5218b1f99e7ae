"""``nora-diffusion data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

HELP = "report on a folder of photos as training data, as an HTML page and as JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command, which have the same names as in ``train``."""
    from ..training.settings.config import Crop

    parser.add_argument("folder", help="folder with photos")
    parser.add_argument("--out", default="outputs/data", help="folder of the report")
    parser.add_argument("--resolution", type=int, default=512, help="side of the training images in pixels")
    parser.add_argument("--aspect_buckets", action="store_true", help="crop to the nearest of several aspect ratios")
    parser.add_argument("--crop", choices=get_args(Crop), default="random",
                        help="where to crop photos of another aspect ratio; subject: around its mask")  # fmt: skip
    parser.add_argument(
        "--crops_per_image", type=int, default=4, help="random crops of a photo of another aspect ratio"
    )
    parser.add_argument("--background", default="white", help="color for transparent areas")
    parser.add_argument("--instance_prompt", default="", help="caption of photos without one")
    parser.add_argument("--caption_column", help="captions from this key of metadata.jsonl (default: text files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops")


def run(values: argparse.Namespace) -> None:
    """Write the report and print a summary. Unusable files are listed, not an error."""
    from ..data import survey
    from ..data.caption_files import read_captions
    from ..data.colors import color
    from ..data.folder import has_masks, left_out
    from ..data.masks import with_masks
    from ..errors import UserError
    from ..training import TrainConfig
    from ..training.data.dataset import report_data, transform_of, views_of
    from ..training.data.subject import Subject

    folder = Path(values.folder).expanduser()
    settings: dict[str, Any] = {
        name: getattr(values, name) for name in ("resolution", "aspect_buckets", "crop", "crops_per_image")
    }
    if min(values.resolution, values.crops_per_image) < 1:
        raise UserError("--resolution and --crops_per_image must be above 0")
    photos, rejects = survey(folder, background=color(values.background))
    for reject in rejects:
        print(f"rejected: {reject.reason}")
    if not photos:
        raise UserError(f"no file in {folder} can be used: see the reasons above")
    masked = values.crop == "subject" or has_masks(folder)
    if masked:
        photos = with_masks(photos, folder)
    others = left_out(folder, masked, [Path(values.out).expanduser()])
    paths = [photo.path for photo in photos]
    captions = read_captions(paths, values.instance_prompt, True, values.caption_column, required=False)
    findings = [*captions.findings, *others.findings]
    for finding in findings:
        print(f"warning: {finding}")
    views = views_of(transform_of(TrainConfig(**settings), values.resolution, BUCKET_STEP), photos, values.seed)
    texts = [text or "(no caption)" for text in captions.texts]
    subject = Subject(photos, texts, None, None, "", rejects, findings=findings, left_out=others.files)
    page = report_data(Path(values.out).expanduser(), subject, views)
    print(f"{len(photos)} photos, {len(rejects)} rejected: {page}")


BUCKET_STEP = 64
"""Sides of buckets are multiples of this many pixels, as for Stable Diffusion; a training run asks its base."""
