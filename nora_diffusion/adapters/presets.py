"""Methods: each is one function that returns a config. See ``docs/architecture.md`` for how to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bases import Basis, Placement
from .config import AdapterConfig, Router

Targets = str | list[str] | None


def nora(
    r: int = 32,
    inner_r: int = 4,
    alpha: float | None = None,
    basis: Basis = "awsvd",
    placement: Placement = "sqrt",
    power: float = 0.5,
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> AdapterConfig:
    """NoRA: ``dW = (alpha/r) B_out B_in A_in A_out``, outer pair frozen, inner pair trained.

    ``2 r r'`` trained numbers a projection. https://arxiv.org/abs/2408.10280
    """
    return AdapterConfig(
        method="nora", r=r, inner_r=inner_r, alpha=alpha, basis=basis, placement=placement, power=power,
        core="nested", dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


def mor(
    r: int = 32,
    num_experts: int = 8,
    alpha: float | None = None,
    router: Router = "token",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> AdapterConfig:
    """MoR: ``dy = (alpha/r) sum_i g_i(x) diag(b_i) B diag(a_i) A x``, ``g = softmax(W_g x)`` per token.

    The published best is r = 32 with 8 experts; more than 12 experts or rank above 64 hurts. https://arxiv.org/abs/2410.13408
    """
    return AdapterConfig(
        method="mor", r=r, num_experts=num_experts, alpha=alpha, basis="kaiming", core="none", inner_r=1,
        router=router, dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


def lora(
    r: int = 8, alpha: float | None = None, dropout: float = 0.0, target_modules: Targets = None, **axes: Any
) -> AdapterConfig:
    """LoRA: ``dW = (alpha/r) B A``, both trained. https://arxiv.org/abs/2106.09685"""
    return AdapterConfig(
        method="lora", r=r, alpha=alpha, basis="kaiming", core="none", inner_r=1,
        dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


def lora_xs(
    r: int = 32,
    alpha: float | None = None,
    basis: Basis = "svd",
    placement: Placement = "up",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> AdapterConfig:
    """LoRA-XS: ``dW = (alpha/r) B R A`` with a frozen SVD pair and one trained ``R [r, r]``.

    https://arxiv.org/abs/2405.17604
    """
    return AdapterConfig(
        method="lora_xs", r=r, alpha=alpha, basis=basis, placement=placement, core="dense", inner_r=1,
        dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


PRESETS: dict[str, Callable[..., AdapterConfig]] = {"nora": nora, "mor": mor, "lora": lora, "lora_xs": lora_xs}
