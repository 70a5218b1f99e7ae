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
Basis = Literal["awsvd", "svd", "learned", "orthogonal", "kaiming"]
Precision = Literal["no", "fp16", "bf16"]
PriorPrecision = Literal["no", "fp32", "fp16", "bf16"]
SaveDtype = Literal["fp32", "fp16", "bf16"]
Interpolation = Literal["nearest", "nearest_exact", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
TimestepSampling = Literal["uniform", "stratified", "logit_normal"]
LossWeighting = Literal["none", "min_snr", "debiased"]
LossType = Literal["l2", "huber"]
PriorPreservation = Literal["images", "frozen"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor", "sgd", "lora_pro", "lora_rite"]
PAIRED: tuple[Optimizer, ...] = ("lora_pro", "lora_rite")
"""Optimizers that step both factors of a pair together."""
LoraProMoments = Literal["full", "factors"]
CalibrationData = Literal["generic", "subject"]
Strategy = Literal["none", "chain", "reslora", "flat", "halora"]
Shortcut = Literal["input", "block", "middle"]
RankAllocation = Literal[
    "uniform", "gradient", "adalora", "dynamic_dora", "alora", "prilora", "heterolora", "heterolora_once", "beamlora"
]
Crop = Literal["random", "center", "subject"]
QuantizedDtype = Literal["int8"]
LatentCache = Literal["memory", "disk"]
Engine = Literal["local", "ray"]

GROUPS = {
    "base": "base model",
    "data": "photos, prompts and captions",
    "adapter": "adapter",
    "prior": "prior preservation",
    "training": "training",
    "optimizer": "optimizer and schedule",
    "run": "checkpoints, samples and output",
    "validation": "validation and selection of the saved step",
    "system": "precision, memory and tracking",
}


Bound = Literal["positive", "not_negative", "seed", "below_one", "share", "fraction"]
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
    """A dataclass field for one setting, with its default and what parser, checks, app and model card need to know.

    ``choices`` are the allowed values of a ``str`` setting. Each number is tagged with its range: ``positive`` (> 0),
    ``not_negative`` (>= 0), ``seed`` ([0, 2^64)), ``below_one`` ([0, 1)), ``share`` ([0, 1]) or ``fraction`` of the run
    ((0, 1]). Other tags:

    - ``free``: may change when a run resumes: it does not affect the result, or the identity covers it otherwise;
    - ``shared``: must be the same for all subjects of a run, because it affects the frozen base or the whole run;
    - ``own``: set per subject, even with ``joint``;
    - ``measures``: setting it turns validation scores on;
    - ``card``: listed in the model card;
    - ``open``, ``closed``: the app may or may not set it, overriding the rule for its group.
    """
    metadata = {"group": group, "help": help, "tags": tags, "aliases": aliases, "choices": choices, "secret": secret}
    return field(default=default, metadata=metadata)


TRACKERS = ("tensorboard", "trackio", "wandb", "comet_ml")
"""Supported trackers, by package name."""


@dataclass
class TrainConfig:
    """Settings of a run as given by the user. ``None`` means off, or a default that depends on base and method.

    Python names, flags (``--key value``) and YAML keys are the same. :func:`.checks.check_config` validates a config,
    :mod:`.defaults` fills in defaults, and planning turns it into a :class:`.resolved.ResolvedConfig`.
    """

    # base
    pretrained_model_name_or_path: str | None = key(
        None, "base", "path or Hub id of the pipeline (default: the embedded base)", "free", "shared"
    )
    revision: str | None = key(None, "base", "revision of the Hub repository", "free", "shared")
    variant: str | None = key(None, "base", "variant of the weight files, for example fp16", "free", "shared")
    tokenizer_name: str | None = key(None, "base", "tokenizer to use instead of the pipeline's", "free", "shared")
    tokenizer_max_length: int | None = key(
        None, "base", "maximum prompt length in tokens (default: the tokenizer's)", "positive"
    )
    text_encoder_use_attention_mask: bool = key(
        False, "base", "pass the attention mask of the prompts to the text encoder"
    )
    class_labels_conditioning: str | None = key(
        None, "base", "'timesteps' passes the timesteps to the UNet as class labels"
    )

    # data
    subjects: str | None = key(
        None, "data", "YAML list of subjects to train together; its settings override flags", "free", "shared"
    )
    joint: bool = key(
        False, "data", "train one adapter for all subjects of the list, each with its own trigger word", "shared"
    )
    rows_at_once: int | None = key(
        None,
        "data",
        "maximum rows of a forward pass over several subjects (default: all)",
        "positive",
        "free",
        "shared",
    )
    engine: Engine = key(
        "local", "data", "train the list on this machine or as tasks of a Ray cluster (extra 'ray')", "free", "shared"
    )
    address: str | None = key(
        None, "data", "Ray cluster, 'auto' or HOST:PORT (default: start one on this machine)", "free", "shared"
    )
    subjects_per_task: int = key(4, "data", "subjects trained together in one Ray task", "positive", "free", "shared")
    task_retries: int = key(
        2, "data", "restarts of a Ray task whose process was killed", "not_negative", "free", "shared"
    )
    instance_data_dir: str | None = key(None, "data", "folder with the photos of the subject", "free", "own")
    instance_prompt: str | None = key(None, "data", "prompt for all photos, for example 'a photo of sks dog'", "own")
    use_captions: bool = key(
        False, "data", "read each photo's caption from the .txt file beside it or from metadata.jsonl", "free", "own"
    )
    caption_column: str | None = key(
        None, "data", "read each photo's caption from this key of metadata.jsonl", "free", "own"
    )
    shuffle_tags: int = key(
        0,
        "data",
        "random orders of each caption's comma-separated tags; 0 keeps the order",
        "not_negative",
        "open",
    )
    keep_tokens: int = key(1, "data", "first tags of a caption that are not shuffled", "not_negative", "open")
    caption_dropout: float = key(0.0, "data", "share of rows trained with an empty caption", "share", "open")
    trigger: str | None = key(
        None, "data", "trigger word, a rare word that names the subject (default: found in the prompt)", "own"
    )
    class_word: str | None = key(None, "data", "class of the subject, for example 'dog'", "own")
    resolution: int | None = key(
        None, "data", "resolution of the training images in pixels (default: the base's)", "positive", "card", "open"
    )
    crop: Crop = key(
        "random", "data", "how photos are cropped; subject keeps the whole masked subject in the crop", "open"
    )
    center_crop: bool = key(False, "data", "same as --crop center", "open")
    crops_per_image: int = key(
        4, "data", "random crops cached for each photo with another aspect ratio", "positive", "open"
    )
    aspect_buckets: bool = key(
        False, "data", "crop to the nearest of several aspect ratios instead of a square", "open"
    )
    cache_latents: LatentCache = key(
        "memory", "data", "where to cache encoded photos and prompts; disk reuses them in later runs", "free"
    )
    background_loss_weight: float | None = key(
        None,
        "data",
        "loss weight outside the subject mask, 0 to 1 (default: masks are not used)",
        "share",
        "open",
    )
    background: str = key("white", "data", "color behind transparent areas", "open")
    skip_unreadable: bool = key(False, "data", "skip unusable files instead of stopping", "free")
    random_flip: bool = key(False, "data", "also train on a mirrored copy of each training image", "open")
    image_interpolation_mode: Interpolation = key("lanczos", "data", "interpolation for resizing", "open")
    dataloader_num_workers: int = key(
        0, "data", "threads that read photos; 0 reads them one after another", "not_negative", "free"
    )

    # adapter
    method: str = key("nora", "adapter", "adapter method", "card", choices=tuple(PRESETS))
    rank: int | None = key(None, "adapter", "rank r; the outer rank of a nested adapter", "positive", "card")
    inner_rank: int | None = key(None, "adapter", "inner rank r' of a nested adapter", "positive", "card")
    rank_allocation: RankAllocation = key(
        "uniform",
        "adapter",
        "rank of each layer: the same, by its first gradient (inner ranks), or by one of the rules that move ranks "
        "while training; rank (or inner_rank) is then the mean at the end",
        "card",
    )
    alpha: float | None = key(
        None, "adapter", "alpha; the update is scaled by alpha / r (default: r)", "positive", "card"
    )
    basis: Basis | None = key(None, "adapter", "initialization of the frozen outer pair", "card")
    placement: Placement | None = key(None, "adapter", "which outer factor gets the singular values", "card")
    power: float | None = key(None, "adapter", "exponent of the activation strengths in awsvd", "not_negative", "card")
    core: Core | None = key(None, "adapter", "trained core between the frozen outer factors", "card")
    num_experts: int | None = key(None, "adapter", "number of experts of a mixture", "positive", "card")
    router: RouterInput | None = key(None, "adapter", "input of a mixture's router", "card")
    top_k: int | None = key(
        None, "adapter", "modules of a block that MiLoRA uses for a prompt; 0 for all", "not_negative", "card"
    )
    blocks: int | None = key(
        None, "adapter", "number of MELoRA blocks; each has an equal share of the rank", "positive", "card"
    )
    magnitude: bool = key(False, "adapter", "also train DoRA's magnitude (the norm of each weight row)", "card")
    dropout: float = key(
        0.0, "adapter", "dropout probability of the adapter", "below_one", "card", aliases=("lora_dropout",)
    )
    target_modules: list[str] | None = key(
        None,
        "adapter",
        "modules to adapt: groups (attn, context, ff, proj, conv), name suffixes, or one regular expression",
        "card",
    )
    target_blocks: list[str] | None = key(
        None, "adapter", "adapt only modules in these blocks, for example mid_block up_blocks.1.attentions.0"
    )
    basis_from: str | None = key(
        None, "adapter", "adapter whose frozen outer pairs are reused, so that both fit in one pack", "closed"
    )
    start_from: str | None = key(
        None,
        "adapter",
        "adapter of the same method and base whose training is continued (default: a new one)",
        "closed",
    )
    gates_of: str | None = key(
        None,
        "adapter",
        "mixture of frozen adapters whose gates are trained (nora-diffusion mix --mode gated)",
        "closed",
    )
    calibration: CalibrationData = key(
        "generic", "adapter", "calibrate awsvd on generic prompts or on the subject's photos"
    )
    calibration_prompts: list[str] | None = key(None, "adapter", "prompts to calibrate awsvd on instead")
    train_text_encoder: bool = key(False, "adapter", "also adapt the text encoder", "card")
    train_text_encoder_ti: bool = key(
        False, "adapter", "train new tokens for the trigger word (pivotal tuning)", "card"
    )
    token_abstraction: list[str] | None = key(
        None,
        "adapter",
        "words of the prompts that become new tokens, for example <dog> (default: the trigger)",
        "own",
        "card",
    )
    num_new_tokens_per_abstraction: int = key(2, "adapter", "vectors trained for each of these words", "positive")
    initializer_concept: str | None = key(
        None, "adapter", "words whose embeddings initialize new tokens (default: the class word)", "own"
    )

    # prior preservation
    with_prior_preservation: bool = key(
        False, "prior", "add a prior preservation loss, so that the class does not drift to the subject"
    )
    prior_preservation: PriorPreservation = key(
        "images",
        "prior",
        "preserve the class with class images or with the frozen base's prediction for the class prompt",
    )
    prior_loss_weight: float = key(1.0, "prior", "weight of the prior preservation loss", "not_negative", "card")
    class_data_dir: str | None = key(
        None, "prior", "folder of class images (default: output_dir/class_images)", "free", "closed"
    )
    class_prompt: str | None = key(
        None, "prior", "prompt of the class images (default: 'a photo of a CLASS_WORD')", "own", "card"
    )
    num_class_images: int = key(
        100, "prior", "minimum number of class images; missing ones are generated", "positive", "free"
    )
    sample_batch_size: int = key(4, "prior", "batch size for generating class images", "positive", "free")
    prior_generation_precision: PriorPrecision | None = key(
        None, "prior", "precision for generating class images", "free"
    )

    # training
    strategy: Strategy = key("none", "training", "what is done around the steps: see docs/adapters.md", "card")
    chain_links: int | None = key(
        None,
        "training",
        "adapters that a chain trains one after another, each of rank r (default: 2)",
        "positive",
        "card",
    )
    shortcut: Shortcut | None = key(
        None, "training", "what ResLoRA adds from the block before while training (default: block)", "card"
    )
    train_batch_size: int | None = key(
        None, "training", "batch size on each device, not counting class images", "positive", "card"
    )
    num_train_epochs: int | None = key(None, "training", "epochs, if max_train_steps is not given", "positive", "free")
    max_train_steps: int | None = key(None, "training", "optimizer steps", "positive")
    gradient_accumulation_steps: int = key(
        1, "training", "batches accumulated for one optimizer step", "positive", "card"
    )
    seed: int | None = key(None, "training", "random seed (default: drawn and recorded)", "seed", "card")
    snr_gamma: float | None = key(
        None, "training", "gamma of min-SNR weighting, usually 5; 0 turns it off", "not_negative", "card"
    )
    timestep_sampling: TimestepSampling | None = key(None, "training", "how the timesteps of a batch are sampled")
    min_timestep: int = key(0, "training", "lowest timestep to train", "not_negative")
    max_timestep: int | None = key(None, "training", "timesteps below this one are trained (default: all)", "positive")
    loss_weighting: LossWeighting | None = key(
        None, "training", "loss weighting by timestep (default: min_snr if snr_gamma is above 0)"
    )
    loss_type: LossType = key("l2", "training", "loss function: l2, or huber, which is robust to outliers")
    huber_c: float = key(0.1, "training", "error above which the huber loss grows linearly", "positive")
    balance_loss_weight: float | None = key(
        None, "training", "weight of a loss that keeps a mixture's experts in equal use", "not_negative", "card"
    )
    noise_offset: float = key(
        0.0,
        "training",
        "strength of offset noise, usually 0.05 to 0.1; allows darker and lighter images",
        "not_negative",
    )
    input_perturbation: float = key(
        0.0, "training", "strength of extra noise in the input only, usually 0.1", "not_negative"
    )
    rescale_zero_snr: bool = key(
        False, "training", "rescale the noise schedule to zero terminal SNR; needs v-prediction", "shared"
    )
    denoiser_frac: float = key(
        1.0, "training", "fraction of the run in which the UNet or transformer is trained", "fraction"
    )
    text_encoder_frac: float = key(
        1.0,
        "training",
        "fraction of the run in which the text encoder is trained",
        "fraction",
        aliases=("train_text_encoder_frac",),
    )
    train_text_encoder_ti_frac: float = key(
        0.5, "training", "fraction of the run in which new tokens are trained", "fraction"
    )
    ema_decay: float = key(
        0.0, "training", "decay of the EMA of the weights, which is saved, usually 0.999; 0 turns it off", "below_one"
    )

    # optimizer and schedule
    learning_rate: float | None = key(None, "optimizer", "learning rate after warmup", "positive", "card")
    text_encoder_lr: float | None = key(
        None, "optimizer", "learning rate of the text encoder (default: learning_rate)", "positive", "card"
    )
    token_lr: float | None = key(
        None,
        "optimizer",
        "learning rate of new tokens, without weight decay",
        "positive",
        aliases=("learning_rate_ti",),
    )
    optimizer: Optimizer = key("adamw", "optimizer", "prodigy and schedulefree need the extra 'train'")
    lora_pro_moments: LoraProMoments = key(
        "full", "optimizer", "what lora_pro takes Adam's moments of: the full matrix's change, or the factors' changes"
    )
    loraplus_lr_ratio: float = key(
        1.0, "optimizer", "learning rate of the up factors divided by that of the down factors (LoRA+)", "positive"
    )
    scale_weight_norms: float | None = key(
        None, "optimizer", "maximum norm of an update; larger ones are scaled down to it", "positive"
    )
    scale_lr: bool = key(False, "optimizer", "multiply the learning rate by devices, accumulation steps and batch size")
    lr_scheduler: Schedule | None = key(None, "optimizer", "learning rate schedule", "card")
    lr_warmup_steps: int | None = key(None, "optimizer", "warmup steps", "not_negative", "card")
    lr_num_cycles: int = key(1, "optimizer", "hard restarts of cosine_with_restarts", "positive")
    lr_power: float = key(1.0, "optimizer", "power of the polynomial schedule", "positive")
    use_8bit_adam: bool = key(False, "optimizer", "use 8-bit AdamW of bitsandbytes, which must be installed", "closed")
    adam_beta1: float = key(0.9, "optimizer", "AdamW beta1", "below_one")
    adam_beta2: float = key(0.999, "optimizer", "AdamW beta2", "below_one")
    adam_weight_decay: float = key(1e-2, "optimizer", "AdamW weight decay", "not_negative")
    adam_epsilon: float = key(1e-8, "optimizer", "AdamW epsilon", "positive")
    max_grad_norm: float = key(1.0, "optimizer", "maximum gradient norm", "positive")

    # run
    output_dir: str = key("lora-dreambooth-model", "run", "output folder of the run", "free", "shared")
    overwrite_output_dir: bool = key(False, "run", "start over in a folder that holds an earlier run", "free", "shared")
    checkpointing_steps: int = key(500, "run", "steps between checkpoints", "positive", "free", "open")
    checkpoints_total_limit: int | None = key(
        None, "run", "maximum number of checkpoints to keep (default: all)", "positive", "free", "open"
    )
    resume_from_checkpoint: str | None = key(
        None, "run", "checkpoint folder to resume from, or 'latest'", "free", "shared"
    )
    preflight_only: bool = key(
        False, "run", "check the run and print warnings, without training or writing", "free", "shared"
    )
    strict: bool = key(False, "run", "treat warnings of the checks as errors", "free", "shared")
    validation_prompt: str | None = key(
        None, "run", "prompt of the sample images (default: no samples)", "free", "open"
    )
    num_validation_images: int = key(4, "run", "sample images per validation", "positive", "free", "open")
    validation_epochs: int = key(50, "run", "epochs between samples", "positive", "free")
    validation_steps: int | None = key(
        None, "run", "steps between samples; replaces validation_epochs", "positive", "free", "open"
    )
    sample_steps: int | None = key(
        None, "run", "inference steps for class and sample images", "positive", "free", "open"
    )
    sample_guidance: float | None = key(
        None, "run", "guidance scale for class and sample images", "not_negative", "free", "open"
    )
    judge: str | None = key(
        None,
        "validation",
        "CLIP model that scores samples: path, Hub id, or 'tiny' for the embedded base's",
        "free",
        "measures",
    )
    dino: str | None = key(
        None,
        "validation",
        "vision model that scores similarity to the subject, for example facebook/dinov2-base",
        "free",
        "measures",
    )
    validation_data_dir: str | None = key(
        None,
        "validation",
        "folder of held-out photos, to measure the loss on and to compare samples with",
        "free",
        "measures",
    )
    validation_split: int | None = key(
        None, "validation", "number of photos of instance_data_dir to hold out instead", "positive", "free", "measures"
    )
    validation_prompts: list[str] | None = key(
        None,
        "validation",
        "prompts to score, with {} for the subject: '{} in the snow'",
        "free",
        "measures",
    )
    early_stopping: int | None = key(
        None,
        "validation",
        "stop after this many measurements without improvement",
        "positive",
        "free",
        "measures",
    )
    validation_images: list[str] | None = key(None, "run", "for image-to-image pipelines; not supported", "free")
    save_dtype: SaveDtype | None = key(None, "run", "dtype of the adapter file (default: as trained)", "free", "open")
    license: str | None = key(None, "run", "license recorded in the adapter and its model card", "free", "open")
    export: list[str] | None = key(None, "run", "also export plain LoRAs to exports/: diffusers, kohya, peft", "free")
    push_to_hub: bool = key(False, "run", "upload the adapter and its model card to the Hub at the end", "free")
    hub_private: bool = key(True, "run", "upload to a private repository; false makes it public", "free")
    hub_token: str | None = key(None, "run", "Hub token for the upload; never written to a file", secret=True)
    hub_model_id: str | None = key(None, "run", "Hub repository of the upload (default: the folder's name)", "free")

    # system
    mixed_precision: Precision | None = key(
        None, "system", "compute precision of the frozen model", "shared", "card", "open"
    )
    quantize_base: QuantizedDtype | None = key(
        None,
        "system",
        "quantize the frozen denoiser to 8 bits; needs gradient_checkpointing (extra 'quantize')",
        "shared",
    )
    gradient_checkpointing: bool = key(
        False, "system", "save memory by recomputing activations in the backward pass", "shared", "open"
    )
    allow_tf32: bool = key(False, "system", "allow TF32 matrix products on NVIDIA GPUs", "shared")
    enable_xformers_memory_efficient_attention: bool = key(
        False, "system", "use xformers attention, which must be installed", "shared"
    )
    pre_compute_text_embeddings: bool = key(
        False, "system", "always on, unless the text encoder or new tokens are trained", "free"
    )
    local_rank: int = key(-1, "system", "set by accelerate launch", "free", "shared")
    report_to: str | None = key(
        None, "system", "trackers, separated by commas: tensorboard, trackio, wandb, comet_ml, all or none", "free"
    )
    logging_dir: str = key("logs", "system", "folder of TensorBoard logs inside output_dir", "free")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from YAML or flag values. Raises :class:`UserError` for unknown keys and wrong types."""
        known = settings_by_name()
        unknown = [name for name in values if name not in known]
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}{suggestion(unknown[0], known)}")
        converted: dict[str, Any] = {}
        for name, value in values.items():
            setting = known[name]
            result = coerce(name, value, str(setting.type), cls, setting.metadata["choices"])
            if setting.name in converted and converted[setting.name] != result:
                raise UserError(
                    f"{setting.name} and {name} mean the same but have different values: give only one of them"
                )
            converted[setting.name] = result
        return cls(**converted)

    def to_dict(self, secrets: bool = False) -> dict[str, Any]:
        """All settings by key, without secrets unless asked for."""
        return {f.name: getattr(self, f.name) for f in settings() if secrets or not f.metadata["secret"]}

    @property
    def encodes_each_step(self) -> bool:
        """Whether prompts are encoded in every step, since the text encoder or new tokens are trained."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(self.output_dir).expanduser()


def settings() -> tuple[Field[Any], ...]:
    """All settings in declaration order."""
    return fields(TrainConfig)


def tagged(tag: Tag) -> tuple[str, ...]:
    """Names of the settings that have ``tag``, in declaration order."""
    return tuple(f.name for f in settings() if tag in f.metadata["tags"])


def settings_by_name() -> dict[str, Field[Any]]:
    """Settings by name and alias."""
    return {name: f for f in settings() for name in (f.name, *f.metadata["aliases"])}
