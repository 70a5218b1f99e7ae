"""Build the delta that a config describes for one projection."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..config import AdapterConfig, Start
from ..deltas import functional
from ..deltas.bases import BASES, Pair
from ..deltas.chain import ChainDelta, Delta
from ..deltas.cores import Core, DenseCore, DiagonalCore, InputCore, NestedCore
from ..deltas.gated import GatedDelta
from ..deltas.magnitude import start_magnitude
from ..deltas.routed import Experts, FrozenExperts, IndependentExperts, ProjectedExperts, RoutedDelta, SharedExperts
from ..shapes import Shape, inner_rank, outer_rank, outer_shapes, router_width


def flat_weight(base: nn.Module) -> Tensor:
    """The weight as a matrix ``[d_out, d_in]``; for a convolution ``[d_out, c * kh * kw]``."""
    return cast(Tensor, base.weight).flatten(1)


def kernel_of(base: nn.Module) -> Shape | None:
    """The kernel ``(c, kh, kw)`` of a convolution; ``None`` for a linear layer."""
    return tuple(base.weight.shape[1:]) if isinstance(base, nn.Conv2d) else None


def build_core(config: AdapterConfig, r: int, key: str) -> Core | None:
    """The core of the projection at path ``key``, of outer rank ``r``, or ``None``."""
    if config.core == "nested":
        return NestedCore(r, inner_rank(config, r, key))
    if config.core == "input":
        return InputCore(r, inner_rank(config, r, key))
    if config.core == "diagonal":
        return DiagonalCore(r)
    return DenseCore(r) if config.core == "dense" else None


def build_basis(config: AdapterConfig, base: nn.Module, key: str, r: int) -> Pair:
    """The outer pair of one projection in the dtypes that the layer uses: from ``config.start``, or computed.

    Shapes: ``[r, d_in / n]`` and ``[d_out, r / n]`` for ``n`` blocks.
    """
    weight = flat_weight(base)
    if config.start.empty and config.stored_outer:
        shapes = outer_shapes(config, weight.shape, r, key)
        return weight.new_empty(shapes[0], dtype=torch.float32), weight.new_empty(shapes[1], dtype=torch.float32)
    down, up = config.start.pairs.get(key) or outer_pair(config, base, key, r)
    if config.core == "input":  # B starts at zero, so only the down factor of the basis is used
        up = up.new_zeros(weight.shape[0], inner_rank(config, r, key), dtype=torch.float32)
    return (
        down if "down" in config.trained else cast_frozen(down, weight),
        up if "up" in config.trained else cast_frozen(up, weight),
    )


def cast_frozen(factor: Tensor, weight: Tensor) -> Tensor:
    """Cast a frozen factor to the weight's dtype if that loses no bits, so that saving returns what was loaded."""
    exact = torch.finfo(weight.dtype).bits >= 32
    return factor.to(weight.dtype) if exact else factor


