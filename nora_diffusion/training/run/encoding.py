"""Encode the data of a run: latents of the images and text embeddings of the prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..data.class_images import read_class_images, uses_class_images
from ..data.dataset import class_views, report_data, transform_of, views_of
from ..data.encoding_cache import EncodingCache
from ..data.latents import Latents, encode_images
from ..data.prompts import PromptEmbeddings
from ..measuring.samples import fill_class_images
from ..planning.checkpoints import check_identity
from ..planning.plan import Plan
from ..planning.rundir import RunFolder
from ..signals import StopRequests
from ..step.denoiser import bucket_multiple
from ..step.seeds import derive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """A plan with its encoded images. ``class_latents``: latents of the class images, if prior preservation has any."""

    plan: Plan
    latents: Latents
    class_latents: Latents | None
    identity: dict[str, Any]

    def embeddings(self) -> PromptEmbeddings:
        """Text embeddings of all prompts of the run, in the current dtype of the text encoders."""
        plan = self.plan
        return PromptEmbeddings(plan.pipe, plan.config, plan.prompts, encoding_cache(plan))


def encoding_cache(plan: Plan) -> EncodingCache:
    """The encoding cache: on disk or in memory, as ``cache_latents`` says."""
    return EncodingCache(plan.config.cache_latents == "disk")


def encode(plan: Plan, accelerator: Accelerator, folder: RunFolder, stop: StopRequests) -> RunData:
    """Claim the run folder and encode the images; call it after all checks have passed."""
    stop.check()
    checkpoint = plan.checkpoint
    folder.claim(fresh=checkpoint is None, config=_repeatable(plan))
    folder.state("starting", total=plan.config.max_train_steps, step=checkpoint.step if checkpoint else 0)
    latents, class_latents, class_hash = encode_all(plan, folder, accelerator.wait_for_everyone, stop.check)
    identity = plan.identity(class_hash)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    stop.check()
    subject = plan.subject
    log.info("%d photos, trigger %r, class %r", len(subject.images), subject.trigger, subject.class_word)
    return RunData(plan, latents, class_latents, identity)


def _repeatable(plan: Plan) -> dict[str, Any]:
    """The settings for ``config.yaml``, with which a new run repeats this one."""
    # A trigger that is set would be added to captions that lack it.
    trigger = plan.settings["trigger"] if plan.subject.has_trigger_everywhere else None
    return plan.settings | {"trigger": trigger, "resume_from_checkpoint": None, "overwrite_output_dir": False}


def encode_all(
    plan: Plan, folder: RunFolder, wait_for_everyone: Callable[[], None], check: Callable[[], None]
) -> tuple[Latents, Latents | None, str]:
    """Latents of the images; if prior preservation uses class images, also their latents and a hash of them."""
    config, pipe, subject, cache = plan.config, plan.pipe, plan.subject, encoding_cache(plan)
    transform = transform_of(config, config.resolution, bucket_multiple(pipe))
    views = views_of(transform, subject.images, config.seed)
    if folder.owner:
        report_data(folder.path, subject, views)
    latents = encode_images(pipe.vae, subject.images, views, config.background_loss_weight, cache)
    if not uses_class_images(config):
        return latents, None, ""
    if folder.owner:
        fill_class_images(pipe, config, subject.class_prompt, check)
    wait_for_everyone()
    images = read_class_images(config).images[: config.num_class_images]
    class_hash = str(derive(0, *(image.sha256 for image in images)))
    cropped = class_views(transform, images, derive(config.seed, "class"), views)
    return latents, encode_images(pipe.vae, images, cropped, cache=cache), class_hash
