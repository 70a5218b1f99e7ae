# ruff: noqa: RUF009
"""``TrainConfig``: every setting of a run, under the flag names of diffusers' DreamBooth LoRA script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...adapters.axes import Placement, RouterInput
from ...adapters.presets import PRESETS
from ...errors import UserError
from .values import coerce, suggestion

Core = Literal["nested", "dense", "diagonal"]
Basis = Literal["awsvd", "svd", "orthogonal", "kaiming"]
Precision = Literal["no", "fp16", "bf16"]
PriorPrecision = Literal["no", "fp32", "fp16", "bf16"]
SaveDtype = Literal["fp32", "fp16", "bf16"]
Interpolation = Literal["nearest", "nearest_exact", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
TimestepSampling = Literal["uniform", "stratified", "logit_normal"]
LossWeighting = Literal["none", "min_snr", "debiased"]
LossType = Literal["l2", "huber"]
PriorPreservation = Literal["images", "frozen"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor", "sgd"]
CalibrationData = Literal["generic", "subject"]
Crop = Literal["random", "center", "subject"]
QuantizedDtype = Literal["int8"]
LatentCache = Literal["memory", "disk"]
Engine = Literal["local", "ray"]

GROUPS = {
    "base": "the frozen model",
    "data": "photos, prompts and captions",
    "adapter": "the adapter",
    "prior": "prior preservation",
    "training": "training",
    "optimizer": "optimizer and schedule",
    "run": "checkpoints, samples and output",
    "validation": "measuring on the way, and which step is kept",
    "system": "precision, memory and tracking",
}


Bound = Literal["positive", "not_negative", "below_one", "share", "fraction"]
Tag = Literal[Bound, "free", "shared", "own", "measures", "card", "open", "closed"]


def key(
    default: Any,
    group: str,
    help: str,
    *tags: Tag,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A setting: its default, its group in ``--help``, one line of help, facts about it, and its other names.

    ``choices``: the values that a setting of type ``str`` takes. A number has a bound: ``positive``; ``not_negative``;
    ``below_one``, at least 0; ``share``, from 0 to 1; ``fraction`` of the run, above 0 and at most 1. Other facts:

    - ``free``: may differ in a resumed run, because it does not change the result or is part of the identity anyway;
    - ``shared``: the same for all subjects of a run, because it changes the frozen base or the run as a whole;
    - ``own``: each subject has its own, even where one adapter learns all of them;
    - ``measures``: turns validation on;
    - ``card``: listed in the model card;
    - ``open``, ``closed``: the app may set it, or may not, whatever holds for its group.
    """
    metadata = {"group": group, "help": help, "tags": tags, "aliases": aliases, "choices": choices, "secret": secret}
    return field(default=default, metadata=metadata)


TRACKERS = ("tensorboard", "trackio", "wandb", "comet_ml")
"""Each has the name of its package."""


