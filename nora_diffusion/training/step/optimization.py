"""Optimizers, learning rates, schedules, gradient clipping and the norm limit of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from ...adapters import NoraLayer
from ...adapters.deltas.chain import ChainDelta
from ...errors import UserError
from ...formats.keys import is_token
from ...optimizers.lora_pro import LoRAPro
from ...optimizers.lora_rite import LoRARite
from ...optimizers.pairs import Pair, pairs_of
from ..settings.config import PAIRED, Optimizer
from ..settings.resolved import ResolvedConfig

PAIRED_OPTIMIZERS: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    "lora_pro": LoRAPro,
    "lora_rite": LoRARite,
}
"""Optimizers that step both factors of a pair together, see :mod:`nora_diffusion.optimizers`."""


def scaled_rate(rate: float, config: ResolvedConfig, processes: int) -> float:
    """The learning rate; with ``scale_lr`` multiplied by devices, accumulation steps and batch size."""
    factor = config.images_per_step(processes) if config.scale_lr else 1
    return rate * factor


def group_of(name: str) -> Literal["denoiser", "text_encoder", "tokens"]:
    """Parameter group of a trained parameter, by its file key."""
    if is_token(name):
        return "tokens"
    return "text_encoder" if name.startswith("text_encoder") else "denoiser"


def rate_of(name: str, config: ResolvedConfig) -> float:
    """Learning rate of a parameter, by its file key; text encoders and new tokens may have their own.

    LoRA+ (arXiv 2402.12354): the rate of up factors, which start at zero, is ``loraplus_lr_ratio`` times as high.
    """
    is_up = name.endswith((".nora_B", ".nora_B_in"))
    return config.rates[group_of(name)] * (config.loraplus_lr_ratio if is_up else 1.0)


def build_optimizer(
    config: ResolvedConfig,
    parameters: Mapping[str, nn.Parameter],
    processes: int = 1,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """Build ``config.optimizer`` with one parameter group per learning rate.

    ``parameters``: by file key. ``scales``: the scale ``alpha / r`` of each projection, by ``<component>.<path>``
    (default: 1); only optimizers of pairs need it. Raises :class:`UserError` if there are no trained parameters, or no
    pairs for an optimizer of pairs.
    """
    if not parameters:
        raise UserError("there is nothing to train: --target_modules matches no layer of the base")
    if config.optimizer in PAIRED:
        return _paired_optimizer(config, parameters, processes, scales)
    return _optimizer(config, _rate_groups(config, parameters, processes))


def _rate_groups(
    config: ResolvedConfig, parameters: Mapping[str, nn.Parameter], processes: int
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = scaled_rate(rate_of(name, config), config, processes)
        groups.setdefault((group_of(name), rate), []).append(parameter)
    # Weight decay would pull the embeddings of new tokens to zero, away from all other tokens.
    decay = {"tokens": {"weight_decay": 0.0}}
    return [{"params": own, "lr": rate, **decay.get(kind, {})} for (kind, rate), own in groups.items()]


def _paired_optimizer(
    config: ResolvedConfig, parameters: Mapping[str, nn.Parameter], processes: int, scales: Mapping[str, float]
) -> torch.optim.Optimizer:
    """LoRA-Pro or LoRA-RITE: pairs by component, since LoRA+'s ratio is theirs; other parameters as for AdamW."""
    scale_of = {id(value): scales.get(name.rpartition(".nora_")[0], 1.0) for name, value in parameters.items()}
    pairs, others = pairs_of(parameters.items())
    if not pairs:
        raise UserError(
            f"--optimizer {config.optimizer} steps both factors of a product together, and no layer has such a pair: "
            "use --optimizer adamw"
        )
    names = {id(value): name for name, value in parameters.items()}
    groups: dict[tuple[str, float], list[Pair]] = {}
    for pair in pairs:
        name = names[id(pair.A)]
        rate = scaled_rate(rate_of(name, config), config, processes)
        groups.setdefault((group_of(name), rate), []).append(pair._replace(scale=scale_of[id(pair.A)]))
    found = [{"pairs": own, "lr": rate} for (_, rate), own in groups.items()]
    found += _rate_groups(config, {names[id(value)]: value for value in others}, processes)
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon, "lr_ratio": config.loraplus_lr_ratio,
    }  # fmt: skip
    if config.optimizer == "lora_pro":
        options["moments"] = config.lora_pro_moments
    return PAIRED_OPTIMIZERS[config.optimizer](found, **options)


