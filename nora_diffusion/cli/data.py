"""``nora-diffusion data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

HELP = "look at the photos of a folder as a training would see them: a report as one page and as JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command, which are called as in ``train``."""
    from ..training.settings.config import Crop

    parser.add_argument("folder", help="folder with photos")
    parser.add_argument("--out", default="outputs/data", help="folder of the report")
    parser.add_argument("--resolution", type=int, default=512, help="side of the training pictures in pixels")
    parser.add_argument("--aspect_buckets", action="store_true", help="crop to the nearest of several shapes")
    parser.add_argument("--crop", choices=get_args(Crop), default="random",
                        help="where a photo of another shape is cropped; subject: around its mask")  # fmt: skip
    parser.add_argument("--crops_per_image", type=int, default=4, help="random crops of a photo of another shape")
    parser.add_argument("--background", default="white", help="color that shows through transparent places")
    parser.add_argument("--instance_prompt", default="", help="prompt of photos without a caption")
    parser.add_argument("--caption_column", help="captions from this key of metadata.jsonl (default: text files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops")


def run(values: argparse.Namespace) -> None:
    """Write the report and say what is in it. Files that cannot be used are listed, not refused."""
    from ..data import survey
    from ..data.captions import read_captions
    from ..data.colors import color
    from ..data.masks import FOLDER, with_masks
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
        print(f"left out: {reject.reason}")
    if not photos:
        raise UserError(f"no file in {folder} can be used")
    if values.crop == "subject" or (folder / FOLDER).is_dir():
        photos = with_masks(photos, folder)
    paths = [photo.path for photo in photos]
    captions = read_captions(paths, values.instance_prompt or "(no caption)", True, values.caption_column)
    views = views_of(transform_of(TrainConfig(**settings), BUCKET_STEP), photos, values.seed)
    page = report_data(Path(values.out).expanduser(), Subject(photos, captions, None, None, "", rejects), views)
    print(f"{len(photos)} photos, {len(rejects)} left out: {page}")


BUCKET_STEP = 64
"""Pixels that sides of buckets are multiples of, as for Stable Diffusion; a run asks its base."""