@dataclass
class TrainConfig:
    """One training run as the user asks for it. ``None`` means off, or the default that suits base and method.

    :mod:`.defaults` fills those in, and planning the run makes a :class:`.resolved.ResolvedConfig` of it. Python names,
    flags (``--key value``) and YAML keys are the same. Checked by :func:`.checks.check_config`.
    """

    # base
    pretrained_model_name_or_path: str | None = key(
        None, "base", "pipeline folder or hub id; without it the embedded base", "free", "shared"
    )
    revision: str | None = key(None, "base", "revision of the hub repository", "free", "shared")
    variant: str | None = key(None, "base", "variant of the weight files, for example fp16", "free", "shared")
    tokenizer_name: str | None = key(None, "base", "another tokenizer than the pipeline's", "free", "shared")
    tokenizer_max_length: int | None = key(
        None, "base", "prompt length in tokens (default: the tokenizer's)", "positive"
    )
    text_encoder_use_attention_mask: bool = key(False, "base", "mask the padding of prompts")
    class_labels_conditioning: str | None = key(None, "base", "'timesteps' passes the timesteps as class labels")

    # data
    subjects: str | None = key(
        None, "data", "YAML list of subjects to train together; its settings win over flags", "free", "shared"
    )
    joint: bool = key(False, "data", "one adapter for all subjects of the list, told apart by their triggers", "shared")
    rows_at_once: int | None = key(
        None, "data", "most rows of several subjects in one pass (default: all)", "positive", "free", "shared"
    )
    engine: Engine = key(
        "local", "data", "train the list here, or as tasks of a Ray cluster (extra 'ray')", "free", "shared"
    )
    address: str | None = key(
        None, "data", "Ray cluster, as 'auto' or HOST:PORT (default: one on this machine)", "free", "shared"
    )
    subjects_per_task: int = key(4, "data", "subjects that one Ray task trains together", "positive", "free", "shared")
    task_retries: int = key(
        2, "data", "times that a Ray task whose process was killed is started again", "not_negative", "free", "shared"
    )
    instance_data_dir: str | None = key(None, "data", "folder with the photos of the subject", "free", "own")
    instance_prompt: str | None = key(None, "data", "prompt for all photos, for example 'a photo of sks dog'", "own")
    use_captions: bool = key(
        False, "data", "read each photo's prompt in the .txt beside it or in metadata.jsonl", "free", "own"
    )
    caption_column: str | None = key(
        None, "data", "read each photo's prompt from this key of metadata.jsonl", "free", "own"
    )
    shuffle_tags: int = key(
        0,
        "data",
        "orders of its comma-separated tags to draw a caption from; 0 keeps the order",
        "not_negative",
        "open",
    )
    keep_tokens: int = key(1, "data", "first tags of a caption that shuffling leaves in place", "not_negative", "open")
    caption_dropout: float = key(0.0, "data", "share of rows that are learned without any words", "share", "open")
    trigger: str | None = key(
        None, "data", "the rare word that names the subject (default: found in the prompt)", "own"
    )
    class_word: str | None = key(None, "data", "what the subject is, for example 'dog'", "own")
    resolution: int | None = key(
        None, "data", "side of the training pictures in pixels (default: the base's own)", "positive", "card", "open"
    )
    crop: Crop = key("random", "data", "where photos are cropped; subject keeps all of what its mask shows", "open")
    center_crop: bool = key(False, "data", "the same as --crop center", "open")
    crops_per_image: int = key(4, "data", "random crops cached for each photo of another shape", "positive", "open")
    aspect_buckets: bool = key(False, "data", "crop to the nearest of several shapes, not to a square", "open")
    cache_latents: LatentCache = key(
        "memory", "data", "where encoded photos and prompts are kept: disk for later runs", "free"
    )
    background_loss_weight: float | None = key(
        None,
        "data",
        "weight of the loss beside the subject's mask, 0 to 1 (default: masks are not used)",
        "share",
        "open",
    )
    background: str = key("white", "data", "color that shows through transparent places", "open")
    skip_unreadable: bool = key(False, "data", "leave unusable files out instead of stopping", "free")
    random_flip: bool = key(False, "data", "mirror half of the pictures", "open")
    image_interpolation_mode: Interpolation = key("lanczos", "data", "filter for resizing", "open")
    dataloader_num_workers: int = key(
        0, "data", "threads that read photos; 0 reads one after another", "not_negative", "free"
    )

    # adapter
    method: str = key("nora", "adapter", "adapter method", "card", choices=tuple(PRESETS))
    rank: int | None = key(None, "adapter", "outer rank r", "positive", "card")
    inner_rank: int | None = key(None, "adapter", "inner rank r' of a nested core", "positive", "card")
    alpha: float | None = key(None, "adapter", "scale alpha / r (default: alpha = r)", "positive", "card")
    basis: Basis | None = key(None, "adapter", "how the frozen outer pair is made", "card")
    placement: Placement | None = key(None, "adapter", "which outer factor gets the singular values", "card")
    power: float | None = key(None, "adapter", "power of the activation strengths in awsvd", "not_negative", "card")
    core: Core | None = key(None, "adapter", "what is trained between the frozen outer factors", "card")
    num_experts: int | None = key(None, "adapter", "experts of a mixture", "positive", "card")
    router: RouterInput | None = key(None, "adapter", "what the gate of a mixture looks at", "card")
    blocks: int | None = key(None, "adapter", "minis of MELoRA, which divide the rank among them", "positive", "card")
    magnitude: bool = key(False, "adapter", "train the length of each weight row too, as DoRA does", "card")
    dropout: float = key(0.0, "adapter", "dropout inside the adapter", "below_one", "card", aliases=("lora_dropout",))
    target_modules: list[str] | None = key(
        None, "adapter", "groups (attn, context, ff, proj, conv), module suffixes, or one regular expression", "card"
    )
    target_blocks: list[str] | None = key(
        None, "adapter", "only modules in these blocks, for example mid_block up_blocks.1.attentions.0"
    )
    basis_from: str | None = key(
        None, "adapter", "an adapter whose frozen outer pairs this one takes, so that both fit one pack", "closed"
    )
    calibration: CalibrationData = key(
        "generic", "adapter", "calibrate awsvd on generic prompts or the subject's photos"
    )
    calibration_prompts: list[str] | None = key(None, "adapter", "prompts that calibrate awsvd instead")
    train_text_encoder: bool = key(False, "adapter", "adapt the text encoder as well", "card")
    train_text_encoder_ti: bool = key(
        False, "adapter", "learn new tokens for the subject's name (pivotal tuning)", "card"
    )
    token_abstraction: list[str] | None = key(
        None, "adapter", "words of the prompts that become new tokens, as <dog> (default: the trigger)", "own", "card"
    )
    num_new_tokens_per_abstraction: int = key(
        2, "adapter", "vectors that are learned for each of these words", "positive"
    )
    initializer_concept: str | None = key(
        None, "adapter", "words whose embeddings new tokens start from (default: the class word)", "own"
    )

    # prior preservation
    with_prior_preservation: bool = key(False, "prior", "keep the class from drifting to the subject")
    prior_preservation: PriorPreservation = key(
        "images", "prior", "keep the class by pictures of it, or by what the frozen base predicts for its prompt"
    )
    prior_loss_weight: float = key(1.0, "prior", "weight of the class pictures' loss", "not_negative", "card")
    class_data_dir: str | None = key(
        None, "prior", "folder of class pictures (default: output_dir/class_images)", "free", "closed"
    )
    class_prompt: str | None = key(
        None, "prior", "prompt of the class pictures (default: 'a photo of a CLASS_WORD')", "own", "card"
    )
    num_class_images: int = key(100, "prior", "class pictures to have; missing ones are generated", "positive", "free")
    sample_batch_size: int = key(4, "prior", "class pictures generated at a time", "positive", "free")
    prior_generation_precision: PriorPrecision | None = key(None, "prior", "precision of that generation", "free")

    # training
    train_batch_size: int | None = key(None, "training", "photos in a batch on each device", "positive", "card")
    num_train_epochs: int | None = key(
        None, "training", "passes over the photos, if max_train_steps is not given", "positive", "free"
    )
    max_train_steps: int | None = key(None, "training", "optimizer steps", "positive")
    gradient_accumulation_steps: int = key(1, "training", "batches added up for one optimizer step", "positive", "card")
    seed: int | None = key(
        None, "training", "seed of everything random (default: drawn and recorded)", "not_negative", "card"
    )
    snr_gamma: float | None = key(
        None, "training", "gamma of min-SNR weighting, 5 is usual; 0 turns it off", "not_negative", "card"
    )
    timestep_sampling: TimestepSampling | None = key(None, "training", "how a batch's timesteps are drawn")
    min_timestep: int = key(0, "training", "least timestep that is trained", "not_negative")
    max_timestep: int | None = key(None, "training", "timesteps below this one are trained (default: all)", "positive")
    loss_weighting: LossWeighting | None = key(
        None, "training", "weights of the noise levels (default: min_snr where snr_gamma is above 0)"
    )
    loss_type: LossType = key("l2", "training", "error of each number: l2, or huber, which forgives outliers")
    huber_c: float = key(0.1, "training", "error beyond which huber grows linearly", "positive")
    noise_offset: float = key(
        0.0, "training", "noise shared by a whole channel, 0.05 to 0.1: darker, lighter pictures", "not_negative"
    )
    input_perturbation: float = key(
        0.0, "training", "more noise in the input than in the target, 0.1 is usual", "not_negative"
    )
    rescale_zero_snr: bool = key(False, "training", "let the last timestep be pure noise; for v-prediction", "shared")
    denoiser_frac: float = key(
        1.0, "training", "fraction of the run in which the UNet or transformer learns", "fraction"
    )
    text_encoder_frac: float = key(
        1.0,
        "training",
        "fraction of the run in which the text encoder learns",
        "fraction",
        aliases=("train_text_encoder_frac",),
    )
    train_text_encoder_ti_frac: float = key(
        0.5, "training", "fraction of the run in which new tokens learn", "fraction"
    )
    ema_decay: float = key(
        0.0, "training", "decay of the moving average that is saved, 0.999 is usual; 0: none", "below_one"
    )

    # optimizer and schedule
    learning_rate: float | None = key(None, "optimizer", "learning rate after warm-up", "positive", "card")
    text_encoder_lr: float | None = key(
        None, "optimizer", "learning rate of the text encoder (default: the same)", "positive", "card"
    )
    token_lr: float | None = key(
        None,
        "optimizer",
        "learning rate of new tokens, without weight decay",
        "positive",
        aliases=("learning_rate_ti",),
    )
    optimizer: Optimizer = key("adamw", "optimizer", "prodigy and schedulefree need the extra 'train'")
    loraplus_lr_ratio: float = key(
        1.0, "optimizer", "rate of the up factors over that of the down factors (LoRA+)", "positive"
    )
    scale_weight_norms: float | None = key(
        None, "optimizer", "largest norm of an update; larger ones are shrunk to it", "positive"
    )
    scale_lr: bool = key(False, "optimizer", "multiply the rate by devices, accumulation and batch size")
    lr_scheduler: Schedule | None = key(None, "optimizer", "shape of the schedule", "card")
    lr_warmup_steps: int | None = key(None, "optimizer", "steps of warm-up", "not_negative", "card")
    lr_num_cycles: int = key(1, "optimizer", "restarts of cosine_with_restarts", "positive")
    lr_power: float = key(1.0, "optimizer", "power of polynomial", "positive")
    use_8bit_adam: bool = key(False, "optimizer", "AdamW of bitsandbytes, which must be installed", "closed")
    adam_beta1: float = key(0.9, "optimizer", "AdamW beta1", "below_one")
    adam_beta2: float = key(0.999, "optimizer", "AdamW beta2", "below_one")
    adam_weight_decay: float = key(1e-2, "optimizer", "AdamW weight decay", "not_negative")
    adam_epsilon: float = key(1e-8, "optimizer", "AdamW epsilon", "positive")
    max_grad_norm: float = key(1.0, "optimizer", "gradients are clipped to this norm", "positive")

    # run
    output_dir: str = key("lora-dreambooth-model", "run", "folder of the run", "free", "shared")
    overwrite_output_dir: bool = key(False, "run", "start anew in a folder that holds an earlier run", "free", "shared")
    checkpointing_steps: int = key(500, "run", "steps between checkpoints", "positive", "free", "open")
    checkpoints_total_limit: int | None = key(
        None, "run", "checkpoints to keep (default: all)", "positive", "free", "open"
    )
    resume_from_checkpoint: str | None = key(None, "run", "'latest' or a checkpoint folder", "free", "shared")
    preflight_only: bool = key(
        False, "run", "say what is odd about this run, without training or writing", "free", "shared"
    )
    strict: bool = key(False, "run", "refuse to train where there is a warning", "free", "shared")
    validation_prompt: str | None = key(
        None, "run", "prompt of the sample pictures; without it there are none", "free", "open"
    )
    num_validation_images: int = key(4, "run", "sample pictures at a time", "positive", "free", "open")
    validation_epochs: int = key(50, "run", "epochs between samples", "positive", "free")
    validation_steps: int | None = key(
        None, "run", "steps between samples, instead of epochs", "positive", "free", "open"
    )
    sample_steps: int | None = key(
        None, "run", "denoising steps of class and sample pictures", "positive", "free", "open"
    )
    sample_guidance: float | None = key(
        None, "run", "guidance of class and sample pictures", "not_negative", "free", "open"
    )
    judge: str | None = key(
        None, "validation", "CLIP folder or hub id that measures; 'tiny' is the embedded base's", "free", "measures"
    )
    dino: str | None = key(
        None, "validation", "vision model that measures likeness, as facebook/dinov2-base", "free", "measures"
    )
    validation_data_dir: str | None = key(
        None, "validation", "folder of held-out photos to compare with", "free", "measures"
    )
    validation_split: int | None = key(
        None, "validation", "photos of instance_data_dir to hold out instead", "positive", "free", "measures"
    )
    validation_prompts: list[str] | None = key(
        None,
        "validation",
        "prompts that are measured, with {} where the subject goes: '{} in the snow'",
        "free",
        "measures",
    )
    early_stopping: int | None = key(
        None,
        "validation",
        "stop after so many measurements that were no better than an earlier one",
        "positive",
        "free",
        "measures",
    )
    validation_images: list[str] | None = key(
        None, "run", "for pipelines that start from a picture: not supported", "free"
    )
    save_dtype: SaveDtype | None = key(
        None, "run", "number type in the adapter file (default: as trained)", "free", "open"
    )
    license: str | None = key(None, "run", "license named in the adapter and its model card", "free", "open")
    export: list[str] | None = key(None, "run", "also write plain LoRAs into exports/: diffusers, kohya, peft", "free")
    push_to_hub: bool = key(False, "run", "upload the adapter and its card at the end", "free")
    hub_private: bool = key(True, "run", "upload to a private repository; false makes it public", "free")
    hub_token: str | None = key(None, "run", "token for the upload; never written to a file", secret=True)
    hub_model_id: str | None = key(None, "run", "repository of the upload (default: the folder's name)", "free")

    # system
    mixed_precision: Precision | None = key(
        None, "system", "precision of the frozen model's work", "shared", "card", "open"
    )
    quantize_base: QuantizedDtype | None = key(
        None, "system", "the frozen denoiser in 8 bits, with gradient_checkpointing", "shared"
    )
    gradient_checkpointing: bool = key(False, "system", "less memory, more time", "shared", "open")
    allow_tf32: bool = key(False, "system", "TF32 matrix products on NVIDIA GPUs", "shared")
    enable_xformers_memory_efficient_attention: bool = key(
        False, "system", "attention of xformers, if installed", "shared"
    )
    pre_compute_text_embeddings: bool = key(False, "system", "always done unless the text encoder is trained", "free")
    local_rank: int = key(-1, "system", "set by accelerate launch", "free", "shared")
    report_to: str | None = key(
        None, "system", "tensorboard, trackio, wandb, comet_ml (with commas), all or none", "free"
    )
    logging_dir: str = key("logs", "system", "folder of TensorBoard logs inside output_dir", "free")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from YAML or flag values. Raises :class:`UserError` for unknown keys and wrong types."""
        known = settings_by_name()
        unknown = [name for name in values if name not in known]
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}{suggestion(unknown[0], known)}")
        kept: dict[str, Any] = {}
        for name, value in values.items():
            setting = known[name]
            converted = coerce(name, value, str(setting.type), cls, setting.metadata["choices"])
            if setting.name in kept and kept[setting.name] != converted:
                raise UserError(f"{setting.name} and {name} mean the same and differ: give one of them")
            kept[setting.name] = converted
        return cls(**kept)

    def to_dict(self, secrets: bool = False) -> dict[str, Any]:
        """All settings by key, without secrets unless asked for."""
        return {f.name: getattr(self, f.name) for f in settings() if secrets or not f.metadata["secret"]}

    @property
    def encodes_each_step(self) -> bool:
        """Whether prompts are encoded at each step, because the text encoder or new tokens are trained."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(self.output_dir).expanduser()


def settings() -> tuple[Field[Any], ...]:
    """The settings in order."""
    return fields(TrainConfig)


def tagged(tag: Tag) -> tuple[str, ...]:
    """The names of the settings with ``tag``, in order."""
    return tuple(f.name for f in settings() if tag in f.metadata["tags"])


def settings_by_name() -> dict[str, Field[Any]]:
    """Every accepted name, aliases included, and its setting."""
    return {name: f for f in settings() for name in (f.name, *f.metadata["aliases"])}
