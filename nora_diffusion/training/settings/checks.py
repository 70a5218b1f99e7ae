"""Checks of the settings, before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

from ...adapters.presets import PRESETS, default_axes, is_routed, trains_magnitude, trains_pairs
from ...errors import UserError
from ...io.untrusted import require_text
from .config import PAIRED, TRACKERS, Bound, TrainConfig, settings, tagged
from .defaults import with_defaults
from .methods import owners_of, parameters_of
from .rank_allocations import check_rank_allocation
from .strategies import check_strategy

BOUNDS: dict[Bound, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "must be above 0"),
    "not_negative": (lambda value: value >= 0, "must be at least 0"),
    "seed": (lambda value: 0 <= value < 2**64, "must be at least 0 and below 2^64, as for all of PyTorch's seeds"),
    "below_one": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "share": (lambda value: 0 <= value <= 1, "must be a share from 0 to 1, for example 0.1"),
    "fraction": (lambda value: 0 < value <= 1, "is a fraction of the run: it must be above 0 and at most 1"),
}
TO_FREEZE = {"text_encoder_lr": "--train_text_encoder", "token_lr": "--train_text_encoder_ti"}
"""A learning rate of 0 means that this flag is not wanted."""
NOT_OF_GATES = (
    "method", "target_blocks", "basis_from", "start_from", "rank_allocation", "train_text_encoder",
    "train_text_encoder_ti", "strategy",
)  # fmt: skip
"""Settings of adapters that gates do not have, besides those of presets."""
EXPORT_FORMATS = ("diffusers", "kohya", "peft")


def check_config(config: TrainConfig) -> None:
    """Raise :class:`UserError` for the first setting that is out of range, contradictory or unsupported."""
    _check_ranges(config)
    _check_text(config)
    _check_data(config)
    _check_adapter(config)
    _check_prior(config)
    _check_objective(config)
    _check_optimizer(config)
    _check_system(config)
    check_strategy(with_defaults(config))


def _check_ranges(config: TrainConfig) -> None:
    for bound, (is_valid, message) in BOUNDS.items():
        for name in tagged(bound):
            value = getattr(config, name)
            if value is not None and not (is_valid(value) and value != math.inf):
                hint = f": to leave these weights as they are, leave out {TO_FREEZE[name]}" if name in TO_FREEZE else ""
                raise UserError(f"{name}={value} {message}{hint if value == 0 else ''}")


def _check_text(config: TrainConfig) -> None:
    for setting in settings():
        value = getattr(config, setting.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                # A path may have any bytes but a NUL; prompts and words must be text.
                is_word = any(part in setting.name for part in ("prompt", "trigger", "class_word", "abstraction"))
                require_text(text if is_word else text.encode(errors="replace").decode(), setting.name)


def _check_data(config: TrainConfig) -> None:
    if config.joint and not config.subjects:
        raise UserError("--joint needs the list of subjects: give it with --subjects")
    if config.subjects and not config.joint:
        raise UserError(
            "to train several subjects, call training.train_subjects or nora-diffusion train, or set --joint"
        )
    if config.joint and (config.engine != "local" or config.address):
        raise UserError("--joint is a single run: leave out --engine and --address, which distribute several runs")
    if config.engine != "local" or config.address:
        raise UserError("--engine and --address are for several subjects: give a list with --subjects")
    own = [name for name in ("instance_data_dir", "instance_prompt", "trigger", "class_word") if getattr(config, name)]
    if config.joint and own:
        raise UserError(f"--joint reads {own[0]} of each subject from the list: leave out --{own[0]}")
    if not config.instance_data_dir and not config.joint:
        raise UserError("no photos: give the folder of photos with --instance_data_dir")
    if config.use_captions and config.caption_column:
        raise UserError("--use_captions and --caption_column exclude each other: choose one source of captions")
    if config.trigger is not None and not config.trigger.strip():
        raise UserError("the trigger is empty: give a rare word such as 'sks', or leave --trigger out")
    if config.center_crop and config.crop == "subject":
        raise UserError("--center_crop and --crop subject exclude each other: choose one crop")
    if config.joint and config.validation_data_dir:
        raise UserError(
            "--joint needs held-out photos of each subject: use --validation_split instead of --validation_data_dir"
        )
    if config.validation_data_dir and config.validation_split:
        raise UserError(
            "--validation_data_dir and --validation_split exclude each other: choose one source of held-out photos"
        )
    if config.validation_images:
        raise UserError("--validation_images is for image-to-image pipelines; use --validation_prompt here")


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
    if config.gates_of:
        _check_gates(config)
    if config.balance_loss_weight and not (is_routed(config.method) or config.gates_of):
        raise UserError(
            f"--balance_loss_weight has no effect with --method {config.method}: it balances the experts of "
            f"{', '.join(filter(is_routed, PRESETS))}"
        )
    _check_inner_rank(with_defaults(config))
    check_rank_allocation(config)
    _check_start(config)
    _check_calibration(config)
    if config.text_encoder_lr is not None and not config.train_text_encoder:
        raise UserError("--text_encoder_lr needs --train_text_encoder")
    for name in ("token_abstraction", "initializer_concept", "token_lr"):
        if getattr(config, name) is not None and not config.train_text_encoder_ti:
            raise UserError(f"--{name} needs --train_text_encoder_ti")
    for name in ("train_text_encoder", "train_text_encoder_ti"):
        if getattr(config, name) and config.pre_compute_text_embeddings:
            raise UserError(
                f"--pre_compute_text_embeddings and --{name} exclude each other: the embeddings change during training"
            )
    if config.class_labels_conditioning not in (None, "timesteps"):
        raise UserError(
            f"class_labels_conditioning={config.class_labels_conditioning!r} is unknown: only 'timesteps' is supported"
        )


def _check_gates(config: TrainConfig) -> None:
    own = (setting for setting in settings() if owners_of(setting.name) or setting.name in NOT_OF_GATES)
    for setting in own:
        if getattr(config, setting.name) not in (None, setting.default):
            raise UserError(
                f"--{setting.name} has no effect with --gates_of, where only gates are trained: leave it out"
            )


def _check_inner_rank(config: TrainConfig) -> None:
    has_inner = "inner_rank" in parameters_of(config.method) and config.core in (None, "nested")
    if has_inner and config.inner_rank is not None and config.rank is not None and config.inner_rank > config.rank:
        raise UserError(
            f"--inner_rank {config.inner_rank} exceeds --rank {config.rank}: lower --inner_rank, or raise --rank"
        )


def _check_start(config: TrainConfig) -> None:
    if config.start_from is None:
        return
    own = {"basis_from": None, "calibration_prompts": None, "calibration": "generic", "rank_allocation": "uniform"}
    for name, default in own.items():
        if getattr(config, name) != default:
            raise UserError(f"--start_from continues an adapter that exists: leave out --{name}")
    if config.train_text_encoder_ti:
        raise UserError("--start_from cannot continue the training of new tokens: leave out --train_text_encoder_ti")


def _check_calibration(config: TrainConfig) -> None:
    basis = with_defaults(config).basis
    for name, value in {"calibration_prompts": config.calibration_prompts, "calibration": config.calibration}.items():
        if value and value != "generic" and basis != "awsvd":
            raise UserError(f"--{name} needs --basis awsvd, not {basis}")
        if value and value != "generic" and config.basis_from:
            raise UserError(f"--basis_from reuses a basis without calibration: leave out --{name}")
    if basis == "learned" and not (config.basis_from or config.start_from):
        raise UserError("--basis learned needs --basis_from, a folder that `nora-diffusion basis learn` wrote")
    if config.calibration_prompts and config.calibration == "subject":
        raise UserError("--calibration subject uses the prompts of the photos: leave out --calibration_prompts")


def _check_prior(config: TrainConfig) -> None:
    if config.with_prior_preservation:
        if not config.class_prompt and not config.class_word and not config.joint:
            raise UserError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'")
        if config.prior_preservation == "frozen" and config.class_data_dir:
            raise UserError("--prior_preservation frozen needs no class images: leave out --class_data_dir")
        return
    if config.prior_preservation == "frozen":
        raise UserError("--prior_preservation frozen needs --with_prior_preservation and --class_prompt")


def _check_objective(config: TrainConfig) -> None:
    if config.max_timestep is not None and config.min_timestep >= config.max_timestep:
        raise UserError(f"min_timestep={config.min_timestep} must be below max_timestep={config.max_timestep}")
    if config.loss_weighting not in (None, "min_snr") and (config.snr_gamma or 0) > 0:
        raise UserError("--snr_gamma is only for --loss_weighting min_snr: leave out one of them")
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
            "prodigy estimates one learning rate: leave out --text_encoder_lr, --token_lr and --loraplus_lr_ratio"
        )
    if name == "schedulefree" and config.lr_scheduler not in (None, "constant"):
        raise UserError("schedulefree needs no schedule: use --lr_scheduler constant")
    _check_pairs(config)
    if config.scale_weight_norms is not None and is_routed(config.method):
        raise UserError(f"--scale_weight_norms does not support {config.method}, whose updates depend on the input")


def _check_pairs(config: TrainConfig) -> None:
    if config.optimizer != "lora_pro" and config.lora_pro_moments != "full":
        raise UserError(f"--lora_pro_moments is a setting of --optimizer lora_pro, not of {config.optimizer}")
    if config.optimizer not in PAIRED:
        return
    if not trains_pairs(default_axes(config.method)):
        able = [method for method in PRESETS if trains_pairs(default_axes(method))]
        raise UserError(
            f"--optimizer {config.optimizer} steps both factors of a product together, and --method {config.method} "
            f"trains no such pair: use --method {', '.join(able)}, or --optimizer adamw"
        )
    if config.core not in (None, "nested"):
        raise UserError(
            f"--optimizer {config.optimizer} needs a trained pair, and --core {config.core} has none: leave out "
            "--core, or use --optimizer adamw"
        )


def _check_system(config: TrainConfig) -> None:
    if config.quantize_base:
        _need("torchao", "--quantize_base", "pip install 'nora-diffusion[quantize]'")
        if config.magnitude or trains_magnitude(config.method):
            raise UserError(
                "--quantize_base excludes DoRA's magnitude, which needs the original weights: leave out one of them"
            )
        if not config.gradient_checkpointing:
            raise UserError(
                "--quantize_base needs --gradient_checkpointing: without it, the dequantized weights of all layers "
                "are saved for the backward pass, and the run needs more memory instead of less"
            )
    if config.use_8bit_adam:
        _need("bitsandbytes", "--use_8bit_adam")
    if config.enable_xformers_memory_efficient_attention:
        _need(
            "xformers",
            "--enable_xformers_memory_efficient_attention",
            "PyTorch's fused attention is used anyway",
        )
    for tracker in trackers(config):
        _need(tracker, f"--report_to {tracker}", "log.jsonl is always written")
    for name in config.export or []:
        if name not in EXPORT_FORMATS:
            raise UserError(f"export={name!r} is unknown: choose among {', '.join(EXPORT_FORMATS)}")
        if is_routed(config.method):
            raise UserError(
                f"--export: no plain LoRA equals a {config.method} adapter: leave out --export, or approximate it "
                "afterwards with `nora-diffusion export --gate mean`"
            )


def trackers(config: TrainConfig) -> list[str]:
    """Trackers in ``report_to``; ``all`` means all that are installed."""
    names = [word.strip() for word in (config.report_to or "none").lower().split(",")]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in TRACKERS if find_spec(name)]
    unknown = [word for word in names if word not in TRACKERS]
    if unknown:
        raise UserError(f"report_to={config.report_to!r} is unknown: choose one of {', '.join(TRACKERS)}, all, none")
    return list(dict.fromkeys(names))


def _need(package: str, flag: str, note: str = "") -> None:
    if find_spec(package) is None:
        hint = f" ({note})" if note else ""
        raise UserError(f"{flag} needs the package {package}: install it, or leave out the flag{hint}")
