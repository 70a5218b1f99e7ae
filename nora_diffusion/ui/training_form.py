"""What the Train tab asks for: photos as the trainer will see them, a preset's settings, what speaks against them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import UnreadablePhotoError, read_photo
from ..data.transforms import Transform
from ..errors import UserError
from ..files import write_atomic
from .engine import Engine

MAX_PHOTOS, MAX_PHOTO_BYTES = 100, 60 * 2**20
FEW_PHOTOS = 3
MAX_YAML = 4000
MAX_CAPTION_BYTES = 4000
SPARE_BYTES = 500 * 2**20
WORD = re.compile(r"[^\s<>]{1,40}")
PRESETS: dict[str, tuple[float, float]] = {"Fast": (1 / 3, 1.0), "Balanced": (1.0, 1.0), "Best": (2.5, 0.7)}
"""Factors of the base's default steps and learning rate."""

OPEN_GROUPS = ("adapter", "prior", "training", "optimizer")
OPEN = {
    "resolution", "crop", "aspect_buckets", "background", "background_loss_weight", "center_crop",
    "crops_per_image", "random_flip", "shuffle_tags", "keep_tokens", "caption_dropout",
    "image_interpolation_mode", "gradient_checkpointing",
    "mixed_precision", "checkpointing_steps", "checkpoints_total_limit", "validation_prompt", "num_validation_images",
    "validation_steps", "sample_steps", "sample_guidance", "save_dtype", "license",
}  # fmt: skip
CLOSED = {"class_data_dir", "use_8bit_adam"}


@dataclass(frozen=True)
class Checked:
    """One dropped file: the picture that the trainer will see, or why it cannot be used; and a remark."""

    path: Path
    picture: Image.Image | None = None
    fault: str = ""
    remark: str = ""
    caption: str = ""


def check_photos(paths: Sequence[Path], resolution: int) -> list[Checked]:
    """Each file as it will be trained on; headers are checked before anything is decoded.

    Raises :class:`UserError` for too many files.
    """
    if len(paths) > MAX_PHOTOS:
        raise UserError(f"{len(paths)} photos are too many: 3 to 10 good ones do, {MAX_PHOTOS} are the limit")
    found: list[Checked] = []
    first: dict[str, str] = {}
    for path in paths:
        try:
            if path.stat().st_size > MAX_PHOTO_BYTES:
                raise UnreadablePhotoError(f"{path.name} is larger than {MAX_PHOTO_BYTES // 2**20} MiB")
            photo = read_photo(path)
        except UnreadablePhotoError as error:
            found.append(Checked(path, fault=str(error)))
            continue
        twin = first.setdefault(photo.sha256, path.name)
        if twin != path.name or any(c.path == path for c in found):
            found.append(Checked(path, fault=f"{path.name} is the same photo as {twin}"))
            continue
        picture = Transform([(resolution, resolution)]).views(photo.image.size)[0].picture(photo.image)
        found.append(Checked(path, picture, remark=_remark(photo.image.size, resolution), caption=_caption(path)))
    return found


