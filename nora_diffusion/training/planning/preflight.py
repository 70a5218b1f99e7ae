"""Checks before the first step of a run: each finding states a problem and its remedy in one sentence."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...adapters.tuner.build import flat_weight
from ...data.captions import TRIGGERS, has_word, triggers
from ...errors import UserError, printable, quoted
from ...formats.adapter_info import info_from
from ...io.run_layout import CHECKPOINTS, checkpoint_steps
from ...loaders import check_adapter
from ...pipelines.base import base_id, is_embedded
from ...pipelines.components import targets_by_component
from ..data.class_images import class_image_findings, uses_class_images
from ..data.prompts import token_limit, truncated_prompts
from ..settings.defaults import USUAL_FACTORS, USUAL_TEXT_RATES, USUAL_TOKEN_RATES, usual_rates
from ..settings.strategies import ON_WEIGHTS
from ..step.denoiser import native_resolution, networks
from ..step.memory import Estimate, available, capacity, estimate
from ..step.optimization import scaled_rate
from .image_checks import encoded_bytes, image_memory, missed_subjects
from .plan import Plan
from .rundir import SPARE_BYTES

log = logging.getLogger(__name__)

MIN_PHOTOS = 3
MIN_VIEWS = 10
REQUIRED_BY = {
    "with_prior_preservation": ("class_data_dir", "class_prompt", "prior_generation_precision"),
    "push_to_hub": ("hub_model_id", "hub_token"),
}
"""Settings that do nothing unless the key is set. diffusers' script accepts them silently."""
COMMON_FRACTION = 0.9
"""Byte-pair vocabularies are ordered by frequency: ids above this fraction are rare words."""


@dataclass(frozen=True)
class Finding:
    """A sentence that states a problem and its remedy. A fatal finding stops the run.

    A long prompt or file name in it is cut by :func:`.printable`.
    """

    text: str
    fatal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))


def preflight(plan: Plan) -> list[Finding]:
    """Run all checks; takes seconds and writes nothing."""
    size = _estimate(plan)
    return [
        *_base(plan), *_disk(plan, size), *_memory(plan, size), *_photos(plan), *_images(plan), *_data(plan),
        *_trigger(plan), *_new_tokens(plan), *_prompts(plan), *_lengths(plan), *_rank(plan), *_rates(plan),
        *_file(plan), *_measured(plan), *_upload(plan), *_without_effect(plan),
    ]  # fmt: skip


def report(findings: Sequence[Finding], strict: bool = False) -> None:
    """Log the findings as warnings. Raises :class:`UserError` with the fatal ones; ``strict`` makes all fatal."""
    fatal = [finding.text for finding in findings if finding.fatal or strict]
    for finding in findings:
        if finding.text not in fatal:
            log.warning("%s", finding.text)
    if fatal:
        raise UserError("\n".join(fatal))


def _estimate(plan: Plan) -> Estimate:
    config = plan.config
    rows = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    try:
        size = estimate(
            plan.pipe, plan.adapter, plan.components, rows, config.resolution, plan.dtype,
            config.gradient_checkpointing,
        )  # fmt: skip
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise UserError(
            "a step needs more memory than 64 bits can count: use a smaller --train_batch_size, --resolution or --rank"
        ) from error
    return replace(size, copy_bytes=size.copy_bytes + _bytes_of_weights(plan))


def _bytes_of_weights(plan: Plan) -> int:
    """Bytes of what is as large as the adapted weights: noisy ones beside them, the moments of full gradients."""
    config = plan.config
    noisy = plan.dtype.itemsize if config.strategy in ON_WEIGHTS else 0
    moments = 2 * torch.float32.itemsize if config.optimizer == "lora_pro" and config.lora_pro_moments == "full" else 0
    if not noisy + moments:
        return 0
    targets = targets_by_component(plan.components, plan.adapter).values()
    return (noisy + moments) * sum(flat_weight(layer).numel() for layers in targets for layer in layers.values())


