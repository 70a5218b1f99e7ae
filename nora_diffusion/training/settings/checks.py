"""Settings that cannot be right are refused here, before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

from ...adapters.presets import PRESETS, is_routed, trains_magnitude
from ...errors import UserError
from .config import TRACKERS, Bound, TrainConfig, settings, tagged
from .defaults import with_defaults
from .methods import owners_of, parameters_of

BOUNDS: dict[Bound, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "must be above 0"),
    "not_negative": (lambda value: value >= 0, "must be at least 0"),
    "below_one": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "share": (lambda value: 0 <= value <= 1, "must be a share from 0 to 1, for example 0.1"),
    "fraction": (lambda value: 0 < value <= 1, "is a fraction of the run: give more than 0 and at most 1"),
}
EXPORT_FORMATS = ("diffusers", "kohya", "peft")


def check_config(config: TrainConfig) -> None:
    """Raise :class:`UserError` for the first setting that is out of range, contradictory or not supported."""
    _check_ranges(config)
    _check_data(config)
    _check_adapter(config)
    _check_prior(config)
    _check_objective(config)
    _check_optimizer(config)
    _check_system(config)


def _check_ranges(config: TrainConfig) -> None:
    for bound, (holds, what) in BOUNDS.items():
        for name in tagged(bound):
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UserError(f"{name}={value} {what}")


def _check_data(config: TrainConfig) -> None:
    if config.joint and not config.subjects:
        raise UserError("--joint needs the list of subjects: give it with --subjects")
    if config.subjects and not config.joint:
        raise UserError("several subjects are trained by training.train_subjects, or by nora-diffusion train")
    if config.joint and (config.engine != "local" or config.address):
        raise UserError("--joint is one run: leave --engine and --address out, which spread a list of runs")
    if config.engine != "local" or config.address:
        raise UserError("--engine and --address are for several subjects: give their list with --subjects")
    own = [name for name in ("instance_data_dir", "instance_prompt", "trigger", "class_word") if getattr(config, name)]
    if config.joint and own:
        raise UserError(f"--joint takes each subject's own {own[0]} from the list: leave --{own[0]} out")
    if not config.instance_data_dir and not config.joint:
        raise UserError("no photos: give their folder with --instance_data_dir")
    if config.use_captions and config.caption_column:
        raise UserError("--use_captions and --caption_column exclude each other: choose where captions come from")
    if config.trigger is not None and not config.trigger.strip():
        raise UserError("the trigger is empty: give a rare word such as 'sks', or leave --trigger out")
    if config.center_crop and config.crop == "subject":
        raise UserError("--center_crop and --crop subject exclude each other: choose where photos are cropped")
    if config.joint and config.validation_data_dir:
        raise UserError("--joint holds photos of each subject out: use --validation_split, not --validation_data_dir")
    if config.validation_data_dir and config.validation_split:
        raise UserError("--validation_data_dir and --validation_split exclude each other: choose the held-out photos")
    if config.validation_images:
        raise UserError("--validation_images is for pipelines that start from a picture; use --validation_prompt here")


def _check_adapter(config: TrainConfig) -> None:
    if config.method not in PRESETS:
        raise UserError(f"method={config.method!r} is unknown: choose one of {', '.join(PRESETS)}")
    for setting in settings():
        value = getattr(config, setting.name)
        owners = owners_of(setting.name)
        if owners and config.method not in owners and value is not None and value != setting.default:
            raise UserError(
                f"--{setting.name} has no effect with --method {config.method}: it is a setting of {', '.join(owners)}"
            )
    _check_inner_rank(with_defaults(config))
    _check_calibration(config)
    if config.text_encoder_lr is not None and not config.train_text_encoder:
        raise UserError("--text_encoder_lr needs --train_text_encoder")
    for name in ("token_abstraction", "initializer_concept", "token_lr"):
        if getattr(config, name) is not None and not config.train_text_encoder_ti:
            raise UserError(f"--{name} needs --train_text_encoder_ti")
    for name in ("train_text_encoder", "train_text_encoder_ti"):
        if getattr(config, name) and config.pre_compute_text_embeddings:
            raise UserError(f"--pre_compute_text_embeddings excludes --{name}: embeddings change while it trains")
    if config.class_labels_conditioning not in (None, "timesteps"):
        raise UserError(
            f"class_labels_conditioning={config.class_labels_conditioning!r} is unknown: only 'timesteps' is"
        )


def _check_inner_rank(config: TrainConfig) -> None:
    has_inner = "inner_rank" in parameters_of(config.method) and config.core in (None, "nested")
    if has_inner and config.inner_rank is not None and config.rank is not None and config.inner_rank > config.rank:
        raise UserError(
            f"--inner_rank {config.inner_rank} exceeds --rank {config.rank}, and the inner pair sits inside the outer "
            "one: lower --inner_rank, or raise --rank"
        )


def _check_calibration(config: TrainConfig) -> None:
    basis = with_defaults(config).basis
    for name, wanted in {"calibration_prompts": config.calibration_prompts, "calibration": config.calibration}.items():
        if wanted and wanted != "generic" and basis != "awsvd":
            raise UserError(f"--{name} needs --basis awsvd, not {basis}")
        if wanted and wanted != "generic" and config.basis_from:
            raise UserError(f"--basis_from takes a basis as it is: leave --{name} out")
    if config.calibration_prompts and config.calibration == "subject":
        raise UserError("--calibration subject takes the photos' own prompts: leave --calibration_prompts out")


def _check_prior(config: TrainConfig) -> None:
    if config.with_prior_preservation:
        if not config.class_prompt and not config.class_word and not config.joint:
            raise UserError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'")
        if config.prior_preservation == "frozen" and config.class_data_dir:
            raise UserError("--prior_preservation frozen needs no class pictures: leave --class_data_dir out")
        return
    if config.prior_preservation == "frozen":
        raise UserError("--prior_preservation frozen needs --with_prior_preservation and --class_prompt")


def _check_objective(config: TrainConfig) -> None:
    if config.max_timestep is not None and config.min_timestep >= config.max_timestep:
        raise UserError(f"min_timestep={config.min_timestep} must be below max_timestep={config.max_timestep}")
    if config.loss_weighting not in (None, "min_snr") and (config.snr_gamma or 0) > 0:
        raise UserError("--snr_gamma is for --loss_weighting min_snr: leave one of them out")
    if config.text_encoder_frac < 1 and not config.train_text_encoder:
        raise UserError("--text_encoder_frac needs --train_text_encoder")


PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}


def _check_optimizer(config: TrainConfig) -> None:
    name = config.optimizer
    if config.use_8bit_adam and name not in ("adamw", "adamw8bit"):
        raise UserError(f"--use_8bit_adam and --optimizer {name} exclude each other: choose one")
    if name in PACKAGES:
        _need(PACKAGES[name], f"--optimizer {name}", "or pip install 'nora-diffusion[train]'")
    if name == "prodigy" and (config.text_encoder_lr or config.token_lr or config.loraplus_lr_ratio != 1):
        raise UserError(
            "prodigy finds one rate for all: leave --text_encoder_lr, --token_lr and --loraplus_lr_ratio out"
        )
    if name == "schedulefree" and config.lr_scheduler not in (None, "constant"):
        raise UserError("schedulefree does without a schedule: use --lr_scheduler constant")
    if config.scale_weight_norms is not None and is_routed(config.method):
        raise UserError(f"--scale_weight_norms has no meaning for {config.method}, whose updates depend on the input")


def _check_system(config: TrainConfig) -> None:
    if config.quantize_base:
        _need("torchao", "--quantize_base", "pip install 'nora-diffusion[quantize]'")
        if config.magnitude or trains_magnitude(config.method):
            raise UserError("--quantize_base excludes DoRA's magnitude, which needs the true weights: leave one out")
        if not config.gradient_checkpointing:
            raise UserError(
                "--quantize_base needs --gradient_checkpointing: without it every layer's widened weight is kept until "
                "the backward pass, and the run takes more memory instead of less"
            )
    if config.use_8bit_adam:
        _need("bitsandbytes", "--use_8bit_adam")
    if config.enable_xformers_memory_efficient_attention:
        _need(
            "xformers",
            "--enable_xformers_memory_efficient_attention",
            "PyTorch's own fast attention is in use anyway",
        )
    for tracker in trackers(config):
        _need(tracker, f"--report_to {tracker}", "log.jsonl is always written")
    for format in config.export or []:
        if format not in EXPORT_FORMATS:
            raise UserError(f"export={format!r} is unknown: choose among {', '.join(EXPORT_FORMATS)}")
        if is_routed(config.method):
            raise UserError(
                f"--export: a {config.method} adapter has no plain LoRA that equals it: leave --export out, or use "
                "`nora-diffusion export --gate mean` afterwards for an approximation"
            )


def trackers(config: TrainConfig) -> list[str]:
    """The trackers that ``report_to`` asks for, separated by commas; ``all`` means all that are installed."""
    wanted = [word.strip() for word in (config.report_to or "none").lower().split(",")]
    if wanted == ["none"]:
        return []
    if wanted == ["all"]:
        return [name for name in TRACKERS if find_spec(name)]
    unknown = [word for word in wanted if word not in TRACKERS]
    if unknown:
        raise UserError(f"report_to={config.report_to!r} is unknown: choose one of {', '.join(TRACKERS)}, all, none")
    return list(dict.fromkeys(wanted))


def _need(package: str, flag: str, note: str = "") -> None:
    if find_spec(package) is None:
        tail = f" ({note})" if note else ""
        raise UserError(f"{flag} needs the package {package}: install it, or leave the flag out{tail}")
