"""What each strategy asks of the other settings. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...adapters.presets import default_axes, is_routed
from ...errors import UserError
from .config import TrainConfig

OWN: dict[str, dict[str, Any]] = {"chain": {"chain_links": 2}, "reslora": {"shortcut": "block"}}
"""The settings of one strategy only, with their defaults."""
SCHEDULED = ("chain", "flat")
"""Strategies whose steps depend on the number of all steps."""
SEPARABLE_OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
"""Optimizers that update each value by its own gradients, and can start anew."""

ALL = ("chain", "reslora", "flat", "halora")
ON_PAIRS = ("chain", "reslora", "halora")
ON_WEIGHTS = ("flat", "halora")


class Obstacle(NamedTuple):
    """A setting that some strategies do not go with, and why."""

    strategies: Sequence[str]
    is_there: Callable[[TrainConfig], bool]
    reason: str


def has_magnitude(config: TrainConfig) -> bool:
    """Whether the adapter has DoRA's magnitude."""
    return config.magnitude or default_axes(config.method).magnitude


def has_dense_core(config: TrainConfig) -> bool:
    """Whether a square matrix is trained, and not a pair of factors."""
    return (config.core or default_axes(config.method).core) in ("dense", "diagonal")


def has_blocks(config: TrainConfig) -> bool:
    """Whether the factors are block-diagonal."""
    return (config.blocks or default_axes(config.method).blocks) > 1


def inner_ranks(config: TrainConfig) -> int | None:
    """The inner rank of all links of a chain together; ``None`` if the method has no inner rank."""
    if not default_axes(config.method).has_inner_rank or config.inner_rank is None:
        return None
    return config.inner_rank * (config.chain_links or 1)


def _exceeds_outer_rank(config: TrainConfig) -> bool:
    total = inner_ranks(config)
    return total is not None and config.rank is not None and total > config.rank


OBSTACLES = (
    Obstacle(
        ALL,
        lambda config: is_routed(config.method),
        "the experts of --method {method} have no single pair in a layer: use a method without experts",
    ),
    Obstacle(
        ("chain",),
        lambda config: config.start_from is not None,
        "its links start anew: leave out --start_from",
    ),
    Obstacle(
        ON_PAIRS, has_dense_core, "--method {method} trains a square core, not a pair of factors: use lora or nora"
    ),
    Obstacle(ON_PAIRS, has_blocks, "the block-diagonal factors of --method {method} are no single pair: use lora"),
    Obstacle(
        ALL,
        has_magnitude,
        "DoRA's magnitude rescales the frozen weight: leave out --magnitude, or use --method lora",
    ),
    Obstacle(
        ("chain", "reslora"),
        lambda config: default_axes(config.method).rank_mask,
        "--method {method} draws the rank of each step: use --method lora",
    ),
    Obstacle(
        ("chain", "reslora"),
        lambda config: config.rank_allocation != "uniform",
        "it needs the same ranks in every step: leave out --rank_allocation {rank_allocation}",
    ),
    Obstacle(
        ON_WEIGHTS,
        lambda config: config.quantize_base is not None,
        "it adds noise to the frozen weights, which are rounded to 8 bits: leave out --quantize_base",
    ),
    Obstacle(
        ("chain",),
        lambda config: config.optimizer not in SEPARABLE_OPTIMIZERS,
        "--optimizer {optimizer} cannot start anew at each link: use " + ", ".join(SEPARABLE_OPTIMIZERS),
    ),
    Obstacle(
        ("chain",),
        lambda config: config.scale_weight_norms is not None,
        "earlier links are frozen, so that the norm cannot be lowered: leave out --scale_weight_norms",
    ),
    Obstacle(
        ("chain",),
        _exceeds_outer_rank,
        "{chain_links} links of --inner_rank {inner_rank} exceed --rank {rank}: lower one of the first two, or raise "
        "--rank",
    ),
    Obstacle(
        ("reslora",),
        lambda config: config.shortcut == "block" and "down" not in default_axes(config.method).trained,
        "the sum of pairs in different frozen bases is no {method} adapter: use --shortcut input or middle, or lora",
    ),
)


def check_strategy(config: TrainConfig) -> None:
    """Raise :class:`UserError` for settings that the strategy does not go with; ``config`` has its defaults."""
    for strategy, settings in OWN.items():
        for name in settings:
            if getattr(config, name) is not None and config.strategy != strategy:
                raise UserError(f"--{name} needs --strategy {strategy}")
    for obstacle in OBSTACLES:
        if config.strategy in obstacle.strategies and obstacle.is_there(config):
            raise UserError(f"--strategy {config.strategy}: {obstacle.reason.format(**config.to_dict())}")