def _base(plan: Plan) -> Iterator[Finding]:
    if plan.checkpoint is not None:
        try:
            check_adapter(plan.pipe, plan.checkpoint.path)
        except UserError as error:
            yield Finding(str(error), fatal=True)
    side, usual = plan.config.resolution, native_resolution(plan.pipe)
    if not 0.5 <= side / usual <= 2:
        yield Finding(
            f"Images of {side} pixels are far from the {usual} of this base: use --resolution {usual}, or a base for "
            "images of this size."
        )


def _disk(plan: Plan, size: Estimate) -> Iterator[Finding]:
    config, free = plan.config, shutil.disk_usage(_existing(plan.folder)).free
    planned = -(-config.max_train_steps // config.checkpointing_steps)
    limit = planned if config.checkpoints_total_limit is None else config.checkpoints_total_limit
    existing = len(checkpoint_steps(plan.folder / CHECKPOINTS))
    added = max(min(planned, limit) - existing, 0)
    image_bytes = 0
    if uses_class_images(config):
        missing = config.num_class_images - len(plan.class_images.images)
        image_bytes = max(missing, 0) * 2 * config.resolution**2
    least = SPARE_BYTES + 2 * size.checkpoint_bytes + image_bytes
    total = least + added * size.checkpoint_bytes
    if free < least:
        yield Finding(
            f"The disk of {plan.folder} has {_size(free)} left and this run needs {_size(least)}: free some space, or "
            "choose another --output_dir.",
            fatal=True,
        )
    elif free < total:
        yield Finding(
            f"The disk of {plan.folder} has {_size(free)} left and the {added} checkpoints of this run need "
            f"{_size(total)}: keep fewer with --checkpoints_total_limit 2."
        )


def _existing(path: Path) -> Path:
    """The path itself, or its nearest parent folder that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _memory(plan: Plan, size: Estimate) -> Iterator[Finding]:
    device = plan.device
    if device.type not in ("cpu", "cuda"):
        return
    free = available(device) + freed_by_casting(plan, device)
    free -= encoded_bytes(plan) if device.type == "cpu" else 0
    if size.memory <= free:
        return
    remedies = ["--train_batch_size 1"] if plan.config.train_batch_size > 1 else []
    remedies += [] if plan.config.gradient_checkpointing else ["--gradient_checkpointing"]
    bf16 = device.type == "cuda" and plan.config.mixed_precision == "no" and torch.cuda.is_bf16_supported()
    remedies += ["--mixed_precision bf16"] if bf16 else []
    remedies += [] if remedies else ["a smaller --resolution or --rank"]
    needed = f"A step needs about {_size(size.memory)} of memory on top of the base, and {device} has"
    base = plan.dtype.itemsize * sum(p.numel() for module in networks(plan.pipe) for p in module.parameters())
    most = max(capacity(device) - base, 0)
    if size.counted > most:
        yield Finding(f"{needed} at most {_size(most)} for it: use {', '.join(remedies)}.", fatal=True)
    else:
        yield Finding(f"{needed} {_size(free)} left: use {', '.join(remedies)}.")


def freed_by_casting(plan: Plan, device: torch.device) -> int:
    """Bytes on ``device`` that casting the frozen components to the run's dtype frees.

    Negative for components that are on another device and will be moved to ``device``.
    """
    size = plan.dtype.itemsize
    parameters = [p for module in networks(plan.pipe) for p in module.parameters()]
    return sum(p.numel() * ((p.element_size() if p.device.type == device.type else 0) - size) for p in parameters)


def _photos(plan: Plan) -> Iterator[Finding]:
    photos = len(plan.subject.captions)
    if photos < MIN_PHOTOS:
        count = "There is only 1 photo" if photos == 1 else f"There are only {photos} photos"
        yield Finding(
            f"{count}: use 3 to 10 with different backgrounds and angles, so that the adapter learns the subject and "
            "not its surroundings."
        )
    batch = plan.images_per_step
    views = batch * plan.config.max_train_steps / photos
    if views < MIN_VIEWS:
        enough = -(-MIN_VIEWS * photos // batch)
        yield Finding(
            f"Each photo is used only {views:.1f} times, too few to learn the subject: use --max_train_steps {enough} "
            "or more."
        )


def _data(plan: Plan) -> Iterator[Finding]:
    yield from map(Finding, plan.subject.findings)


def _trigger(plan: Plan) -> Iterator[Finding]:
    if plan.config.gates_of is not None:  # its words are known
        return
    if plan.subject.trigger is None:
        yield Finding(
            f"No trigger word was found, so only the whole prompt stands for the subject: put a rare word such as "
            f"'{rare_word(plan.pipe.tokenizer)}' before the class word, or set --trigger."
        )
        return
    known = [
        word
        for member in plan.subject.members_or_self
        for word in (member.trigger or "").split()
        if is_known(plan.pipe.tokenizer, word)
    ]
    if known:
        yield Finding(
            f"The base already knows the trigger '{known[0]}', and its meaning competes with the subject: use a rare "
            f"word such as '{rare_word(plan.pipe.tokenizer)}'."
        )


def is_known(tokenizer: Any, word: str) -> bool:
    """Whether the tokenizer has the word as a single token that is not among its rarest."""
    pieces = tokenizer.tokenize(word)
    return len(pieces) == 1 and tokenizer.convert_tokens_to_ids(pieces[0]) < COMMON_FRACTION * len(tokenizer)


def rare_word(tokenizer: Any, taken: Collection[str] = ()) -> str:
    """A word for a trigger that the base does not know and that is not ``taken``."""
    free = (word for word in triggers() if word not in taken and not is_known(tokenizer, word))
    return next(free, TRIGGERS[-1])


def _new_tokens(plan: Plan) -> Iterator[Finding]:
    noise = [word for word, concept in plan.subject.new_tokens.items() if concept is None]
    if noise:
        yield Finding(
            f"No class word was found, so the new token '{noise[0]}' starts from noise: set --class_word or "
            "--initializer_concept, for example dog."
        )


def _prompts(plan: Plan) -> Iterator[Finding]:
    config, prompt = plan.config, plan.subject.subject_prompt
    named = [(member.trigger, member.captions) for member in plan.subject.members_or_self if member.trigger]
    for trigger, captions in named:
        yield from _captions(plan.subject.class_prompt, trigger, captions)
    given = plan.subject.instance_prompt
    if given and named and not {*given.split()} <= {*prompt.split()}:
        yield Finding(
            f"The instance prompt '{given}' is not used, since every photo has a caption: generate the subject with "
            f"'{prompt}', or change the captions."
        )
    if (
        config.validation_prompt
        and named
        and not any(has_word(config.validation_prompt, trigger) for trigger, _ in named)
    ):
        yield Finding(
            f"The validation prompt lacks the trigger '{named[0][0]}', so its samples will not show the subject: add "
            "it."
        )


def _lengths(plan: Plan) -> Iterator[Finding]:
    limit, prompts = token_limit(plan.config, plan.pipe), list(dict.fromkeys(plan.prompts))
    new_tokens = dict.fromkeys(plan.subject.new_tokens, plan.config.num_new_tokens_per_abstraction)
    if long := truncated_prompts(plan.pipe, prompts, limit, new_tokens):
        yield Finding(
            f"{len(long)} of {len(prompts)} prompts have more than {limit} tokens, so their end is cut off, such as "
            f"{quoted(long[0])}: shorten them."
        )


def _captions(class_prompt: str, trigger: str, captions: Sequence[str]) -> Iterator[Finding]:
    without = [caption for caption in captions if not has_word(caption, trigger)]
    if without:
        yield Finding(
            f"{len(without)} of {len(captions)} captions lack the trigger '{trigger}', such as {quoted(without[0])}: "
            f"add it, or set --trigger {trigger} to have it added."
        )
    if has_word(class_prompt, trigger):
        yield Finding(
            f"The class prompt contains the trigger '{trigger}', so the class would learn it as well: remove it from "
            "--class_prompt."
        )


def _rank(plan: Plan) -> Iterator[Finding]:
    adapter = plan.adapter
    if adapter.basis == "sharing":  # here r is the rank of a LoRA of equal size, which may exceed a layer
        return
    layers = targets_by_component(plan.components, adapter).values()
    largest = max(min(flat_weight(layer).shape) for by_path in layers for layer in by_path.values())
    if adapter.r > largest:
        yield Finding(
            f"A --rank of {adapter.r} is larger than any adapted layer allows (the largest has a smaller side of "
            f"{largest}): choose at most {largest}."
        )


def _rates(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    if config.gates_of is not None:
        return
    if config.optimizer == "sgd":  # its useful learning rates depend on the scale of the loss
        return
    adapts_rate = config.optimizer == "prodigy"
    owner = f"--optimizer {config.optimizer}" if adapts_rate else f"--method {config.method}"
    usual = usual_rates(config.method, is_embedded(config.pretrained_model_name_or_path))
    rates = {"learning_rate": USUAL_FACTORS if adapts_rate else usual}
    rates |= {"text_encoder_lr": USUAL_TEXT_RATES, "token_lr": USUAL_TOKEN_RATES}
    for name, (low, high) in rates.items():
        rate = getattr(config, name)
        if rate is None:
            continue
        effective = scaled_rate(rate, config, plan.processes)
        if not low <= effective <= high:
            outcome = "training may be too slow" if effective < low else "training may diverge"
            yield Finding(
                f"A --{name} of {effective:g} is outside the usual {low:g} to {high:g} of {owner}, so "
                f"{outcome}: choose one in that range."
            )


def _file(plan: Plan) -> Iterator[Finding]:
    """Check the metadata of the adapter file as a reader would, before there is anything to save."""
    names, adapter, subject = list(plan.components), plan.adapter.to_dict(), plan.subject
    metadata = {
        "components": dict.fromkeys(names, adapter), "base_fingerprint": {name: {} for name in names},
        "prompts": list(dict.fromkeys(subject.captions)), "trigger": subject.trigger or "",
        "instance_prompt": subject.subject_prompt, "license": plan.config.license or "",
    }  # fmt: skip
    try:
        info_from(metadata)
    except ValueError as error:
        yield Finding(f"The adapter file could not be loaded again ({error}): lower or shorten that value.", fatal=True)


def _measured(plan: Plan) -> Iterator[Finding]:
    if plan.measure is not None and (leaks := plan.measure.leaks):
        yield Finding(
            f"{len(leaks)} of the {len(plan.measure.photos)} held-out photos are also training photos, such as "
            f"'{leaks[0]}', so memorizing them would raise the scores: hold out other photos."
        )


def _images(plan: Plan) -> Iterator[Finding]:
    yield from (Finding(*found) for found in (*missed_subjects(plan), *image_memory(plan)))
    if uses_class_images(plan.config):
        held_out = [] if plan.measure is None else plan.measure.photos
        found = class_image_findings(plan.class_images, plan.config, plan.subject, base_id(plan.pipe), held_out)
        yield from (Finding(*each) for each in found)


def _upload(plan: Plan) -> Iterator[Finding]:
    if not plan.config.push_to_hub or plan.config.hub_token:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        yield Finding(
            "There is no login for --push_to_hub, so the upload at the end will fail: run `hf auth login`, or set "
            "--hub_token."
        )


def _without_effect(plan: Plan) -> Iterator[Finding]:
    for owner, names in REQUIRED_BY.items():
        flags = [f"--{name}" for name in names if getattr(plan.config, name) is not None]
        if flags and not getattr(plan.config, owner):
            yield Finding(f"{', '.join(flags)} will do nothing without --{owner}: add it, or leave this out.")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
