"""What optimizers of pairs share: groups of pairs, stacks of equal shapes, AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .pairs import Pair, as_matrices

Group = dict[str, Any]
Params = Iterable[Pair | nn.Parameter | Group]


@dataclass(frozen=True)
class Stack:
    """Pairs of equal shapes and steps, whose matrices are computed on together."""

    pairs: Sequence[Pair]
    dtype: torch.dtype

    @cached_property
    def downs(self) -> list[nn.Parameter]:
        """The down factors."""
        return [pair.A for pair in self.pairs]

    @cached_property
    def ups(self) -> list[nn.Parameter]:
        """The up factors."""
        return [pair.B for pair in self.pairs]

    @cached_property
    def blocks(self) -> int:
        """The number of pairs on the diagonal of each update."""
        return self.pairs[0].blocks

    @cached_property
    def scales(self) -> Tensor:
        """The scale ``s`` of each matrix, ``[n, 1, 1]``."""
        scales = torch.tensor([pair.scale for pair in self.pairs], dtype=self.dtype, device=self.pairs[0].A.device)
        return scales.repeat_interleave(self.blocks)[:, None, None]

    def matrices(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of each pair, shaped like its ``A`` or ``B``, as matrices ``[n, rows, columns]``; a copy."""
        return as_matrices(torch.stack(list(tensors)).to(self.dtype), self.blocks)

    def gradients(self, factors: Sequence[nn.Parameter]) -> Tensor:
        """The gradients of these factors as matrices; a missing one is 0."""
        return self.matrices([torch.zeros_like(p) if p.grad is None else p.grad for p in factors])

    def write(self, factors: Sequence[nn.Parameter], matrices: Tensor) -> None:
        """Set the factors to the matrices, rounded to their dtype."""
        values = matrices.view(len(factors), *factors[0].shape).unbind()
        torch._foreach_copy_(list(factors), list(values))


class PairedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that step both factors of a :class:`Pair` together, and other parameters by AdamW.

    ``params``: pairs and parameters, mixed, or groups of options: ``{"pairs": [...], ...}`` or ``{"params": [...],
    ...}``. The rate of ``B`` is ``lr_ratio`` times that of ``A`` (LoRA+, arXiv 2402.12354). Weight decay is decoupled.
    The matrices of pairs that are alike are stacked, so that a step has few operations; all is computed at least in
    fp32. A pair of which neither factor has a gradient is skipped; of one factor alone, the gradient is 0.

    Raises ``ValueError`` for factors that are no pair, and for options out of range.
    """

    def __init__(self, params: Params, **options: Any) -> None:
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas={options['betas']}: both must be at least 0 and below 1")
        for name in ("lr", "eps", "weight_decay", "lr_ratio"):
            if not options[name] >= 0:
                raise ValueError(f"{name}={options[name]} must be at least 0")
        self._stacked: dict[tuple[str, int], tuple[Tensor, tuple[Tensor, ...]]] = {}
        super().__init__(_groups(params), options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with ``pairs`` or with ``params``, and options that differ from those of the optimizer."""
        group = dict(param_group)
        if "pairs" in group:
            if "params" in group:
                raise ValueError("a group has pairs or params: make two groups of them")
            pairs = [Pair(*pair) for pair in group.pop("pairs")]
            for pair in pairs:
                _check(pair)
            # Tensors in options would not be saved as parameters: the factors stand in turn, beside their scales.
            group["params"] = [factor for pair in pairs for factor in (pair.A, pair.B)]
            group["scales"] = [float(pair.scale) for pair in pairs]
        group.setdefault("scales", None)
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacked = {}

    def load_state_dict(self, state_dict: Group) -> None:
        """As ``Optimizer.load_state_dict``, which rounds the fp32 state of parameters in half precision: not here."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        owners = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, owner in zip(saved, owners, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[owner][key] = value.detach().to(owner.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all pairs and parameters that have gradients; return the loss of ``closure``, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["scales"] is None:
                self._step_others(group)
                continue
            for number, stack in self._stacks(group):
                self._step_pairs(stack, group, number)
        return loss

    def _step_pairs(self, stack: Stack, group: Group, step: int) -> None:
        """Step number ``step``, counted from 1, of the pairs in ``stack``."""
        raise NotImplementedError

    def _stacks(self, group: Group) -> list[tuple[int, Stack]]:
        """The pairs with gradients by shape, and the number of their step, which is counted here."""
        alike: dict[Any, list[Pair]] = {}
        factors = iter(group["params"])
        for down, up, scale in zip(factors, factors, group["scales"], strict=True):
            if down.grad is None and up.grad is None:
                continue
            number = self.state[down].get("step", 0) + 1
            self.state[down]["step"] = self.state[up]["step"] = number
            key = number, down.shape, up.shape, down.dtype, up.dtype, down.device
            alike.setdefault(key, []).append(Pair(down, up, scale))
        return [
            (key[0], Stack(pairs, torch.promote_types(torch.promote_types(key[3], key[4]), torch.float32)))
            for key, pairs in alike.items()
        ]

    def _state(self, stack: Stack, owners: Sequence[nn.Parameter], name: str, shape: Sequence[int]) -> Tensor:
        """The state ``name`` of all pairs, ``[n pairs, *shape]``, zero at first, to be changed in place.

        The state of each parameter is a view of it, so that nothing is copied, until somebody replaces it (a loaded
        state): then the values are stacked again.
        """
        key = name, id(owners[0])
        held = self._stacked.get(key)
        if (
            held is None
            or len(held[1]) != len(owners)
            or not all(self.state[p].get(name) is view for p, view in zip(owners, held[1], strict=True))
        ):
            zero = torch.zeros(*shape, dtype=stack.dtype, device=owners[0].device)
            whole = torch.stack([self.state[p].get(name, zero).to(zero) for p in owners])
            held = self._stacked[key] = whole, whole.unbind()
            for parameter, view in zip(owners, held[1], strict=True):
                self.state[parameter][name] = view
        return held[0]

    def _factor_state(self, stack: Stack, owners: Sequence[nn.Parameter], name: str) -> Tensor:
        """A state that is shaped like the factors, as matrices; a view."""
        return as_matrices(self._state(stack, owners, name, owners[0].shape), stack.blocks)

    def _step_others(self, group: Group) -> None:
        """torch's AdamW."""
        owners = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in owners:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if not owners:
            return
        steps, means, squares = ([self.state[p][key] for p in owners] for key in ("step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        adamw(
            owners, [p.grad for p in owners], means, squares, [], steps, foreach=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def _groups(params: Params) -> list[Group]:
    """Groups as they are; pairs and parameters in a group of each kind."""
    given = list(params)
    groups = [item for item in given if isinstance(item, dict)]
    pairs = [item for item in given if isinstance(item, tuple)]
    others = [item for item in given if isinstance(item, Tensor)]
    return [*groups, *([{"pairs": pairs}] if pairs else []), *([{"params": others}] if others else [])]


def _check(pair: Pair) -> None:
    if not pair.blocks or not pair.scale:
        raise ValueError("a pair with scale 0 has no effect: leave it out")
    if pair.A.device != pair.B.device:
        raise ValueError(f"the factors of a pair are on {pair.A.device} and {pair.B.device}: move them together")
