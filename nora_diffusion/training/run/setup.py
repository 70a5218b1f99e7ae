"""Builds a run: the base, the cached data, the adapter, the optimizer; then a checkpoint over it."""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ...adapters import AdapterConfig, in_blocks
from ...adapters.presets import PRESETS
from ...adapters.tuner.build import outer_rank
from ...data import read_images
from ...data.caption_variants import CaptionVariants
from ...errors import UserError, first_line
from ...loaders import add_adapter, load_adapter, pairs_from, trainable_parameters
from ...pipelines.base import open_pipeline
from ...pipelines.calibration import Calibration
from ...pipelines.components import all_targets, component, denoiser_name
from ...pipelines.precision import MIXED_DTYPES, best_precision
from ..data.dataset import caption_variants, class_views, report_data, transform_of, views_of
from ..data.encoding_cache import EncodingCache
from ..data.latents import Latents, encode_images
from ..data.prompts import PromptEmbeddings
from ..data.subject import Subject, calling_prompt
from ..data.tokens import encodes_each_step, put_new_tokens
from ..measuring.samples import class_folder, fill_class_images
from ..measuring.validation import Validation
from ..settings.config import Precision, TrainConfig
from ..settings.methods import parameters_of
from ..settings.values import suggestion
from ..step.averaging import Average
from ..step.denoiser import TRAINED_ENCODERS, check_pipeline, denoiser, family_of, native_size, networks
from ..step.objective import Objective, is_flow, with_zero_snr
from ..step.optimization import build_optimizer, build_schedule, restore_schedule
from ..step.quantized import quantize_base
from ..step.randomness import derive
from .checkpoints import Checkpoint, restore_optimizer
from .rundir import RunFolder

log = logging.getLogger(__name__)

ADAPTER = "subject"
CALIBRATION_PHOTOS = 8


@dataclass
class Run:
    """Everything that the loop needs, ready for step ``first_step``."""

    config: TrainConfig
    pipe: Any
    subject: Subject
    seed: int
    total_steps: int
    first_step: int
    dtype: torch.dtype
    objective: Objective
    latents: Latents
    class_latents: Latents | None
    embeddings: PromptEmbeddings
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler
    identity: dict[str, Any]
    adapter: str = ADAPTER
    validation: Validation | None = None
    average: Average | None = None
    kept_step: int | None = None

    @functools.cached_property
    def caption_variants(self) -> CaptionVariants:
        """The captions that each image may be drawn with."""
        return caption_variants(self.config, self.subject.captions)

    @functools.cached_property
    def class_prompts(self) -> list[str]:
        """What each photo's class is called."""
        return class_prompts_of(self.config, self.subject)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(factor.numel() for factor in self.parameters.values())

    @property
    def info(self) -> dict[str, Any]:
        """What the adapter file says of its subject, or of its subjects."""
        members = [
            {"name": m.name, "trigger": m.trigger, "class_word": m.class_word or "", "prompt": m.captions[0]}
            for m in self.subject.members
        ]
        return {
            "extra": {"subjects": members} if members else {},
            "trigger": self.subject.trigger or "",
            "class_word": self.subject.class_word or "",
            "instance_prompt": calling_prompt(self.config, self.subject),
            "prompts": list(dict.fromkeys(self.subject.captions)),
            "seed": self.seed,
            "license": self.config.license or "",
        }


def class_prompts_of(config: TrainConfig, subject: Subject) -> list[str]:
    """The class prompt of each photo."""
    return list(subject.class_prompts) or [config.class_prompt or ""] * len(subject.photos)


def prompts_of(config: TrainConfig, subject: Subject) -> list[str]:
    """All prompts that a run learns under, or practices beside them."""
    prior = class_prompts_of(config, subject) if config.with_prior_preservation else []
    return [*caption_variants(config, subject.captions).all(), *prior]