def outer_pair(config: AdapterConfig, base: nn.Module, key: str, r: int) -> Pair:
    """Compute an outer pair; frozen factors are rounded to ``basis_dtype``, so that saving them loses nothing.

    With ``blocks``, each diagonal block of the weight has its own basis; the factors are returned stacked.
    """
    weight = flat_weight(base).detach()
    d_out, d_in = weight.shape
    strength = config.start.strengths.get(key)
    if config.basis == "awsvd" and strength is None:
        raise UserError(
            "the 'awsvd' basis needs activation statistics: use nora_diffusion.add_adapter, which calibrates, "
            "or basis='svd'; to load a file through PEFT, pass low_cpu_mem_usage=True"
        )
    if strength is not None:
        strength = strength.repeat_interleave(d_in // strength.numel()).to(weight.device)
    n, pairs = config.blocks, []
    for i in range(n):
        rows, columns = slice(i * d_out // n, (i + 1) * d_out // n), slice(i * d_in // n, (i + 1) * d_in // n)
        block_strength = None if strength is None else strength[columns]
        block = weight[rows, columns]
        pairs.append(BASES[config.basis](block, r // n, block_strength, placement=config.placement, power=config.power))
    downs, ups = zip(*pairs, strict=True)
    return _rounded(config, "down", torch.cat(downs)), _rounded(config, "up", torch.cat(ups))


def _rounded(config: AdapterConfig, name: str, factor: Tensor) -> Tensor:
    # Contiguous, because safetensors cannot save other tensors.
    return factor.to(torch.float32 if name in config.trained_basis else getattr(torch, config.basis_dtype)).contiguous()


def build_magnitude(config: AdapterConfig, base: nn.Module) -> Tensor:
    """DoRA's initial magnitude ``[d_out]``."""
    weight = flat_weight(base).detach()
    return weight.new_empty(weight.shape[0], dtype=torch.float32) if config.start.empty else start_magnitude(weight)


def build_delta(config: AdapterConfig, base: nn.Module, key: str) -> Delta:
    """The delta that ``config`` describes for the projection ``base`` at path ``key``."""
    r = outer_rank(config, flat_weight(base).shape, key)
    if config.router != "none":
        return build_routed(config, base, key, r)
    down, up = build_basis(config, base, key, r)
    return ChainDelta(
        down,
        up,
        build_core(config, r, key),
        config.dropout,
        trained=config.trained,
        stored=config.stored_outer,
        blocks=config.blocks,
        magnitude=build_magnitude(config, base) if config.magnitude else None,
        masked=config.rank_mask,
        rank_scales=config.rank_scales,
    )


def build_routed(config: AdapterConfig, base: nn.Module, key: str, r: int) -> RoutedDelta:
    """A mixture of ``config.num_experts`` experts of rank ``r`` and their router.

    Raises :class:`UserError` for a token router on a wide convolution, or if the width of the router's input is unset.
    """
    n = config.num_experts
    if config.experts == "frozen":
        if not config.start.empty:
            raise UserError("experts='frozen' are trained adapters: mix them with nora_diffusion.learn_gates")
        return GatedDelta(FrozenExperts(*build_basis(config, base, key, n * r), n), n, config.router, config.dropout)
    width = router_width(config, flat_weight(base).shape, kernel_of(base), key, config.start.condition)
    experts = build_experts(config, base, key, r)
    by_block = config.experts == "modules"
    return RoutedDelta(experts, n, config.router, width, config.dropout, top_k=config.top_k, by_block=by_block)


def build_experts(config: AdapterConfig, base: nn.Module, key: str, r: int) -> Experts:
    """The experts of a mixture; independent experts have ``num_experts`` outer pairs of rank ``r``, a module one."""
    n = config.num_experts
    if config.experts in ("independent", "modules"):
        return IndependentExperts(*build_basis(config, base, key, n * r), n)
    down, up = build_basis(config, base, key, r)
    if config.experts == "projected":
        return ProjectedExperts(down, up, n, inner_rank(config, r, key))
    return SharedExperts(down, up, n)


def delta_of_file(
    config: AdapterConfig, path: str, factors: Mapping[str, Tensor], shape: Sequence[int] | None = None
) -> Delta:
    """The delta of one projection from the ``factors`` of a file, in their dtype, without the base model.

    ``factors`` are named as in the file. ``shape``: ``[d_out, d_in]``, needed if the outer factors are not among them.
    Raises :class:`UserError` if the factors do not fit the config.
    """
    config = copy.copy(config)
    config.start = Start(empty=True, condition=factors["W_g"].shape[1] if "W_g" in factors else 0)
    try:
        down, up = factors.get("A", factors.get("A_out")), factors.get("B", factors.get("B_out"))
        if shape is None and down is not None and up is not None:
            shape = up.shape[0], down.shape[1] * config.blocks
        if shape is None:
            raise UserError(f"{path}: the file has neither its shape nor its outer factors: copy it again")
        # On the CPU, since a basis that depends on shapes is computed; nothing reads the uninitialized weight.
        base = nn.Linear(shape[1], shape[0], bias=False, device="meta").to_empty(device="cpu")
        delta = build_delta(config, base, path)
        delta.load_state_dict({name: factors[name.rpartition(".")[2]] for name in delta.state_dict()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: the factors in the file do not fit its config: copy it again") from error
    return delta


def contraction(base: nn.Module) -> functional.Contract:
    """The function that applies a down-projection to the input of ``base``."""
    if isinstance(base, nn.Conv2d):
        return functools.partial(
            functional.contract_conv,
            kernel_size=cast("tuple[int, int]", base.kernel_size),
            stride=cast("tuple[int, int]", base.stride),
            padding=cast("tuple[int, int] | str", base.padding),
            dilation=cast("tuple[int, int]", base.dilation),
        )
    return functional.contract_linear
