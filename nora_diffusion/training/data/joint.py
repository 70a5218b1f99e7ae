"""Joint training: one run and one adapter for all subjects of a list, each with its own trigger word."""

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
    """Read the subject of a run, or all subjects of the list for joint training."""
    return read_joint(config) if config.joint else read_subject(config)


def read_joint(config: TrainConfig) -> Subject:
    """Merge the subjects of the list ``config.subjects`` into one :class:`Subject` with ``members``.

    Raises :class:`UserError` if their triggers do not tell them apart, or if class images lack a common prompt.
    """
    if config.with_prior_preservation and config.prior_preservation == "images" and not config.class_prompt:
        raise UserError("--joint has one set of class images: give --class_prompt, or use --prior_preservation frozen")
    members = [replace(read_subject(own), name=name) for name, own in read_subjects(config).items()]
    _check_triggers(members)
    return Subject(
        images=[image for member in members for image in member.images],
        captions=[caption for member in members for caption in member.captions],
        trigger=", ".join(member.trigger or "" for member in members),
        class_word=", ".join(dict.fromkeys(member.class_word for member in members if member.class_word)) or None,
        data_hash=hashlib.sha256("\n".join(member.data_hash for member in members).encode()).hexdigest(),
        rejects=[reject for member in members for reject in member.rejects],
        held_out=[image for member in members for image in member.held_out],
        held_out_captions=[caption for member in members for caption in member.held_out_captions],
        new_tokens={word: concept for member in members for word, concept in member.new_tokens.items()},
        class_prompt=config.class_prompt or "",
        class_prompts=[prompt for member in members for prompt in member.class_prompts],
        findings=[f"{member.name}: {finding}" for member in members for finding in member.findings],
        left_out=[file for member in members for file in member.left_out],
        members=members,
    )


def _check_triggers(members: Sequence[Subject]) -> None:
    """Check that each subject has a trigger, and that its captions contain no other subject's trigger."""
    for member in members:
        if member.trigger is None:
            raise UserError(f"{member.name} has no trigger word: give it one in the list, for example trigger: sks")
        for other in members:
            if other is not member and other.trigger and any(has_word(text, other.trigger) for text in member.captions):
                raise UserError(
                    f"captions of {member.name} contain {other.trigger!r}, the trigger of {other.name}: give each "
                    "subject its own trigger"
                )