def open_base(config: TrainConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The base pipeline, frozen, checked to be one this trainer knows, on ``device``, its denoiser in ``dtype``."""
    pipe = open_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    check_pipeline(config, pipe)
    objective_of(config, pipe)
    if config.rescale_zero_snr:
        pipe.scheduler = with_zero_snr(pipe.scheduler)
    if config.tokenizer_name:
        pipe.tokenizer = _other_tokenizer(config.tokenizer_name)
    for module in (pipe.vae, *networks(pipe)):
        module.requires_grad_(False)
        module.eval()
    if config.enable_xformers_memory_efficient_attention:
        pipe.enable_xformers_memory_efficient_attention()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    nn.Module.to(denoiser(pipe), dtype)  # on the CPU: the device may have no room for it in fp32
    return pipe.to(device)


def opening_dtype(configs: Sequence[TrainConfig], device: torch.device) -> torch.dtype:
    """The denoiser's number type from the start: that of the runs on it, where it is known before the base is open.

    Nothing is computed with the denoiser before :func:`lower_precision`, which would cast it anyway, but for class
    pictures, which are the unrounded model's.
    """
    config = configs[0]
    if any(own.with_prior_preservation and own.prior_preservation == "images" for own in configs):
        return torch.float32
    if config.resume_from_checkpoint and not config.mixed_precision:
        return torch.float32  # the checkpoint knows
    return MIXED_DTYPES[config.mixed_precision or launched_precision(device)]


def _other_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {name!r}: {first_line(error)}") from error


def settle(
    config: TrainConfig,
    pipe: Any,
    checkpoint: Checkpoint | None,
    photos: int,
    device: torch.device,
    processes: int,
) -> TrainConfig:
    """Fill in what depends on base, machine, data or checkpoint: the result repeats the run."""
    earlier = checkpoint.identity if checkpoint else {}
    seed = config.seed if config.seed is not None else earlier.get("seed", secrets.randbelow(2**31))
    precision: Precision = config.mixed_precision or earlier.get("mixed_precision") or launched_precision(device)
    steps = config.max_train_steps or epoch_steps(config, photos, processes) * (config.num_train_epochs or 1)
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = earlier.get("lr_warmup_steps", 0 if config.lr_scheduler == "constant" else steps // 10)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if warmup >= steps and config.lr_scheduler != "constant":
        log.warning("%d steps of warm-up in a run of %d: the learning rate never gets to its height", warmup, steps)
    return replace(
        config,
        seed=seed,
        mixed_precision=precision,
        max_train_steps=steps,
        lr_warmup_steps=warmup,
        timestep_sampling=config.timestep_sampling or ("logit_normal" if is_flow(pipe.scheduler) else "uniform"),
        resolution=config.resolution or native_size(pipe),
    )


def epoch_steps(config: TrainConfig, photos: int, processes: int) -> int:
    """Optimizer steps in one pass over the photos."""
    batch = config.images_per_step(processes)
    return max(1, math.ceil(photos / batch))


def launched_precision(device: torch.device) -> Precision:
    """The half precision that `accelerate launch` was told, else the best for the device."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "")  # "no" where it was told nothing, too
    return cast(Precision, told) if told in ("fp16", "bf16") else best_precision(device)


def build_latents(
    config: TrainConfig,
    pipe: Any,
    subject: Subject,
    folder: RunFolder,
    barrier: Callable[[], None],
    check: Callable[[], None],
) -> tuple[Latents, Latents | None, str]:
    """Latents of the photos and, under prior preservation, of the class pictures with their hash."""
    seed, transform = config.seed or 0, transform_of(config, bucket_step(pipe))
    views = views_of(transform, subject.photos, seed)
    if folder.owner:
        report_data(folder.path, subject, views)
    cache = EncodingCache(config.cache_latents == "disk")
    latents = encode_images(pipe.vae, subject.photos, views, config.background_loss_weight, cache)
    if not config.with_prior_preservation or config.prior_preservation == "frozen":
        return latents, None, ""
    place = class_folder(config)
    if folder.owner:
        fill_class_images(pipe, place, config, seed, check)
    barrier()
    pictures = read_images(place, config.dataloader_num_workers)[: config.num_class_images]
    hashes = str(derive(0, *(photo.sha256 for photo in pictures)))
    own = class_views(transform, pictures, derive(seed, "class"), views)
    return latents, encode_images(pipe.vae, pictures, own, cache=cache), hashes


def bucket_step(pipe: Any) -> int:
    """Pixels that a side of a bucket is a multiple of, so that latents halve at every level of the denoiser."""
    levels = len(denoiser(pipe).config.get("block_out_channels", (0, 0)))
    return int(pipe.vae_scale_factor) * 2 ** (levels - 1)


def adapter_config(config: TrainConfig) -> AdapterConfig:
    """The preset of ``config.method`` with the values that it takes."""
    wanted: str | list[str] | None = config.target_modules
    if wanted is not None and len(wanted) == 1:
        wanted = wanted[0]  # a group, or a regular expression
    if config.target_blocks:
        wanted = in_blocks(config.target_blocks, wanted)
    values = {parameter: getattr(config, name) for name, parameter in parameters_of(config.method).items()}
    values["target_modules"] = wanted
    return PRESETS[config.method](**{name: value for name, value in values.items() if value is not None})


def check_targets(config: TrainConfig, pipe: Any) -> None:
    """Raise :class:`UserError` for an adapter that cannot be made or sits nowhere, before anything is written."""
    paths = [path for part in components(config, pipe) for path, _ in component(pipe, part).named_modules()]
    for block in config.target_blocks or ():
        if not {block, f"text_model.{block}"} & {*paths}:
            raise UserError(f"--target_blocks: the base has no {block!r}{suggestion(block, paths)}")
    adapter = adapter_config(config)
    wanted = all_targets(pipe, components(config, pipe), adapter)
    for layers in wanted.values():
        for path, layer in layers.items():
            outer_rank(adapter, layer, path)  # refuses blocks that do not divide a layer
    if config.basis_from is not None:
        pairs_from(pipe, config.basis_from, adapter, wanted)


def components(config: TrainConfig, pipe: Any) -> list[str]:
    """The parts of the pipeline that get the adapter."""
    return [denoiser_name(pipe), *(TRAINED_ENCODERS[family_of(pipe)] if config.train_text_encoder else ())]


def calibration_of(config: TrainConfig, subject: Subject, latents: Latents) -> Calibration | None:
    """What the base is shown to calibrate the basis: generic prompts (``None``), given ones, or the first photos."""
    if config.calibration == "subject":
        photos, pictures = latents.first_pictures(CALIBRATION_PHOTOS)
        return Calibration([subject.captions[photo] for photo in photos], pictures)
    return Calibration(config.calibration_prompts) if config.calibration_prompts else None


def place_adapter(
    config: TrainConfig,
    pipe: Any,
    name: str,
    checkpoint: Checkpoint | None,
    calibration: Calibration | None,
    new_tokens: Mapping[str, str | None],
) -> dict[str, nn.Parameter]:
    """Put the adapter in, fresh or from the checkpoint; returns its trained factors by file key."""
    if checkpoint is None:
        torch.manual_seed(derive(config.seed or 0, "init"))
        add_adapter(pipe, adapter_config(config), name, components(config, pipe), calibration, config.basis_from)
        put_new_tokens(config, pipe, name, new_tokens)
    else:
        load_adapter(pipe, checkpoint.path, name)
    parameters = trainable_parameters(pipe, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def frozen_factors(pipe: Any) -> list[torch.Tensor]:
    """The buffers of all adapters in a pipeline."""
    named = (pair for module in networks(pipe) for pair in module.named_buffers())
    return [buffer for name, buffer in named if ".nora_" in name]


@torch.no_grad()
def agree_on_factors(pipe: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """The first process's numbers for all: elsewhere the same basis may have come out otherwise, up to signs."""
    for value in (*parameters.values(), *frozen_factors(pipe)):
        whole = value.detach().contiguous()
        torch.distributed.broadcast(whole, src=0)
        value.copy_(whole)


def lower_precision(config: TrainConfig, pipe: Any, device: torch.device) -> torch.dtype:
    """Cast the frozen denoiser and text encoders; on a CPU with channels last. Returns the dtype."""
    dtype = MIXED_DTYPES[config.mixed_precision or "no"]
    for module in networks(pipe):
        nn.Module.to(module, dtype)  # diffusers' own `to` warns of modules to keep in fp32 even if there are none
    if device.type == "cpu":
        denoiser(pipe).to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        denoiser(pipe).enable_gradient_checkpointing()
        for name in components(config, pipe)[1:]:
            encoder: Any = component(pipe, name)
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return dtype


def objective_of(config: TrainConfig, pipe: Any) -> Objective:
    """The objective of the base's scheduler with the config's weights and errors.

    Raises :class:`UserError` for a range of timesteps that the scheduler does not have.
    """
    settings: dict[str, Any] = {"loss": config.loss_type, "huber_c": config.huber_c}
    if config.loss_weighting is not None:
        settings["weighting"] = config.loss_weighting
    objective = Objective.of(pipe.scheduler, config.snr_gamma or 0.0, denoiser(pipe).device, **settings)
    for name in ("min_timestep", "max_timestep"):
        value, most = getattr(config, name), objective.timesteps
        if value is not None and value > most - (name == "min_timestep"):
            raise UserError(f"{name}={value} is beyond the {most} timesteps of this base")
    return objective


@dataclass(frozen=True)
class Material:
    """What a run is made of before anything is put into the pipeline."""

    config: TrainConfig
    pipe: Any
    subject: Subject
    latents: Latents
    class_latents: Latents | None
    identity: dict[str, Any]
    checkpoint: Checkpoint | None
    processes: int

    def embeddings(self) -> PromptEmbeddings:
        """The prompts of photos and class pictures, encoded at the text encoder's present precision."""
        prompts = prompts_of(self.config, self.subject)
        return PromptEmbeddings(self.pipe, self.config, prompts, EncodingCache(self.config.cache_latents == "disk"))


def build_run(material: Material) -> Run:
    """Text conditions, lower precision, adapter, optimizer and schedule, then the checkpoint's state over them."""
    config, pipe = material.config, material.pipe
    embeddings = None if encodes_each_step(config) else material.embeddings()
    run = put_in(material, embeddings, lower_precision(config, pipe, denoiser(pipe).device))
    quantize_base(config, pipe)
    return run


def put_in(material: Material, embeddings: PromptEmbeddings | None, dtype: torch.dtype, name: str = ADAPTER) -> Run:
    """A run whose adapter is ``name`` in a pipeline of this precision, at the checkpoint's state if there is one."""
    config, pipe, subject, checkpoint = material.config, material.pipe, material.subject, material.checkpoint
    latents, device = material.latents, denoiser(pipe).device
    calibration = calibration_of(config, subject, latents)
    parameters = place_adapter(config, pipe, name, checkpoint, calibration, subject.new_tokens)
    if material.processes > 1:
        agree_on_factors(pipe, parameters)
    optimizer = build_optimizer(config, parameters, material.processes)
    average = Average(parameters, config.ema_decay) if config.ema_decay else None
    steps = config.max_train_steps or 0
    schedule = build_schedule(config, optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
    if checkpoint is not None:
        tensors = restore_optimizer(optimizer, parameters, checkpoint)
        if average is not None:
            average.restore(tensors)
        restore_schedule(schedule, optimizer, checkpoint.schedule)
        if checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
    for part in components(config, pipe):
        component(pipe, part).train()
    return Run(
        config=config,
        pipe=pipe,
        subject=subject,
        seed=config.seed or 0,
        total_steps=steps,
        first_step=checkpoint.step if checkpoint else 0,
        dtype=dtype,
        objective=objective_of(config, pipe),
        average=average,
        latents=latents,
        class_latents=material.class_latents,
        embeddings=embeddings or material.embeddings(),
        parameters=parameters,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        identity=material.identity,
        adapter=name,
    )
