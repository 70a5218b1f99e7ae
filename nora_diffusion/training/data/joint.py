"""One adapter for all subjects of a list, told apart by their triggers: their photos make one run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from ...data.captions import has_word
from ...errors import UserError
from ..settings.config import TrainConfig
from ..settings.listing import read_subjects
from .subject import Subject, read_subject


def read_data(config: TrainConfig) -> tuple[Subject, TrainConfig]:
    """What a run learns, and its settings with the prompts settled."""
    return read_together(config) if config.joint else read_subject(config)


def read_together(config: TrainConfig) -> tuple[Subject, TrainConfig]:
    """The subjects of ``config.subjects`` as one, whose ``members`` they are.

    Raises :class:`UserError` where they cannot be told apart, and for settings that know one subject only.
    """
    if config.with_prior_preservation and config.prior_preservation == "images" and not config.class_prompt:
        raise UserError("--joint has one set of class pictures: give --class_prompt, or --prior_preservation frozen")
    found = {name: read_subject(own) for name, own in read_subjects(config).items()}
    members = tuple(replace(subject, name=name) for name, (subject, _) in found.items())
    _check_triggers(members)
    class_prompts = [own.class_prompt or "" for subject, own in found.values() for _ in subject.photos]
    whole = Subject(
        photos=[photo for member in members for photo in member.photos],
        captions=[caption for member in members for caption in member.captions],
        trigger=", ".join(member.trigger or "" for member in members),
        class_word=", ".join(dict.fromkeys(member.class_word for member in members if member.class_word)) or None,
        data_hash=hashlib.sha256("\n".join(member.data_hash for member in members).encode()).hexdigest(),
        rejects=[reject for member in members for reject in member.rejects],
        held_out=[photo for member in members for photo in member.held_out],
        new_tokens={word: start for member in members for word, start in member.new_tokens.items()},
        class_prompts=class_prompts if config.with_prior_preservation else (),
        members=members,
    )
    return whole, config


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
