"""Methods: each is one function that returns a config. See ``docs/architecture.md`` for how to add one.

A preset's own parameters, with their defaults, are the settings that the method has: the trainer's flags, its checks
and the app's form follow from them (:func:`options`). Other axes of :class:`.config.AdapterConfig` can be given by
keyword. The bodies below return the axes only, so that a method can be described without torch (:func:`default_axes`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from .axes import Axes, Basis, CoreKind, Placement, Router, RouterInput, Targets

if TYPE_CHECKING:
    from .config import AdapterConfig

Point = dict[str, Any]
"""The axes of an adapter that differ from their defaults."""
Settings = ParamSpec("Settings")


def _preset(point: Callable[Settings, Point]) -> Callable[Settings, AdapterConfig]:
    """Decorate a function that returns the axes of a method: the result returns its config."""

    @functools.wraps(point)
    def config(*args: Settings.args, **kwargs: Settings.kwargs) -> AdapterConfig:
        # Imported late, since both import torch and peft. Importing the tuner registers it with PEFT.
        from . import tuner  # noqa: F401
        from .config import AdapterConfig

        return AdapterConfig(**point(*args, **kwargs))

    config.__dict__["__signature__"] = inspect.signature(point).replace(return_annotation="AdapterConfig")
    return config


def _point(method: str, **axes: Any) -> Point:
    return {"method": method, **axes}


def _pair(method: str, **axes: Any) -> Point:
    """LoRA and its relatives: a trained outer pair with a random down factor, and no core."""
    # Given here, so that a caller who passes one of them gets an error: it would have no effect.
    return _point(method, basis="kaiming", core="none", inner_r=1, **axes)


@_preset
def nora(
    r: int = 32,
    inner_r: int = 4,
    alpha: float | None = None,
    basis: Basis = "awsvd",
    dropout: float = 0.0,
    target_modules: Targets = None,
    placement: Placement = "sqrt",
    power: float = 0.5,
    core: CoreKind = "nested",
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """NoRA: ``dW = (alpha/r) B_out B_in A_in A_out``, outer pair frozen, inner pair trained.

    ``2 r r'`` trained numbers a projection; the core may also be ``dense`` or ``diagonal``.
    https://arxiv.org/abs/2408.10280
    """
    return _point(
        "nora", r=r, inner_r=inner_r, alpha=alpha, basis=basis, placement=placement, power=power,
        core=core, dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def nora_input(
    r: int = 32,
    inner_r: int = 4,
    alpha: float | None = None,
    basis: Basis = "awsvd",
    dropout: float = 0.0,
    target_modules: Targets = None,
    placement: Placement = "sqrt",
    power: float = 0.5,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """One-sided NoRA: ``dW = (alpha/r) B A_in A_out``, ``A_out [r, d_in]`` frozen, ``A_in [r', r]``, ``B`` trained.

    A frozen output side costs quality (docs/benchmark.md), so only the input side is frozen: ``r' (r + d_out)`` trained
    parameters a projection. Follows https://arxiv.org/abs/2408.10280
    """
    return _point(
        "nora_input", r=r, inner_r=inner_r, alpha=alpha, basis=basis, placement=placement, power=power,
        core="input", dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def mor(
    r: int = 32,
    num_experts: int = 8,
    alpha: float | None = None,
    router: Router = "token",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> Point:
    """MoR: ``dy = (alpha/r) sum_i g_i diag(b_i) B diag(a_i) A x``, ``g = softmax(W_g c)``.

    The router looks at ``c``: the token, the prompt, the timestep or the last two
    (``nora_diffusion.pipelines.router_inputs``).
    The published best is r = 32 with 8 experts; more than 12 experts or rank above 64 hurts. https://arxiv.org/abs/2410.13408
    """
    return _pair(
        "mor", r=r, num_experts=num_experts, alpha=alpha,
        router=router, dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


@_preset
def lora(
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """LoRA: ``dW = (alpha/r) B A``, both trained. https://arxiv.org/abs/2106.09685"""
    return _pair("lora", r=r, alpha=alpha, dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes)


@_preset
def lora_xs(
    r: int = 32,
    alpha: float | None = None,
    basis: Basis = "svd",
    placement: Placement = "up",
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """LoRA-XS: ``dW = (alpha/r) B R A`` with a frozen SVD pair and one trained ``R [r, r]``.

    https://arxiv.org/abs/2405.17604
    """
    return _point(
        "lora_xs", r=r, alpha=alpha, basis=basis, placement=placement, core="dense", inner_r=1,
        dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def lora_mini(
    r: int = 32,
    inner_r: int = 4,
    alpha: float | None = None,
    basis: Basis = "kaiming",
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """LoRA-Mini: ``dW = (alpha/r) B_out B_in A_in A_out``, outer pair frozen and random, inner pair trained.

    The same chain as NoRA in subspaces that know nothing of the weight. https://arxiv.org/abs/2411.15804
    """
    return _point(
        "lora_mini", r=r, inner_r=inner_r, alpha=alpha, basis=basis, core="nested",
        dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def dora(
    r: int = 8, alpha: float | None = None, dropout: float = 0.0, target_modules: Targets = None, **axes: Any
) -> Point:
    """DoRA: ``W' = m (W + dW) / ||W + dW||`` by rows, ``dW = (alpha/r) B A``; ``m``, ``A``, ``B`` trained.

    Any other preset without a router takes ``magnitude=True``. https://arxiv.org/abs/2402.09353
    """
    return _pair("dora", r=r, alpha=alpha, magnitude=True, dropout=dropout, target_modules=target_modules, **axes)


@_preset
def mora(
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """MoRA: ``dW = (alpha/r) D M C``, one trained ``M [k, k]``, fixed maps, ``k = sqrt((d_in + d_out) r)``.

    The numbers of a LoRA of rank ``r`` at the rank ``k``. ``C`` adds up the channels of each group, ``D`` copies each
    number to its group (the paper's sharing, eq. 6). https://arxiv.org/abs/2405.12130
    """
    return _point(
        "mora", r=r, alpha=alpha, basis="sharing", core="dense", inner_r=1,
        dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def melora(
    r: int = 32,
    blocks: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """MELoRA: ``dW = (alpha/r) diag(B_1 A_1, ..., B_n A_n)``: ``n`` mini LoRAs of rank ``r / n``, all trained.

    Rank ``r`` in all, for the numbers of a LoRA of rank ``r / n``. https://arxiv.org/abs/2402.17263
    """
    return _pair(
        "melora", r=r, blocks=blocks, alpha=alpha,
        dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def dylora(
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Targets = None,
    magnitude: bool = False,
    **axes: Any,
) -> Point:
    """DyLoRA: ``dW = (alpha/r) B[:, :b] A[:b]``, ``b`` drawn from 1 to ``r`` at every training step.

    One file then serves every rank up to ``r`` (``set_rank``, ``export_lora(rank=...)``). The paper scales by
    ``alpha/b``; here it stays ``alpha/r``, so that a lower rank is the same adapter cut short, in any format.
    https://arxiv.org/abs/2210.07558
    """
    return _pair(
        "dylora", r=r, alpha=alpha, rank_mask=True,
        dropout=dropout, target_modules=target_modules, magnitude=magnitude, **axes,
    )  # fmt: skip


@_preset
def moe_lora(
    r: int = 4,
    num_experts: int = 8,
    alpha: float | None = None,
    router: Router = "token",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> Point:
    """MoE-LoRA: ``dy = (alpha/r) sum_i g_i B_i A_i x``, ``g = softmax(W_g c)``: the baseline that MoR shrinks.

    ``num_experts`` independent pairs of rank ``r`` each, with MoR's routers. https://arxiv.org/abs/2310.18339
    """
    return _pair(
        "moe_lora", r=r, num_experts=num_experts, alpha=alpha,
        router=router, experts="independent", dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


@_preset
def malora(
    r: int = 8,
    inner_r: int = 6,
    num_experts: int = 8,
    alpha: float | None = None,
    router: Router = "token",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> Point:
    """MALoRA: ``dy = (alpha/r) sum_i g_i B_i P_i A x``, ``g = softmax(W_g c)``: MoE-LoRA with a shared down factor.

    All experts share the subspace ``A [r, d_in]``; each has ``P_i [r', r]`` and ``B_i [d_out, r']``, of a higher rank
    than an expert of MoE-LoRA for as many parameters. The trainer adds a balance loss (``balance_loss_weight``).
    The paper's gates are sparse (top 2); these are dense. https://arxiv.org/abs/2410.22782
    """
    return _point(
        "malora", r=r, inner_r=inner_r, num_experts=num_experts, alpha=alpha, basis="kaiming", core="none",
        router=router, experts="projected", dropout=dropout, target_modules=target_modules, **axes,
    )  # fmt: skip


@_preset
def milora(
    r: int = 8,
    top_k: int = 4,
    alpha: float | None = None,
    router: RouterInput = "prompt",
    dropout: float = 0.0,
    target_modules: Targets = None,
    **axes: Any,
) -> Point:
    """MiLoRA: ``dy = (alpha/r) g_m B_m A_m x``, ``g = top_k(softmax(W_g c))`` over the modules ``m`` of a block.

    Each module of a transformer block has a LoRA, and these are the experts of one router for the block, which decides
    once for a prompt: ``c`` is the mean of the prompt's embeddings, where the paper pools the hidden states before each
    block. Modules of text encoders have no gate. Not the MiLoRA of minor singular components (2406.09044).
    https://arxiv.org/abs/2410.18035
    """
    return _point(
        "milora", r=r, top_k=top_k, alpha=alpha, basis="kaiming", core="none", inner_r=1, router=router,
        experts="modules", dropout=dropout,
        target_modules=["attn", "ff"] if target_modules is None else target_modules, **axes,
    )  # fmt: skip


PRESETS: dict[str, Callable[..., AdapterConfig]] = {
    "nora": nora,
    "nora_input": nora_input,
    "mor": mor,
    "moe_lora": moe_lora,
    "malora": malora,
    "milora": milora,
    "lora": lora,
    "lora_xs": lora_xs,
    "lora_mini": lora_mini,
    "dora": dora,
    "mora": mora,
    "melora": melora,
    "dylora": dylora,
}
TRAINER_RANKS = {"mor": 8, "lora": 4, "dora": 4, "mora": 4, "melora": 16}
"""The rank that the trainer uses where none is given, if it is not the preset's own (4 is diffusers' for LoRA)."""


def options(method: str) -> dict[str, Any]:
    """The settings that a method has, with their defaults: the named parameters of its preset."""
    parameters = inspect.signature(PRESETS[method]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


@functools.cache
def default_axes(method: str) -> Axes:
    """The axes of a method at its defaults. Unlike its config, they need no torch."""
    return Axes(**inspect.unwrap(PRESETS[method])())


def is_routed(method: str) -> bool:
    """Whether a method has experts and a router, so that no single ``dW`` equals it."""
    return "router" in options(method)


def trains_magnitude(method: str) -> bool:
    """Whether a method trains DoRA's magnitude without being asked to."""
    return default_axes(method).magnitude


def samples_rank(method: str) -> bool:
    """Whether a method draws a rank at every training step (DyLoRA)."""
    return default_axes(method).rank_mask


def trains_pairs(axes: Axes) -> bool:
    """Whether both factors of a product ``B A`` are trained, which optimizers of pairs step together.

    Not those of a mixture, nor where ranks have scales of their own.
    """
    if axes.router != "none" or axes.rank_scales != "none":
        return False
    return axes.core in ("nested", "input") or (axes.core == "none" and {"down", "up"} <= {*axes.trained})
