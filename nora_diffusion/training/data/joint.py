"""One adapter for all subjects of a list, told apart by their trigger words: their images make one run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from ...data.captions import has_word
from ...errors import UserError
from ..settings.config import TrainConfig
from ..settings.listing import read_subjects
from .subject import Subject, read_subject


def read_data(config: TrainConfig) -> Subject:
    """What a run learns: one subject, or all subjects of the list together."""
    return read_joint(config) if config.joint else read_subject(config)


def read_joint(config: TrainConfig) -> Subject:
    """The subjects of the list ``config.subjects`` as the ``members`` of one.

    Raises :class:`UserError` where they cannot be told apart, and for settings that know one subject only.
    """
    if config.with_prior_preservation and config.prior_preservation == "images" and not config.class_prompt:
        raise UserError("--joint has one set of class images: give --class_prompt, or --prior_preservation frozen")
    members = [replace(read_subject(own), name=name) for name, own in read_subjects(config).items()]
    _check_triggers(members)
    return Subject(
        images=[photo for member in members for photo in member.images],
        captions=[caption for member in members for caption in member.captions],
        trigger=", ".join(member.trigger or "" for member in members),
        class_word=", ".join(dict.fromkeys(member.class_word for member in members if member.class_word)) or None,
        data_hash=hashlib.sha256("\n".join(member.data_hash for member in members).encode()).hexdigest(),
        rejects=[reject for member in members for reject in member.rejects],
        held_out=[photo for member in members for photo in member.held_out],
        new_tokens={word: start for member in members for word, start in member.new_tokens.items()},
        class_prompt=config.class_prompt or "",
        class_prompts=[prompt for member in members for prompt in member.class_prompts],
        members=members,
    )


def _check_triggers(members: Sequence[Subject]) -> None:
    """Each subject has a trigger, and no other's is in its captions."""
    for member in members:
        if member.trigger is None:
            raise UserError(f"{member.name} has no trigger to tell it apart by: give it one, as trigger: sks")
        for other in members:
            if other is not member and other.trigger and any(has_word(text, other.trigger) for text in member.captions):
                raise UserError(
                    f"{member.name} is called by {other.trigger!r}, the trigger of {other.name}: they are told apart "
                    "by their triggers, give each its own"
                )
