"""Low-rank pairs among the parameters of a model, found by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


class Pair(NamedTuple):
    """The factors of one update ``dW = s B A``: ``A [r, ...]``, ``B [d_out, r, ...]``, ``scale`` the ``s``.

    A factor of a convolution may keep its kernel's shape. ``A [r, d_in / n]`` with ``B [d_out, r / n]`` is a stack of
    ``n`` pairs on the diagonal of ``dW`` (MELoRA, arXiv 2402.17263).
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float = 1.0

    @property
    def blocks(self) -> int:
        """The number ``n`` of pairs on the diagonal, 1 of a plain pair. Raises ``ValueError`` if it is no pair."""
        ranks, columns = self.A.shape[0], self.B.flatten(1).shape[1]
        if not columns or not ranks or ranks % columns or self.B.shape[0] % (ranks // columns):
            raise ValueError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are no pair: the rows of A are the columns of B"
            )
        return ranks // columns


DOWN_NAMES = (
    (re.compile(r"(^|\.)nora_A_in$"), ("nora_B_in", "nora_B")),
    (re.compile(r"(^|\.)nora_A$"), ("nora_B",)),
    (re.compile(r"(^|\.)lora_A(?=\.|$)"), ("lora_B",)),
    (re.compile(r"(^|\.)lora_down(?=\.|$)"), ("lora_up",)),
    (re.compile(r"(^|\.)lora\.down(?=\.|$)"), ("lora.up",)),
)
"""How the name of a down factor says what its up factor may be called: our files, PEFT, kohya, diffusers."""
UNPAIRED = ("nora_W_g", "nora_l")
"""Factors beside which ``B A`` is not the update: a mixture's router, scales of the ranks."""


def pairs_of(named: Named, scale: float | Callable[[str], float] = 1.0) -> tuple[list[Pair], list[nn.Parameter]]:
    """The pairs among the trained parameters, and all others; frozen ones are left out.

    Known names: ``nora_A`` and ``nora_B``, ``nora_A_in`` and ``nora_B_in`` (or ``nora_B``) of this package, ``lora_A``
    and ``lora_B`` of PEFT, ``lora_down`` and ``lora_up`` of kohya, ``lora.down`` and ``lora.up`` of diffusers. Factors
    of mixtures and of ranks with scales are no pairs. ``scale``: ``alpha / r``, or a function of the name of ``A``.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    pairs, paired = [], set()
    for name, parameter in trained.items():
        up = next((other for other in up_names(name) if other in trained), None)
        if up is not None and not _is_scaled(name, trained):
            pairs.append(Pair(parameter, trained[up], scale(name) if callable(scale) else scale))
            paired |= {name, up}
    return pairs, [parameter for name, parameter in trained.items() if name not in paired]


def up_names(name: str) -> list[str]:
    """The names that the up factor of a down factor may have; none if ``name`` is no down factor."""
    for pattern, ups in DOWN_NAMES:
        if found := pattern.search(name):
            return [f"{name[: found.start()]}{found[1]}{up}{name[found.end() :]}" for up in ups]
    return []


def _is_scaled(name: str, trained: dict[str, nn.Parameter]) -> bool:
    module = name.rpartition(".")[0]
    return any(f"{module}.{factor}" in trained for factor in UNPAIRED)


def as_matrices(factor: Tensor, blocks: int) -> Tensor:
    """Stacked factors ``[n, rows, ...]`` as ``[n blocks, rows / blocks, columns]``; a view where there is one."""
    rows = factor.shape[1] // blocks
    return factor.reshape(len(factor) * blocks, rows, -1)
