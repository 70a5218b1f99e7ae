"""The class images of prior preservation: read from their folder, and checked against the photos and the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data import Reject, SourceImage, survey_files
from ...data.folder import enumerated, find_images, nested_images
from ...data.similarity import find_copies
from ...errors import UserError
from ...generation.image_settings import read_settings
from ...io.files import real_path
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig
from .subject import Subject, class_folder


@dataclass(frozen=True)
class ClassImages:
    """The images in the class folder that can be used, and those that cannot."""

    folder: Path
    images: Sequence[SourceImage] = ()
    rejects: Sequence[Reject] = ()


def uses_class_images(config: TrainConfig) -> bool:
    """Whether prior preservation trains on class images."""
    return config.with_prior_preservation and config.prior_preservation == "images"


def read_class_images(config: TrainConfig) -> ClassImages:
    """The class images of a run, at most ``num_class_images``; none if the folder is empty or does not exist."""
    folder = class_folder(config)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{folder} is a file or a link to nothing: give a folder with --class_data_dir")
    try:
        paths = find_images(folder)
    except UserError:  # there is no image yet
        return ClassImages(folder)
    images: list[SourceImage] = []
    rejects: list[Reject] = []
    while paths and (missing := config.num_class_images - len(images)) > 0:
        found, unusable = survey_files(paths[:missing], config.dataloader_num_workers)
        images, rejects, paths = [*images, *found], [*rejects, *unusable], paths[missing:]
    return ClassImages(folder, images, rejects)


def class_image_findings(
    found: ClassImages, config: ResolvedConfig, subject: Subject, base: str, held_out: Sequence[SourceImage]
) -> Iterator[tuple[str, bool]]:
    """Sentences on class images that should not be used, each with whether it stops the run.

    ``base``: the id of the base. ``held_out``: photos that the run is measured on.
    """
    photos = [photo for member in subject.members_or_self for photo in (*member.images, *member.held_out)] + [*held_out]
    folder, folders = found.folder, {real_path(photo.path.parent) for photo in photos}
    if real_path(folder) in folders:
        yield f"The class images are the photos themselves ({folder}): choose another --class_data_dir.", True
        return
    if found.rejects:
        reasons = enumerated([reject.reason for reject in found.rejects], "; ")
        skip = config.skip_unreadable
        remedy = "they are skipped" if skip else "remove them, or set --skip_unreadable"
        yield f"{len(found.rejects)} of the class images in {folder} cannot be used ({reasons}): {remedy}.", not skip
    if nested := nested_images(folder, (config.folder, *folders)):
        names = enumerated([path.relative_to(folder).as_posix() for path in nested])
        yield (
            f"{len(nested)} images in sub-folders of {folder} are no class images ({names}): move them into it, or set "
            f"--class_data_dir '{nested[0].parent}'.",
            False,
        )
    yield from _copies(found, photos)
    yield from _odd(found, config.resolution)
    yield from _of_another_run(found, subject.class_prompt, base)


def _copies(found: ClassImages, photos: Sequence[SourceImage]) -> Iterator[tuple[str, bool]]:
    """A single image may look like a photo by chance; if most photos have a lookalike, their folder was copied."""
    pairs = find_copies(photos, found.images)
    for same_file, text in ((True, "are copies of photos"), (False, "look like photos")):
        own = [pair for pair in pairs if pair.same_file == same_file]
        names = list(dict.fromkeys(pair.second.path.name for pair in own))
        if names:
            yield (
                f"{len(names)} of the class images in {found.folder} {text} ({enumerated(names)}): remove them.",
                same_file or 2 * len({id(pair.first) for pair in own}) > len(photos),
            )


def _odd(found: ClassImages, resolution: int) -> Iterator[tuple[str, bool]]:
    blank = [image.path.name for image in found.images if image.is_blank]
    if blank:
        yield (
            f"{len(blank)} of the class images in {found.folder} are of a single color ({enumerated(blank)}), as a VAE "
            "in fp16 makes them: remove them.",
            len(blank) == len(found.images),
        )
    small = [image.path.name for image in found.images if min(image.size) < resolution]
    if small:
        yield (
            f"{len(small)} of the class images in {found.folder} are smaller than the {resolution} pixels of this run "
            f"({enumerated(small)}), so the class would learn to be blurred: choose another --class_data_dir, or "
            "remove them.",
            False,
        )


def _of_another_run(found: ClassImages, prompt: str, base: str) -> Iterator[tuple[str, bool]]:
    """Class images whose stored settings name another prompt or base, or an adapter."""
    prompts, bases, adapters = [], [], []
    for image in found.images:
        with contextlib.suppress(UserError):  # an image without stored settings
            settings = read_settings(image.path)
            if settings.versions:  # written by this toolkit
                prompts += [settings.prompt] * (settings.prompt != prompt)
                bases += [settings.base] * (settings.base != base)
                adapters += [str(adapter["name"]) for adapter in settings.adapters[:1]]
    remedy = "choose another --class_data_dir, or remove them"
    for others, own in ((prompts, f"with '{prompt}'"), (bases, f"with '{base}'"), (adapters, "by the base alone")):
        if others:
            yield (
                f"{len(others)} of the class images in {found.folder} were generated with '{others[0]}', not {own}: "
                f"{remedy}.",
                False,
            )
