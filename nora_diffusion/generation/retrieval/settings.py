"""How adapters are chosen for prompts that name none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UserError
from ..settings import check_range

AutoMode = Literal["mixture", "fusion", "selection"]
MAX_AUTO = 16


@dataclass(frozen=True)
class Auto:
    """How adapters are chosen for a prompt without tags: at most ``k``, fewer if fewer suit it.

    ``mode`` (https://arxiv.org/abs/2402.09997), with ``n`` chosen adapters:

    - ``mixture``: the mean of their outputs, ``y = W x + 1/n sum_i delta_i(x)``.
    - ``fusion``: the mean of their weights, ``W + 1/n sum_i dW_i``. The same as ``mixture`` for adapters whose update
      is a matrix ``dW``. Those with a router have none and are refused. The matrices are averaged, not their factors:
      a mean of factors depends on how ``dW`` is split into them, and needs equal ranks.
    - ``selection``: the best one alone, ``W x + delta_1(x)``.
    """

    k: int
    mode: AutoMode = "mixture"

    def check(self) -> None:
        """Raises :class:`UserError` for an invalid setting."""
        check_range("auto", self.k, 1, MAX_AUTO)
        if self.mode not in get_args(AutoMode):
            raise UserError(f"auto_mode={self.mode!r} is unknown: choose one of {', '.join(get_args(AutoMode))}")
