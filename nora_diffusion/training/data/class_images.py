"""The class images of prior preservation: read from their folder, and checked against the photos and the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data import Reject, SourceImage, survey
from ...data.folder import enumerated, find_images
from ...data.similarity import find_duplicates
from ...errors import UserError
from ...generation.image_settings import read_settings
from ..settings.config import TrainConfig
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
    """The class images of a run; none if the folder is empty or does not exist."""
    folder = class_folder(config)
    try:
        find_images(folder)
    except UserError:
        if folder.is_file():
            raise
        return ClassImages(folder)
    images, rejects = survey(folder, config.dataloader_num_workers)
    return ClassImages(folder, images, rejects)


def class_image_findings(found: ClassImages, subject: Subject, base: str, skip: bool) -> Iterator[tuple[str, bool]]:
    """Sentences on class images that should not be used, each with whether it stops the run.

    ``base``: the id of the base. ``skip``: skip unreadable files.
    """
    photos = [photo for member in subject.members_or_self for photo in (*member.images, *member.held_out)]
    folder = found.folder
    if any(folder.resolve() == photo.path.parent.resolve() for photo in photos):
        yield f"The class images are the photos themselves ({folder}): choose another --class_data_dir.", True
        return
    if found.rejects:
        reasons = enumerated([reject.reason for reject in found.rejects], "; ")
        remedy = "they are skipped" if skip else "remove them, or set --skip_unreadable"
        yield f"{len(found.rejects)} of the class images in {folder} cannot be used ({reasons}): {remedy}.", not skip
    yield from _copies(found, photos)
    yield from _of_another_run(found, subject.class_prompt, base)


def _copies(found: ClassImages, photos: Sequence[SourceImage]) -> Iterator[tuple[str, bool]]:
    ids = set(map(id, photos))
    pairs = [
        pair
        for pair in find_duplicates([*photos, *found.images])
        if id(pair.first) in ids and id(pair.second) not in ids
    ]
    for same_file, text in ((True, "are copies of photos"), (False, "look like photos")):
        names = list(dict.fromkeys(pair.second.path.name for pair in pairs if pair.same_file == same_file))
        if names:
            yield (
                f"{len(names)} of the class images in {found.folder} {text} ({enumerated(names)}): remove them.",
                same_file,
            )


def _of_another_run(found: ClassImages, prompt: str, base: str) -> Iterator[tuple[str, bool]]:
    """Class images whose stored settings name another prompt or base."""
    prompts, bases = [], []
    for image in found.images:
        with contextlib.suppress(UserError):  # an image without stored settings
            settings = read_settings(image.path)
            if settings.versions:  # written by this toolkit
                prompts += [settings.prompt] * (settings.prompt != prompt)
                bases += [settings.base] * (settings.base != base)
    for others, own in ((prompts, prompt), (bases, base)):
        if others:
            yield (
                f"{len(others)} of the class images in {found.folder} were generated with '{others[0]}', not with "
                f"'{own}': choose another --class_data_dir, or remove them.",
                False,
            )
