"""What is learned: the photos, their captions, the trigger and the class word, settled once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...data import Reject, SourceImage, read_images, survey
from ...data.captions import guess_class_word, guess_trigger, has_word, read_captions, with_article, with_trigger
from ...data.colors import color
from ...data.masks import mask_hash, with_masks
from ...errors import UserError
from ..settings.checks import folder_of
from ..settings.config import TrainConfig
from .tokens import abstractions, new_tokens_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """Photos with one caption each, and the words that call the subject."""

    photos: Sequence[SourceImage]
    captions: Sequence[str]
    trigger: str | None
    class_word: str | None
    data_hash: str
    rejects: Sequence[Reject] = ()
    held_out: Sequence[SourceImage] = ()
    new_tokens: Mapping[str, str | None] = field(default_factory=dict)
    """Words to be learned, with those that they start from."""
    class_prompts: Sequence[str] = ()
    """The class prompt of each photo, where they differ."""
    name: str = ""
    members: Sequence[Subject] = ()
    """The subjects that this one is made of, if one adapter learns several; their photos follow one another."""

    @property
    def owners(self) -> list[str]:
        """Whose each photo is."""
        return [member.name for member in self.members for _ in member.photos] or [self.name] * len(self.photos)

    @property
    def says_trigger(self) -> bool:
        """Whether every caption has the trigger, so that giving it changes none."""
        return all(with_trigger(caption, self.trigger, self.class_word) == caption for caption in self.captions)


def calling_prompt(config: TrainConfig, subject: Subject) -> str:
    """What calls the subject: the instance prompt, unless captions took its place and name another class."""
    trigger, kind = subject.trigger, subject.class_word
    asked = with_trigger(config.instance_prompt or "", trigger, kind)
    if config.instance_prompt and (asked in subject.captions or (kind and has_word(asked, kind))):
        return asked
    if trigger and kind and not subject.members:
        return with_article(f"{trigger} {kind}")
    return subject.captions[0]


def read_subject(config: TrainConfig) -> tuple[Subject, TrainConfig]:
    """Read photos and captions; returns them and ``config`` with its prompts settled.

    Without ``instance_prompt``, ``trigger`` and ``class_word`` make one: "a photo of sks dog". A given
    trigger is put into captions that lack it. Raises :class:`UserError` if there is no prompt for a photo.
    """
    config = _with_prompts(config)
    photos, rejects = _photos(config)
    photos, held_out = hold_out(photos, config.validation_split or 0)
    captions = read_captions(
        [photo.path for photo in photos], config.instance_prompt, config.use_captions, config.caption_column
    )
    named = abstractions(config)
    trigger = config.trigger or (named[0] if len(named) == 1 else _guess(config))
    class_word = config.class_word or guess_class_word(captions[0], trigger)
    if config.trigger:
        captions = [with_trigger(caption, trigger, class_word) for caption in captions]
    if trigger is None:
        log.warning("no trigger word in %r (--trigger names one): the whole prompt calls the subject", captions[0])
    config = replace(config, trigger=trigger, class_word=class_word)
    tokens = new_tokens_of(config, trigger, class_word)
    data_hash = _data_hash(photos, captions)
    return Subject(photos, captions, trigger, class_word, data_hash, rejects, held_out, tokens), config


def _photos(config: TrainConfig) -> tuple[list[SourceImage], list[Reject]]:
    photos, rejects = _unmasked(config)
    if config.crop != "subject" and config.background_loss_weight is None:
        return photos, rejects
    return with_masks(photos, folder_of(config.instance_data_dir or "")), rejects


def _unmasked(config: TrainConfig) -> tuple[list[SourceImage], list[Reject]]:
    folder, workers = folder_of(config.instance_data_dir or ""), config.dataloader_num_workers
    background = color(config.background)
    if not config.skip_unreadable:
        return read_images(folder, workers, background), []
    photos, rejects = survey(folder, workers, background)
    for reject in rejects:
        log.warning("left out: %s", reject.reason)
    if not photos:
        raise UserError(f"no file in {folder} can be used: {rejects[0].reason}")
    return photos, rejects


def hold_out(photos: Sequence[SourceImage], count: int) -> tuple[list[SourceImage], list[SourceImage]]:
    """``(to learn from, to measure with)``: the ``count`` photos of the smallest SHA-256, whatever they are called.

    Raises :class:`UserError` if nothing is left to learn from.
    """
    held = {photo.sha256 for photo in sorted(photos, key=lambda photo: photo.sha256)[:count]}
    left = [photo for photo in photos if photo.sha256 not in held]  # nor a twin of one that is held out
    if not left:
        raise UserError(f"--validation_split {count} leaves nothing of {len(photos)} photos to learn from: lower it")
    return left, [photo for photo in photos if photo.sha256 in held]


def _with_prompts(config: TrainConfig) -> TrainConfig:
    instance, prior = config.instance_prompt, config.class_prompt
    if instance is not None and not instance.strip():
        raise UserError("the instance prompt is empty: give for example --instance_prompt 'a photo of sks dog'")
    if instance is None and config.trigger and config.class_word:
        instance = f"a photo of {config.trigger} {config.class_word}"
    if prior is None and config.with_prior_preservation:
        prior = f"a photo of a {config.class_word}"
    return replace(config, instance_prompt=instance, class_prompt=prior)


def _guess(config: TrainConfig) -> str | None:
    # Captions are no ground for a guess: their first word that is not the class may be any adjective.
    if config.instance_prompt is None:
        return None
    return guess_trigger(config.instance_prompt, config.class_word, config.class_prompt)


def _data_hash(photos: Sequence[SourceImage], captions: Sequence[str]) -> str:
    rows = [
        [photo.sha256, caption, *([mask_hash(photo.mask)] if photo.mask else [])]
        for photo, caption in zip(photos, captions, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