def _optimizer(config: ResolvedConfig, groups: list[dict[str, Any]]) -> Any:
    name = "adamw8bit" if config.use_8bit_adam else config.optimizer
    decay = config.adam_weight_decay
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=config.adam_beta1, weight_decay=decay)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=decay)
    adam: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2), "weight_decay": decay, "eps": config.adam_epsilon,
    }  # fmt: skip
    if name == "adamw8bit":
        return import_module("bitsandbytes").optim.AdamW8bit(groups, **adam)
    if name == "prodigy":
        return import_module("prodigyopt").Prodigy(
            groups, lr=groups[0]["lr"], use_bias_correction=True, safeguard_warmup=True, **adam
        )
    if name == "schedulefree":
        optimizer = import_module("schedulefree").AdamWScheduleFree(groups, warmup_steps=config.lr_warmup_steps, **adam)
        optimizer.train()
        return optimizer
    # On CPUs torch's own choice is a loop in Python, of as many operations with the same result.
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, foreach=True if on_cpu else None, **adam)


def build_schedule(config: ResolvedConfig, optimizer: torch.optim.Optimizer) -> Any:
    """diffusers' learning rate schedule ``config.lr_scheduler``, to be stepped once per optimizer step."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def clip(parameters: Mapping[str, nn.Parameter], max_norm: float) -> float:
    """Clip the gradients to ``max_norm``; returns the norm before clipping."""
    return float(nn.utils.clip_grad_norm_(list(parameters.values()), max_norm))


def drop_finished_gradients(parameters: Mapping[str, nn.Parameter], config: ResolvedConfig, step: int) -> bool:
    """Set gradients to ``None`` for parameters whose fraction of the run is over, so that optimizers skip them.

    Returns whether there were any.
    """
    stopped = False
    fractions = {
        "denoiser": config.denoiser_frac,
        "text_encoder": config.text_encoder_frac,
        "tokens": config.train_text_encoder_ti_frac,
    }
    for name, parameter in parameters.items():
        if step >= fractions[group_of(name)] * config.max_train_steps:
            parameter.grad, stopped = None, True
    return stopped


@torch.no_grad()
def bound_norms(layers: Iterable[NoraLayer], adapter: str, max_norm: float) -> None:
    """Scale each update with ``||scale dW||_F > max_norm`` down to that norm.

    ``dW`` is a product of ``k`` trained factors, so each is multiplied by the ``k``-th root of the ratio. The norm is
    computed as ``sqrt(tr(B^T B A A^T))`` without the dense ``dW``, and without a device synchronization per layer.
    DoRA's magnitude and the scores of a softmax over the ranks are unchanged.
    """
    for layer in layers:
        delta = layer.delta(adapter)
        assert isinstance(delta, ChainDelta)
        down, up = (factor.to(widest_dtype(factor.device)) for factor in delta.pair())
        norm = abs(layer.states[adapter].native_scale) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        kept = {"m", "l"} if delta.rank_scales == "softmax" else {"m"}
        factors = [value for name, value in delta.named_parameters() if name not in kept]
        shrink = (max_norm / norm).clamp(max=1) ** (1 / len(factors))  # 1 if the norm is 0
        for factor in factors:
            factor.mul_(shrink)


def widest_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on Apple GPUs, which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def schedule_state(schedule: Any) -> dict[str, Any]:
    """State of a schedule for JSON, without its lambdas, which are rebuilt from the config."""
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}


def restore_schedule(schedule: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore a schedule and the optimizer's learning rates from :func:`schedule_state`."""
    schedule.load_state_dict({**state, "lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
