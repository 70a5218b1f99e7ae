"""What a photo folder holds: photos, masks (also in the layouts of other tools), and files that are not read.

OneTrainer stores ``0-masklabel.png`` and ``0-condlabel.png`` beside ``0.jpg``. kohya's scripts and ai-toolkit read
masks with the photos' names from another folder; kohya's photo folders are named ``10_sks dog``.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..io.files import real_path
from .formats import is_image

MASK_FOLDERS = ("masks", "mask", "conditioning")
SCORING_FOLDER = "scoring"
"""Sub-folder with photos kept for evaluation, as in ``examples/subjects``."""
MAX_FILES = 10_000
"""Files that are looked at in sub-folders."""
_MASKS = (
    re.compile(r"(?P<photo>.+)[-_. ](?P<kind>masklabel|condlabel|masks?|matte|seg|segmentation|alpha)", re.IGNORECASE),
    re.compile(r"(?P<kind>mask|matte)[-_. ](?P<photo>.+)", re.IGNORECASE),
)
_OF_ONETRAINER = ("masklabel", "condlabel")
_KOHYA = re.compile(r"\d+_(?P<prompt>.+)")
_TEXTS = {
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".toml", ".ini", ".md", ".html",
    ".xml", ".xmp", ".aae", ".npz", ".npy", ".pt", ".safetensors", ".db", ".log", ".url", ".lnk", ".lock", ".py", ".sh",
}  # fmt: skip
"""Captions, settings and caches, which are no photos."""


@dataclass(frozen=True)
class Reject:
    """A file that is not used, and the reason: a sentence that starts with its name."""

    path: Path
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """Files that a run does not read although they may be meant for it; ``findings`` has a sentence on each kind."""

    files: list[Reject]
    findings: list[str]


def find_images(folder: Path) -> list[Path]:
    """The photos of ``folder``, sorted by name, without masks. Raises :class:`UserError` if there are none.

    Files count by their suffix or by their header, so an image without a suffix is found too.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: give its folder")
    if not folder.is_dir():
        raise UserError(f"the photo folder {folder} does not exist: give a folder with JPEG, PNG, WEBP or HEIC files")
    images = [path for path in _files(folder) if is_image(path)]
    extra = _extra_images(images)
    photos = [path for path in images if path not in extra]
    if not photos:
        nested = nested_images(folder)
        if nested:
            where = f"but {len(nested)} in sub-folders ({_names(nested, folder)})"
            raise UserError(f"no photos in {folder}, {where}: {_nested_remedy(folder, nested)}")
        raise UserError(f"no photos in {folder}: put 3 to 10 JPEG, PNG, WEBP or HEIC files there")
    return photos


def find_masks(folder: Path, photos: Sequence[Path]) -> tuple[dict[Path, Path], list[Path]]:
    """The mask file of each photo that has one, and the masks that belong to no photo.

    Masks are read from a sub-folder of ``MASK_FOLDERS``, from a folder ``NAME_mask`` or ``NAME_masks`` beside the photo
    folder ``NAME``, or from files such as ``0-masklabel.png`` and ``0_mask.png`` beside the photos, in this order.
    """
    by_key = {key: photo for photo in photos for key in _keys(photo)}
    found: dict[Path, Path] = {}
    unused = []
    for mask in _mask_files(folder):
        match = _mask_name(mask)
        names = [mask.stem, *([match["photo"]] if match else [])]
        photo = next((by_key[key] for key in map(folded, names) if key in by_key), None)
        if photo is None:
            unused.append(mask)
        else:
            found.setdefault(photo, mask)
    return found, unused


def has_masks(folder: Path) -> bool:
    """Whether there are masks for the photos of ``folder``."""
    return next(_mask_files(folder), None) is not None


