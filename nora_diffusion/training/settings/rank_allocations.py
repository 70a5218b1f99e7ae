"""What each rank allocation needs of the other settings, and of an adapter before the first step. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from ...adapters.axes import RankScales
from ...adapters.presets import PRESETS, default_axes
from ...errors import UserError
from .config import TrainConfig


class RankStart(NamedTuple):
    """How ranks that move start.

    ``factor``: ranks of a layer at the start by the mean rank at the end, which the settings give. ``scales``: the
    trained scales of the ranks. ``by_depth``: ranks grow with the depth of the layer, as of PRILoRA.
    """

    factor: float = 1.0
    scales: RankScales = "none"
    by_depth: bool = False


STARTS: dict[str, RankStart] = {
    "adalora": RankStart(1.5, "linear"),  # b0 = 1.5 b in the paper
    "dynamic_dora": RankStart(1.5, "linear"),  # as its published code
    "alora": RankStart(2.0),  # room for the ranks that a layer may get
    "prilora": RankStart(by_depth=True),
    "heterolora": RankStart(2.0),  # half of the layers keep it
    "heterolora_once": RankStart(2.0),
    "beamlora": RankStart(scales="softmax"),
}
"""By the rank allocations that act while an adapter trains."""
TRIPLETS_RATE = 4.0
"""The rate of ``P diag(l) Q`` in units of LoRA's, measured on the embedded base (docs/adapters.md): all of it starts at
``l = 0`` with vectors of norm 1, and a step of ``l`` moves a rank less than one of LoRA's ``B`` does."""
BY_PAIR = ("adamw8bit", "lora_pro", "lora_rite")
"""Optimizers whose state has no entries of single ranks, which could be cleared or copied."""


def rate_factor(config: TrainConfig) -> float:
    """The default learning rate in units of the method's own."""
    start = STARTS.get(config.rank_allocation, RankStart())
    has_pair = default_axes(config.method).core == "none"  # measured for LoRA; inner pairs have high rates as they are
    return TRIPLETS_RATE if has_pair and start.scales == "linear" else 1.0


def check_rank_allocation(config: TrainConfig) -> None:
    """Raise :class:`UserError` if the settings do not go with the rank allocation."""
    allocation = config.rank_allocation
    if allocation == "uniform":
        return
    able = [method for method in PRESETS if _has_ranks_to_move(method, inner_only=allocation == "gradient")]
    if config.method not in able:
        needed = (
            "frozen outer factors with an inner rank" if allocation == "gradient" else "two trained factors in a row"
        )
        raise UserError(f"--rank_allocation {allocation} needs {needed}: use --method {', '.join(able)}")
    if config.core not in (None, "nested"):
        raise UserError(f"--rank_allocation {allocation} needs an inner rank, which --core {config.core} does not have")
    if config.ema_decay and allocation in STARTS:
        raise UserError(
            f"--ema_decay averages ranks that --rank_allocation {allocation} removes or replaces: leave out one of them"
        )

    optimizer = "adamw8bit" if config.use_8bit_adam else config.optimizer
    if allocation in STARTS and optimizer in BY_PAIR:
        raise UserError(
            f"--optimizer {optimizer} keeps no state of single ranks, which --rank_allocation {allocation} moves: use "
            "--optimizer adamw"
        )


def _has_ranks_to_move(method: str, inner_only: bool) -> bool:
    axes = default_axes(method)
    if axes.core in ("nested", "input"):
        return True
    return not inner_only and axes.core == "none" and axes.router == "none" and axes.blocks == 1 and not axes.rank_mask
