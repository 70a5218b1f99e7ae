"""The subject of a run: images, captions, trigger word and class word."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data import Reject, SourceImage, read_images, survey
from ...data.caption_files import read_captions
from ...data.captions import guess_trigger, has_word, with_article, with_trigger
from ...data.class_words import guess_class_word
from ...data.colors import color
from ...data.folder import enumerated, left_out
from ...data.masks import with_masks
from ...errors import UserError
from ..settings.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """Images with one caption each, and the words that name the subject."""

    images: Sequence[SourceImage]
    captions: Sequence[str]
    trigger: str | None
    class_word: str | None
    data_hash: str
    rejects: Sequence[Reject] = ()
    held_out: Sequence[SourceImage] = ()
    held_out_captions: Sequence[str] = ()
    new_tokens: Mapping[str, str | None] = field(default_factory=dict)
    """Words that become new tokens, with the words that initialize their embeddings (``None``: noise)."""
    instance_prompt: str | None = None
    """The prompt of all images; ``None`` if captions alone describe them."""
    class_prompt: str = ""
    """The class prompt, without the trigger; empty if there is none."""
    class_prompts: Sequence[str] = ()
    """The class prompt of each image, with prior preservation. Members may have different ones."""
    findings: Sequence[str] = ()
    """Problems of the data with their remedies, one sentence each, for preflight and the data report."""
    left_out: Sequence[Reject] = ()
    """Files of the photo folder that are not read."""
    name: str = ""
    members: Sequence[Subject] = ()
    """The subjects of joint training, in the order of their images in ``images``."""

    @property
    def members_or_self(self) -> Sequence[Subject]:
        """The members, or this subject alone."""
        return self.members or [self]

    @property
    def owners(self) -> list[str]:
        """Name of the subject of each image."""
        return [member.name for member in self.members_or_self for _ in member.images]

    @property
    def has_trigger_everywhere(self) -> bool:
        """Whether every caption contains the trigger, so that ``--trigger`` would not change any."""
        return all(with_trigger(caption, self.trigger, self.class_word) == caption for caption in self.captions)

    @property
    def subject_prompt(self) -> str:
        """A prompt with the trigger: the instance prompt, unless captions replace it and name another class."""
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
        """Settings derived from the data, for ``config.yaml`` and the run's identity."""
        if self.members:  # every entry of the list has its own
            return {}
        return {
            "instance_prompt": self.instance_prompt,
            "class_prompt": self.class_prompt or None,
            "trigger": self.trigger,
            "class_word": self.class_word,
        }


def read_subject(config: TrainConfig) -> Subject:
    """Read images and captions, and find trigger and class word.

    If ``instance_prompt`` is missing, it is built from ``trigger`` and ``class_word``: "a photo of sks dog". A given
    trigger is added to captions that lack it. Raises :class:`UserError` if an image has no prompt.
    """
    prompt, class_prompt = _instance_prompt(config), _class_prompt(config)
    images, rejects = _read_images(config)
    others = left_out(_folder(config), uses_masks(config), (config.folder, class_folder(config)))
    images, held_out = hold_out(images, config.validation_split or 0)
    read = read_captions([image.path for image in images], prompt, config.use_captions, config.caption_column)
    captions = read.texts
    trigger = config.trigger or _find_trigger(config, prompt, class_prompt)
    class_word = config.class_word or _find_class_word(config, prompt, captions, trigger)
    if config.trigger:
        captions = [with_trigger(caption, trigger, class_word) for caption in captions]
    if trigger is None:
        log.warning(
            "no trigger word found in %r: the whole prompt names the subject; set a trigger with --trigger",
            captions[0][:200],
        )
    return Subject(
        images, captions, trigger, class_word, _data_hash(images, captions), rejects, held_out,
        held_out_captions=captions_of(config, held_out, prompt or captions[0], trigger, class_word),
        new_tokens=new_tokens_of(config, trigger, class_word), instance_prompt=prompt, class_prompt=class_prompt,
        class_prompts=[class_prompt] * len(images) if config.with_prior_preservation else [],
        findings=[*read.findings, *others.findings, *_blank(images)], left_out=others.files,
    )  # fmt: skip


def captions_of(
    config: TrainConfig, photos: Sequence[SourceImage], prompt: str, trigger: str | None, class_word: str | None
) -> list[str]:
    """The captions that photos of one folder would have in training; ``prompt`` for those without one."""
    if not photos:
        return []
    texts = read_captions([photo.path for photo in photos], prompt, config.use_captions, config.caption_column).texts
    return [with_trigger(text, trigger, class_word) for text in texts] if config.trigger else texts