def with_captions(photos: Sequence[Path], captions: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Copies of the photos in ``folder``, each with the text file of its name beside it, where the trainer looks.

    Returns their paths, and a sentence for each text file that will not do.
    """
    texts, faults = {}, []
    for file in captions:
        if file.stem not in {photo.stem for photo in photos}:
            faults.append(f"{file.name} belongs to no photo: give it the name of its photo")
        elif file.stat().st_size > MAX_CAPTION_BYTES:
            faults.append(f"{file.name} is longer than {MAX_CAPTION_BYTES} bytes: shorten the caption")
        else:
            try:
                texts[file.stem] = " ".join(file.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError:
                faults.append(f"{file.name} is no UTF-8 text: save it as such")
    placed = []
    for number, photo in enumerate(photos):  # a folder each: two photos may have one name
        (folder / str(number)).mkdir()
        placed.append(Path(shutil.copyfile(photo, folder / str(number) / photo.name)))
        if texts.get(photo.stem):
            write_atomic(placed[-1].with_suffix(".txt"), texts[photo.stem])
    return placed, faults


def _caption(photo: Path) -> str:
    file = photo.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _remark(size: tuple[int, int], resolution: int) -> str:
    if min(size) < resolution:
        return f"only {size[0]}x{size[1]}: enlarged"
    return "" if size[0] == size[1] else "crops along the long side"


def build_settings(
    engine: Engine, preset: str, trigger: str, class_word: str, changes: Mapping[str, Any], extra: str = ""
) -> dict[str, Any]:
    """Settings of a run. ``changes`` and then the YAML lines of ``extra`` win over the preset.

    Raises :class:`UserError` for what the trainer refuses, and for settings that a page may not make.
    """
    for name, word in (("trigger", trigger), ("class word", class_word)):
        if not WORD.fullmatch(word.strip()):
            raise UserError(f"the {name} {word.strip()[:40]!r} will not do: give one word, for example sks and dog")
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset[:40]!r}: choose one of {', '.join(PRESETS)}")
    trigger, class_word = trigger.strip(), class_word.strip()
    own = {k: v for k, v in changes.items() if v is not None and v != ""} | read_extra(extra)
    defaults = _defaults(engine, str(own.get("method", "nora")))
    steps = own.get("max_train_steps") or max(1, round(defaults.max_train_steps * PRESETS[preset][0]))
    every = max(1, int(steps) // 5)
    return {
        "pretrained_model_name_or_path": engine.base,
        "instance_prompt": f"a {trigger} {class_word}",
        "trigger": trigger,
        "class_word": class_word,
        "max_train_steps": steps,
        "learning_rate": defaults.learning_rate * PRESETS[preset][1],
        "validation_prompt": f"a {trigger} {class_word} on the beach",
        "validation_steps": every,
        "num_validation_images": 2,
        "checkpointing_steps": every,
        "checkpoints_total_limit": 6,
        "seed": 0,
        **own,
    }


def _defaults(engine: Engine, method: str) -> Any:
    from ..training import TrainConfig
    from ..training.defaults import with_defaults

    config = TrainConfig.from_mapping({"pretrained_model_name_or_path": engine.base, "method": method})
    return with_defaults(config)


def read_extra(text: str) -> dict[str, Any]:
    """Settings from lines ``key: value``. Raises :class:`UserError` for those that a page may not make."""
    import yaml

    if len(text or "") > MAX_YAML or any(mark in text for mark in ("&", "*")):
        raise UserError(f"the further settings are plain lines 'key: value', at most {MAX_YAML} characters")
    try:
        values = yaml.safe_load(text or "") or {}
    except yaml.YAMLError as error:
        raise UserError(f"the further settings are not 'key: value' lines: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError("the further settings must be lines 'key: value', one a setting")
    from ..training.config import names
    from ..training.values import suggestion

    known = names()
    for name in values:
        setting = known.get(name)
        if setting is None:
            raise UserError(f"unknown setting {name!r}{suggestion(str(name), known)}")
        allowed = (setting.metadata["group"] in OPEN_GROUPS or setting.name in OPEN) and setting.name not in CLOSED
        if not allowed:
            raise UserError(f"the setting {name!r} is the app's own: use nora-diffusion train for it")
    return {known[name].name: value for name, value in values.items()}


def preflight(engine: Engine, settings: Mapping[str, Any], photos: Sequence[Checked], library: Path) -> list[str]:
    """Warnings, each with its remedy. Raises :class:`UserError` for what the trainer would refuse."""
    from ..training import TrainConfig
    from ..training.checks import check_config, check_pipeline
    from ..training.defaults import with_defaults
    from ..training.setup import check_targets

    usable = [photo for photo in photos if photo.picture is not None]
    if not usable:
        raise UserError("there is no photo to learn from: drop 3 to 10 JPEG, PNG or WEBP files")
    config = with_defaults(TrainConfig.from_mapping({**settings, "instance_data_dir": "photos"}))
    check_config(config)
    check_pipeline(config, engine.pipe)
    check_targets(config, engine.pipe)
    free = shutil.disk_usage(library).free
    if free < SPARE_BYTES:
        raise UserError(f"the disk has {free // 2**20} MiB left, {SPARE_BYTES // 2**20} are needed: free some space")
    return [*_photo_warnings(photos, usable), *_word_warnings(engine, settings)]


def _photo_warnings(photos: Sequence[Checked], usable: Sequence[Checked]) -> list[str]:
    warnings = []
    if len(usable) < FEW_PHOTOS:
        warnings.append(f"Only {len(usable)} photo{'s' * (len(usable) > 1)}: more views make a truer subject.")
    if len(usable) < len(photos):
        warnings.append(f"{len(photos) - len(usable)} of {len(photos)} files are left out, as said beside them.")
    return warnings


def _word_warnings(engine: Engine, settings: Mapping[str, Any]) -> list[str]:
    trigger, prompt = str(settings["trigger"]), str(settings.get("validation_prompt") or "")
    warnings = []
    tokenizer = engine.pipe.tokenizer
    if len(trigger) > 3 and len(tokenizer.tokenize(trigger)) == 1:
        warnings.append(f"'{trigger}' is a word that the base knows: a rare one such as 'sks' has no meaning to fight.")
    if prompt and trigger not in prompt:
        warnings.append(f"The samples will not show the subject: '{trigger}' is not in the validation prompt.")
    rate = settings.get("learning_rate")
    if isinstance(rate, int | float) and math.isfinite(rate) and not 1e-6 <= rate <= 1e-2:
        warnings.append(
            f"A learning rate of {rate:g} is far from the usual 1e-4 to 1e-3: it may learn nothing, or noise."
        )
    return warnings
