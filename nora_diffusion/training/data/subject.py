"""What a run learns: images, their captions, the trigger word and the class word."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data import Reject, SourceImage, read_images, survey
from ...data.captions import guess_class_word, guess_trigger, has_word, read_captions, with_article, with_trigger
from ...data.colors import color
from ...data.masks import mask_hash, with_masks
from ...errors import UserError
from ..settings.config import TrainConfig
from .tokens import abstractions, new_tokens_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What a run learns: images with one caption each, and the words that name the subject."""

    images: Sequence[SourceImage]
    captions: Sequence[str]
    trigger: str | None
    class_word: str | None
    data_hash: str
    rejects: Sequence[Reject] = ()
    held_out: Sequence[SourceImage] = ()
    new_tokens: Mapping[str, str | None] = field(default_factory=dict)
    """Words that become new tokens, with the words that their embeddings start from."""
    instance_prompt: str | None = None
    """The prompt of all images; ``None`` where captions alone describe them."""
    class_prompt: str = ""
    """The prompt of the class without the trigger; empty without one."""
    class_prompts: Sequence[str] = ()
    """The class prompt of each image, under prior preservation. Members may have their own."""
    name: str = ""
    members: Sequence[Subject] = ()
    """The subjects that this one consists of, if one adapter learns several; their images follow one another."""

    @property
    def members_or_self(self) -> Sequence[Subject]:
        """The members, or this subject alone."""
        return self.members or [self]

    @property
    def owners(self) -> list[str]:
        """The name of each image's subject."""
        return [member.name for member in self.members_or_self for _ in member.images]

    @property
    def has_trigger_everywhere(self) -> bool:
        """Whether every caption holds the trigger, so that passing ``--trigger`` changes none of them."""
        return all(with_trigger(caption, self.trigger, self.class_word) == caption for caption in self.captions)

    @property
    def subject_prompt(self) -> str:
        """The prompt that names the subject: the instance prompt, unless captions replace it and name another class."""
        trigger, class_word = self.trigger, self.class_word
        if self.instance_prompt:
            prompt = with_trigger(self.instance_prompt, trigger, class_word)
            if prompt in self.captions or (class_word and has_word(prompt, class_word)):
                return prompt
        if trigger and class_word and not self.members:
            return with_article(f"{trigger} {class_word}")
        return self.captions[0]

    @property
    def settings(self) -> dict[str, str | None]:
        """The settings whose values were found in the data, for ``config.yaml`` and the run's identity."""
        if self.members:  # each entry of the list has its own
            return {}
        return {
            "instance_prompt": self.instance_prompt,
            "class_prompt": self.class_prompt or None,
            "trigger": self.trigger,
            "class_word": self.class_word,
        }


def read_subject(config: TrainConfig) -> Subject:
    """Read images and captions, and find the words that name the subject.

    Without ``instance_prompt``, ``trigger`` and ``class_word`` make one: "a photo of sks dog". A given trigger is put
    into captions that lack it. Raises :class:`UserError` if an image has no prompt.
    """
    prompt, class_prompt = _instance_prompt(config), _class_prompt(config)
    photos, rejects = _photos(config)
    photos, held_out = hold_out(photos, config.validation_split or 0)
    captions = read_captions([photo.path for photo in photos], prompt, config.use_captions, config.caption_column)
    trigger = config.trigger or _find_trigger(config, prompt, class_prompt)
    class_word = config.class_word or guess_class_word(captions[0], trigger)
    if config.trigger:
        captions = [with_trigger(caption, trigger, class_word) for caption in captions]
    if trigger is None:
        log.warning("no trigger word in %r (--trigger names one): the whole prompt calls the subject", captions[0])
    return Subject(
        photos, captions, trigger, class_word, _data_hash(photos, captions), rejects, held_out,
        new_tokens=new_tokens_of(config, trigger, class_word), instance_prompt=prompt, class_prompt=class_prompt,
        class_prompts=[class_prompt] * len(photos) if config.with_prior_preservation else [],
    )  # fmt: skip


def _photos(config: TrainConfig) -> tuple[list[SourceImage], list[Reject]]:
    photos, rejects = _unmasked(config)
    if config.crop != "subject" and config.background_loss_weight is None:
        return photos, rejects
    return with_masks(photos, Path(config.instance_data_dir or "").expanduser()), rejects


def _unmasked(config: TrainConfig) -> tuple[list[SourceImage], list[Reject]]:
    folder, workers = Path(config.instance_data_dir or "").expanduser(), config.dataloader_num_workers
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


def _instance_prompt(config: TrainConfig) -> str | None:
    if config.instance_prompt is not None and not config.instance_prompt.strip():
        raise UserError("the instance prompt is empty: give for example --instance_prompt 'a photo of sks dog'")
    if config.instance_prompt is None and config.trigger and config.class_word:
        return f"a photo of {config.trigger} {config.class_word}"
    return config.instance_prompt


def _class_prompt(config: TrainConfig) -> str:
    if config.class_prompt is None:
        return f"a photo of a {config.class_word}" if config.with_prior_preservation else ""
    return config.class_prompt


def _find_trigger(config: TrainConfig, prompt: str | None, class_prompt: str) -> str | None:
    named = abstractions(config)
    if len(named) == 1:
        return named[0]
    # Captions give no hint: their first word that is not the class may be any adjective.
    return None if prompt is None else guess_trigger(prompt, config.class_word, class_prompt or None)


def _data_hash(photos: Sequence[SourceImage], captions: Sequence[str]) -> str:
    rows = [
        [photo.sha256, caption, *([mask_hash(photo.mask)] if photo.mask else [])]
        for photo, caption in zip(photos, captions, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
