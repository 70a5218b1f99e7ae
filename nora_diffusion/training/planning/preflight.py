"""What is odd about a run, said before its first step: each finding is one sentence with its remedy."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...adapters.tuner.build import flat_weight
from ...data.captions import TRIGGERS, has_word
from ...errors import UserError
from ...formats.adapter_info import info_from
from ...generation.image_settings import read_settings
from ...io.run_layout import CHECKPOINTS, checkpoint_steps
from ...loaders import check_adapter
from ...pipelines.components import all_targets
from ..data.prompts import token_limit, truncated_prompts
from ..measuring.samples import class_folder, count_images
from ..settings.defaults import USUAL_FACTORS, USUAL_TEXT_RATES, USUAL_TOKEN_RATES, usual_rates
from ..step.denoiser import native_resolution, networks
from ..step.memory import Estimate, available, estimate
from ..step.optimization import scaled_rate
from .plan import Plan
from .rundir import SPARE_BYTES

log = logging.getLogger(__name__)

FEW_PHOTOS = 3
FEW_VIEWS = 10
IDLE = {
    "with_prior_preservation": ("class_data_dir", "class_prompt", "prior_generation_precision"),
    "push_to_hub": ("hub_model_id", "hub_token"),
}
"""Settings that do nothing without another one; diffusers' script takes them, too."""
RARE_SHARE = 0.9
"""Byte-pair vocabularies are ordered by how often a piece is met: the last tenth holds the rare words."""


@dataclass(frozen=True)
class Finding:
    """A sentence that says what is odd and what to do; a fatal one stops the run."""

    text: str
    fatal: bool = False


def preflight(plan: Plan) -> list[Finding]:
    """Everything that can be known without a step, in seconds; nothing is written."""
    size = _outline(plan)
    return [
        *_base(plan), *_disk(plan, size), *_memory(plan, size), *_photos(plan), *_trigger(plan), *_prompts(plan),
        *_lengths(plan), *_rank(plan), *_rates(plan), *_file(plan), *_measured(plan), *_class_pictures(plan),
        *_upload(plan), *_idle(plan),
    ]  # fmt: skip


def report(findings: Sequence[Finding], strict: bool = False) -> None:
    """Log the warnings. Raises :class:`UserError` with all fatal findings; with ``strict`` all are fatal."""
    fatal = [finding.text for finding in findings if finding.fatal or strict]
    for finding in findings:
        if finding.text not in fatal:
            log.warning("%s", finding.text)
    if fatal:
        raise UserError("\n".join(fatal))


def _outline(plan: Plan) -> Estimate:
    config = plan.config
    rows = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    return estimate(
        plan.pipe, plan.adapter, list(plan.components), rows, config.resolution, plan.dtype,
        config.gradient_checkpointing,
    )  # fmt: skip


def _base(plan: Plan) -> Iterator[Finding]:
    if plan.checkpoint is not None:
        try:
            check_adapter(plan.pipe, plan.checkpoint.path)
        except UserError as error:
            yield Finding(str(error), fatal=True)
    side, usual = plan.config.resolution, native_resolution(plan.pipe)
    if not 0.5 <= side / usual <= 2:
        yield Finding(
            f"Pictures of {side} pixels are far from the {usual} of this base: take --resolution {usual}, or a base "
            "made for such pictures."
        )


def _disk(plan: Plan, size: Estimate) -> Iterator[Finding]:
    config, free = plan.config, shutil.disk_usage(_existing(plan.folder)).free
    one = size.checkpoint_bytes
    made = -(-config.max_train_steps // config.checkpointing_steps)
    there = len(checkpoint_steps(plan.folder / CHECKPOINTS))
    kept = max(min(made, made if config.checkpoints_total_limit is None else config.checkpoints_total_limit) - there, 0)
    pictures = 0
    if config.with_prior_preservation:
        missing = config.num_class_images - count_images(class_folder(config))
        pictures = max(missing, 0) * 2 * (config.resolution) ** 2
    least, whole = SPARE_BYTES + 2 * one + pictures, SPARE_BYTES + (kept + 2) * one + pictures
    if free < least:
        yield Finding(
            f"The disk of {plan.folder} has {_size(free)} left and this run needs {_size(least)}: free some space or "
            "choose another --output_dir.",
            fatal=True,
        )
    elif free < whole:
        yield Finding(
            f"The disk of {plan.folder} has {_size(free)} left and the {kept} checkpoints of this run take "
            f"{_size(whole)}: keep fewer with --checkpoints_total_limit 2."
        )


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.absolute().parents) if path.exists())