def left_out(folder: Path, uses_masks: bool, ignored: Sequence[Path] = ()) -> LeftOut:
    """The files of a photo folder that a run does not read. ``ignored``: folders that are not looked at."""
    files = _files(folder)
    images = [path for path in files if is_image(path)]
    conditioning = [path for path, kind in _extra_images(images).items() if kind == "condlabel"]
    masks = [] if uses_masks else [path for path in _mask_files(folder) if folder in path.parents]
    unread = [path for path in files if path not in images and path.suffix.lower() not in _TEXTS]
    nested = nested_images(folder, ignored)
    kinds = (
        (masks, "mask", "not used", "use them with --background_loss_weight 0.2 or --crop subject"),
        (conditioning, "conditioning image", "left out", "remove them"),
        (unread, "file", "left out, in formats that are not read", "export photos among them as JPEG or PNG"),
        (nested, "photo", "left out, in sub-folders", ""),
    )
    rejects, findings = [], []
    for paths, noun, what, remedy in kinds:
        rejects += [Reject(path, f"{path.relative_to(folder).as_posix()} is {what}") for path in paths]
        if paths:
            count = f"1 {noun} is" if len(paths) == 1 else f"{len(paths)} {noun}s are"
            findings.append(f"{count} {what} ({_names(paths, folder)}): {remedy or _nested_remedy(folder, paths)}.")
    return LeftOut(rejects, findings)


def enumerated(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """The first ``limit`` items, and the number of further ones."""
    rest = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + rest


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _extra_images(images: Iterable[Path]) -> dict[Path, str]:
    """The images that belong to photos by their names, with their kind: ``masklabel``, ``condlabel`` or ``mask`` ..."""
    matches = {path: match for path in images if (match := _mask_name(path))}
    known = {key for path in images for key in _keys(path)}
    return {
        path: match["kind"].lower()
        for path, match in matches.items()
        if match["kind"].lower() in _OF_ONETRAINER or folded(match["photo"]) in known
    }


def _mask_name(path: Path) -> re.Match[str] | None:
    """The parts of a name such as ``0_mask.png`` or ``mask_0.png``."""
    return next((match for pattern in _MASKS if (match := pattern.fullmatch(path.stem))), None)


def _mask_files(folder: Path) -> Iterator[Path]:
    name = real_path(folder).name
    folders = [folder / own for own in MASK_FOLDERS] + [folder.parent / f"{name}{end}" for end in ("_mask", "_masks")]
    for masks in folders:
        if masks.is_dir():
            yield from (path for path in _files(masks) if is_image(path))
    if folder.is_dir():
        extra = _extra_images([path for path in _files(folder) if is_image(path)])
        yield from (path for path, kind in extra.items() if kind != "condlabel")


def nested_images(folder: Path, ignored: Sequence[Path] = ()) -> list[Path]:
    """The images in sub-folders, but for masks, images for scoring and those in ``ignored`` folders."""
    own = [folder / name for name in (*MASK_FOLDERS, SCORING_FOLDER)]
    skipped = {real_path(path) for path in (*own, *ignored)}
    found = []
    for path in itertools.islice(folder.rglob("*"), MAX_FILES):
        inner = path.relative_to(folder)
        if len(inner.parts) == 1 or any(part.startswith(".") for part in inner.parts) or not path.is_file():
            continue
        if skipped.isdisjoint(real_path(path).parents) and is_image(path):
            found.append(path)
    return sorted(found)


def _nested_remedy(folder: Path, nested: Sequence[Path]) -> str:
    inner = nested[0].parent
    text = f"move them into {folder}, or set --instance_data_dir '{inner}'"
    if match := _KOHYA.fullmatch(inner.name):
        text += (
            f" --instance_prompt 'a photo of {match['prompt']}' (the folder is named as for kohya's scripts, whose "
            "repeats are not used: --max_train_steps sets the length of the run)"
        )
    return text


def _names(paths: Sequence[Path], folder: Path) -> str:
    return enumerated([path.relative_to(folder).as_posix() for path in paths])


def folded(name: str) -> str:
    """A file name for comparison: names that differ only in their Unicode form or their case are equal."""
    return unicodedata.normalize("NFC", name).casefold()


def _keys(path: Path) -> tuple[str, str]:
    return folded(path.stem), folded(path.name)