def _read_images(config: TrainConfig) -> tuple[list[SourceImage], list[Reject]]:
    images, rejects = read_folder(config, _folder(config))
    return with_masks(images, _folder(config)) if uses_masks(config) else images, rejects


def _blank(images: Sequence[SourceImage]) -> list[str]:
    """A finding about images of a single color. Raises :class:`UserError` if there are no others."""
    blank = [image.path.name for image in images if image.is_blank]
    if not blank:
        return []
    count = f"{len(blank)} of {len(images)} photos are of a single color ({enumerated(blank)})"
    if len(blank) == len(images):
        raise UserError(f"{count}, so there is nothing to learn: export them again")
    return [f"{count}, so nothing is learned from them: export them again, or remove them."]


def _folder(config: TrainConfig) -> Path:
    return Path(config.instance_data_dir or "").expanduser()


def class_folder(config: TrainConfig) -> Path:
    """The folder of the class images."""
    return Path(config.class_data_dir).expanduser() if config.class_data_dir else config.folder / "class_images"


def uses_masks(config: TrainConfig) -> bool:
    """Whether subject masks are read."""
    return config.crop == "subject" or config.background_loss_weight is not None


def read_folder(config: TrainConfig, folder: Path) -> tuple[list[SourceImage], list[Reject]]:
    """The images of a folder. Unusable files are returned with ``skip_unreadable``; else :class:`UserError`."""
    workers, background = config.dataloader_num_workers, color(config.background)
    if not config.skip_unreadable:
        return read_images(folder, workers, background), []
    images, rejects = survey(folder, workers, background)
    for reject in rejects:
        log.warning("skipped: %s", reject.reason)
    if not images:
        raise UserError(f"no file in {folder} can be used: {rejects[0].reason}")
    return images, rejects


def hold_out(images: Sequence[SourceImage], count: int) -> tuple[list[SourceImage], list[SourceImage]]:
    """Split into training and held-out images. Held out are the ``count`` images with the smallest SHA-256.

    Raises :class:`UserError` if no training image is left.
    """
    held = {image.sha256 for image in sorted(images, key=lambda image: image.sha256)[:count]}
    training = [image for image in images if image.sha256 not in held]  # also drops duplicates of held-out images
    if not training:
        raise UserError(f"--validation_split {count} leaves none of {len(images)} photos for training: lower it")
    return training, [image for image in images if image.sha256 in held]


def _instance_prompt(config: TrainConfig) -> str | None:
    if config.instance_prompt is not None and not config.instance_prompt.strip():
        raise UserError("the instance prompt is empty: give one, for example --instance_prompt 'a photo of sks dog'")
    if config.instance_prompt is None and config.trigger and config.class_word:
        return f"a photo of {config.trigger} {config.class_word}"
    return config.instance_prompt


def _class_prompt(config: TrainConfig) -> str:
    if config.class_prompt is None:
        return f"a photo of a {config.class_word}" if config.with_prior_preservation else ""
    return config.class_prompt


def abstractions(config: TrainConfig) -> list[str]:
    """Words of ``token_abstraction``; commas may separate them, as in diffusers' scripts."""
    return [word for entry in config.token_abstraction or () for item in entry.split(",") if (word := item.strip())]


def new_tokens_of(config: TrainConfig, trigger: str | None, class_word: str | None) -> dict[str, str | None]:
    """New tokens of a run, each with the words that initialize it (``None``: noise).

    Raises :class:`UserError` if there is no word to train.
    """
    if not config.train_text_encoder_ti:
        return {}
    words = abstractions(config) or ([trigger] if trigger else [])
    if not words:
        raise UserError("--train_text_encoder_ti found no trigger to train: put one such as <dog> into the prompt")
    return dict.fromkeys(words, config.initializer_concept or class_word)


def _find_trigger(config: TrainConfig, prompt: str | None, class_prompt: str) -> str | None:
    words = abstractions(config)
    if len(words) == 1:
        return words[0]
    # Captions are no help: their first word other than the class may be any adjective.
    return None if prompt is None else guess_trigger(prompt, config.class_word, class_prompt or None)


def _find_class_word(
    config: TrainConfig, prompt: str | None, captions: Sequence[str], trigger: str | None
) -> str | None:
    """Guess the class word and log the guess."""
    word, source = guess_class_word(trigger, prompt or "", config.class_prompt or "", captions)
    if word:
        log.info("trigger word %r, class word %r (found in %s); set another with --class_word", trigger, word, source)
    elif trigger:
        log.info("trigger word %r, no class word found; set it with --class_word", trigger)
    return word


def _data_hash(images: Sequence[SourceImage], captions: Sequence[str]) -> str:
    rows = [
        [image.sha256, caption, *([image.mask.sha256] if image.mask else [])]
        for image, caption in zip(images, captions, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