def _memory(plan: Plan, size: Estimate) -> Iterator[Finding]:
    device = plan.device
    if device.type not in ("cpu", "cuda"):
        return
    free = available(device) + given_back(plan, device)
    if size.memory <= free:
        return
    remedies = ["--train_batch_size 1"] if plan.config.train_batch_size > 1 else []
    remedies += [] if plan.config.gradient_checkpointing else ["--gradient_checkpointing"]
    bf16 = device.type == "cuda" and plan.config.mixed_precision == "no" and torch.cuda.is_bf16_supported()
    remedies += ["--mixed_precision bf16"] if bf16 else []
    remedies += [] if remedies else ["a smaller --resolution or --rank"]
    yield Finding(
        f"A step will take about {_size(size.memory)} of memory beside the base, and {device} has {_size(free)} left: "
        f"use {', '.join(remedies)}."
    )


def given_back(plan: Plan, device: torch.device) -> int:
    """Bytes of ``device`` that the frozen parts hold now, less what they will take in the run's precision.

    Negative for parts that lie elsewhere and have yet to come.
    """
    size = plan.dtype.itemsize
    parameters = [p for module in networks(plan.pipe) for p in module.parameters()]
    return sum(p.numel() * ((p.element_size() if p.device.type == device.type else 0) - size) for p in parameters)


def _photos(plan: Plan) -> Iterator[Finding]:
    config, photos = plan.config, len(plan.subject.captions)
    if photos < FEW_PHOTOS:
        there = "There is only 1 photo" if photos == 1 else f"There are only {photos} photos"
        yield Finding(
            f"{there}: with 3 to 10, different in background and angle, the subject is told apart from what is around "
            "it."
        )
    batch = plan.images_per_step
    views = batch * config.max_train_steps / photos
    if views < FEW_VIEWS:
        enough = -(-FEW_VIEWS * photos // batch)
        yield Finding(
            f"Each photo will be seen {views:.1f} times, too seldom to learn it: use --max_train_steps {enough} or "
            "more."
        )


def _trigger(plan: Plan) -> Iterator[Finding]:
    if plan.subject.trigger is None:
        yield Finding(
            f"No trigger word was found, so the whole prompt calls the subject: put a rare word such as "
            f"'{rare_word(plan.pipe.tokenizer)}' before the class word, or name yours with --trigger."
        )
        return
    known = [
        word
        for own in plan.subject.members_or_self
        for word in (own.trigger or "").split()
        if is_known(plan.pipe.tokenizer, word)
    ]
    if known:
        yield Finding(
            f"'{known[0]}' is a word that the base knows, and its meaning fights the subject's: take a rare trigger "
            f"such as '{rare_word(plan.pipe.tokenizer)}'."
        )


def is_known(tokenizer: Any, word: str) -> bool:
    """Whether a tokenizer has a word as one piece, and not among its rarest."""
    pieces = tokenizer.tokenize(word)
    return len(pieces) == 1 and tokenizer.convert_tokens_to_ids(pieces[0]) < RARE_SHARE * len(tokenizer)


def rare_word(tokenizer: Any) -> str:
    """A usual trigger that the base does not know."""
    return next((word for word in TRIGGERS if not is_known(tokenizer, word)), TRIGGERS[-1])


def _prompts(plan: Plan) -> Iterator[Finding]:
    config, prompt = plan.config, plan.subject.subject_prompt
    named = [(own.trigger, own.captions) for own in plan.subject.members_or_self if own.trigger]
    for trigger, captions in named:
        yield from _captions(plan.subject.class_prompt, trigger, captions)
    asked = plan.subject.instance_prompt
    if asked and named and not {*asked.split()} <= {*prompt.split()}:
        yield Finding(
            f"No photo is learned under the instance prompt '{asked}', since each has a caption: the subject will "
            f"answer to '{prompt}', so ask for that, or make the captions agree."
        )
    if (
        config.validation_prompt
        and named
        and not any(has_word(config.validation_prompt, trigger) for trigger, _ in named)
    ):
        yield Finding(
            f"The validation prompt lacks the trigger '{named[0][0]}', so its pictures will not show the subject: put "
            "it in."
        )


def _lengths(plan: Plan) -> Iterator[Finding]:
    most, prompts = token_limit(plan.config, plan.pipe), list(dict.fromkeys(plan.prompts))
    if long := truncated_prompts(plan.pipe.tokenizer, prompts, most):
        yield Finding(
            f"{len(long)} of {len(prompts)} prompts have more than {most} tokens, so that their end is cut off, such "
            f"as '{long[0]}': shorten them."
        )


def _captions(class_prompt: str, trigger: str, captions: Sequence[str]) -> Iterator[Finding]:
    without = [caption for caption in captions if not has_word(caption, trigger)]
    if without:
        yield Finding(
            f"{len(without)} of {len(captions)} captions lack the trigger '{trigger}', such as '{without[0]}': "
            f"put it in, or let --trigger {trigger} do so."
        )
    if has_word(class_prompt, trigger):
        yield Finding(
            f"The class prompt has the trigger '{trigger}', so the class would learn the subject's name: leave it out "
            "there."
        )


def _rank(plan: Plan) -> Iterator[Finding]:
    adapter = plan.adapter
    if adapter.basis == "sharing":  # whose rank is that of a LoRA of the same size
        return
    layers = all_targets(plan.pipe, list(plan.components), adapter).values()
    most = max(min(flat_weight(layer).shape) for own in layers for layer in own.values())
    if adapter.r > most:
        yield Finding(
            f"No layer here has a smaller side of more than {most}, which is the most that --rank {adapter.r} can be "
            f"in any of them: choose at most {most}."
        )


def _rates(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    if config.optimizer == "sgd":  # whose rates have no usual size
        return
    finds_its_own = config.optimizer == "prodigy"
    owner = f"--optimizer {config.optimizer}" if finds_its_own else f"--method {config.method}"
    rates = {"learning_rate": USUAL_FACTORS if finds_its_own else usual_rates(config.method)}
    rates |= {"text_encoder_lr": USUAL_TEXT_RATES, "token_lr": USUAL_TOKEN_RATES}
    for name, (low, high) in rates.items():
        rate = getattr(config, name)
        if rate is None:
            continue
        effective = scaled_rate(rate, config, plan.processes)
        if not low <= effective <= high:
            outcome = "it will hardly learn" if effective < low else "it may learn noise"
            yield Finding(
                f"A --{name} of {effective:g} is outside the usual {low:g} to {high:g} of {owner}, so "
                f"{outcome}: choose one within."
            )


def _file(plan: Plan) -> Iterator[Finding]:
    """What the run's file will say of itself, read as a reader would: not first when there is something to save."""
    parts, adapter, subject = list(plan.components), plan.adapter.to_dict(), plan.subject
    values = {
        "components": dict.fromkeys(parts, adapter), "base_fingerprint": {part: {} for part in parts},
        "prompts": list(dict.fromkeys(subject.captions)), "trigger": subject.trigger or "",
        "instance_prompt": subject.subject_prompt, "license": plan.config.license or "",
    }  # fmt: skip
    try:
        info_from(values)
    except ValueError as error:
        yield Finding(f"No reader would take the file of this adapter ({error}): lower or shorten that.", fatal=True)


def _measured(plan: Plan) -> Iterator[Finding]:
    if plan.measure is not None and (leaks := plan.measure.leaks):
        yield Finding(
            f"{len(leaks)} of the {len(plan.measure.real)} held-out photos are learned from as well, such as "
            f"'{leaks[0]}', so that copying counts as likeness: hold others out."
        )


def _class_pictures(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    if not config.with_prior_preservation or config.prior_preservation == "frozen":
        return
    others = []
    for path in sorted(class_folder(config).glob("class-*.png")):
        with contextlib.suppress(UserError):  # somebody's own picture
            others += [made.prompt] if (made := read_settings(path)).prompt != plan.subject.class_prompt else []
    if others:
        yield Finding(
            f"{len(others)} of the class pictures in {class_folder(config)} were made of '{others[0]}', not of "
            f"'{plan.subject.class_prompt}': name another --class_data_dir, or remove them."
        )


def _upload(plan: Plan) -> Iterator[Finding]:
    if not plan.config.push_to_hub or plan.config.hub_token:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        yield Finding(
            "There is no login for --push_to_hub, so the upload at the end will fail: run `hf auth login`, or give "
            "--hub_token."
        )


def _idle(plan: Plan) -> Iterator[Finding]:
    for owner, names in IDLE.items():
        told = [f"--{name}" for name in names if getattr(plan.config, name) is not None]
        if told and not getattr(plan.config, owner):
            yield Finding(f"{', '.join(told)} will do nothing without --{owner}: add that, or leave it out.")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
