"""Mixtures: deltas whose experts are weighted by a learned gate, per token or per row of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from . import functional
from .fused_routed import routed_linear, rowwise_linear
from .mixture import gated_up

Block = tuple[str, str]
"""The path of a block of the model, and an adapter."""


@dataclass
class RouterInputs:
    """The inputs of the gates of one model beside the token, during a forward pass.

    ``vectors``: ``prompt [rows, d]`` and ``timestep [rows, d]``; empty outside of a forward pass. All deltas of
    the model share it, and those of one block and adapter in ``blocks`` a gate; hooks on the model set both
    (``nora_diffusion.pipelines.router_inputs``).
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[Block, list[RoutedDelta]] = field(default_factory=dict)
    was_read: bool = False
    _inputs: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def open(self, vectors: dict[str, Tensor]) -> None:
        """Start a forward pass, or end it (no vectors)."""
        self.vectors, self._inputs = dict(vectors), {}

    def rows(self, router: str) -> Tensor:
        """The input of a router for each row of the batch, ``[rows, d]``.

        Equal rows are not deduplicated: finding them would synchronize with the accelerator, which costs more than
        computing each row. Raises :class:`UserError` outside of a forward pass.
        """
        self.was_read = True
        if router not in self._inputs:
            missing = [name for name in router.split("+") if name not in self.vectors]
            if missing:
                raise UserError(
                    f"a layer with the {router!r} router ran where no {missing[0]} is known: call the whole unet or "
                    "transformer, and target only layers that run after its time embedding"
                )
            vectors = [functional.at_least_single(self.vectors[name]) for name in router.split("+")]
            self._inputs[router] = torch.cat(vectors, dim=-1)
        return self._inputs[router]


class SharedExperts(nn.Module):
    """Experts ``diag(b_i) B diag(a_i) A`` with shared factors ``A`` and ``B`` (MoR, arXiv 2410.13408).

    ``A [r, d_in]``, ``B [d_out, r]``, ``a [N, r]``, ``b [N, d_out]``; all trained.
    """

    def __init__(self, down: Tensor, up: Tensor, num_experts: int) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros_like(up))
        # Ones plus noise: with equal scalings all experts would get equal gradients and stay equal.
        self.a = nn.Parameter(1 + 0.1 * torch.randn(num_experts, down.shape[0]))
        self.b = nn.Parameter(1 + 0.1 * torch.randn(num_experts, up.shape[0]))

    def token_factors(self) -> tuple[Tensor, ...]:
        """``(D [r, d_in], *up)``: the down factor and the arguments of :func:`.mixture.gated_up`."""
        return self.A, self.B, self.a, self.b

    def mix(self, s: Tensor) -> Tensor:
        """``sum_i g_i diag(b_i) B diag(a_i) p`` for ``s = [p; l] [..., r + N]``, ``g = softmax(l)`` per token."""
        return gated_up(s, len(self.a), self.B, self.a, self.b)

    def mask(self, gates: Tensor) -> Tensor:
        """``M = sum_i g_i b_i a_i^T``, ``[u, d_out, r]``, for each gate ``[u, N]``; the up factor is ``M o B``."""
        outer = gates.to(self.b.dtype).unsqueeze(-1) * self.b
        return outer.transpose(1, 2) @ self.a

    def up_for(self, gates: Tensor) -> Tensor:
        """The up-projection for each gate ``[u, N]``: ``(sum_i g_i b_i a_i^T) o B``, ``[u, d_out, r]``."""
        return self.mask(gates) * self.B


class IndependentExperts(nn.Module):
    """Experts ``B_i A_i`` with separate factors (MoE-LoRA), stacked in ``A [N r, d_in]`` and ``B [d_out, N r]``."""

    def __init__(self, down: Tensor, up: Tensor, num_experts: int) -> None:
        super().__init__()
        self.r = down.shape[0] // num_experts
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros_like(up))

    def token_factors(self) -> tuple[Tensor, ...]:
        """``(D [N r, d_in], up)``: the down factors and the argument of :func:`.mixture.gated_up`."""
        return self.A, self.B

    def mix(self, s: Tensor) -> Tensor:
        """``sum_i g_i B_i p_i`` for ``s = [p; l] [..., N r + N]``, ``g = softmax(l)`` per token."""
        return gated_up(s, len(self.A) // self.r, self.B)

    def mask(self, gates: Tensor) -> Tensor:
        """``[g_1, ..., g_N]``, each ``r`` times, ``[u, 1, N r]``, for each gate ``[u, N]``."""
        return gates.to(self.B.dtype).repeat_interleave(self.r, dim=-1).unsqueeze(1)

    def up_for(self, gates: Tensor) -> Tensor:
        """``[g_1 B_1, ..., g_N B_N]``, ``[u, d_out, N r]``."""
        return self.mask(gates) * self.B


class ProjectedExperts(nn.Module):
    """Experts ``B_i P_i A`` in one shared subspace ``A [r, d_in]`` (MALoRA, arXiv 2410.22782); all trained.

    ``P [N, r', r]``, normal with variance ``1/r`` so that the rows of ``P_i A`` are as long as those of ``A``;
    ``B [d_out, N r']`` holds the up factors of all experts.
    """

    def __init__(self, down: Tensor, up: Tensor, num_experts: int, inner_r: int) -> None:
        super().__init__()
        r = down.shape[0]
        self.A = nn.Parameter(down)
        self.P = nn.Parameter(torch.randn(num_experts, inner_r, r) / math.sqrt(r))
        self.B = nn.Parameter(up.new_zeros(up.shape[0], num_experts * inner_r))

    def token_factors(self) -> tuple[Tensor, ...]:
        """``(D [N r', d_in], up)``: those of independent experts with the down factors ``P_i A``."""
        return self.P.flatten(0, 1) @ self.A, self.B

    def mix(self, s: Tensor) -> Tensor:
        """``sum_i g_i B_i P_i p`` for ``s = [p; l] [..., r + N]``, ``g = softmax(l)`` per token."""
        p, logits = s.tensor_split([self.A.shape[0]], dim=-1)
        inner = F.linear(p, self.P.flatten(0, 1).to(p.dtype))
        return gated_up(torch.cat([inner, logits], dim=-1), len(self.P), self.B)

    def mask(self, gates: Tensor) -> Tensor:
        """``[g_1, ..., g_N]``, each ``r'`` times, ``[u, 1, N r']``, for each gate ``[u, N]``."""
        return gates.to(self.B.dtype).repeat_interleave(self.P.shape[1], dim=-1).unsqueeze(1)

    def up_for(self, gates: Tensor) -> Tensor:
        """``sum_i g_i B_i P_i``, ``[u, d_out, r]``."""
        return (self.mask(gates) * self.B) @ self.P.flatten(0, 1)


class FrozenExperts(nn.Module):
    """Experts ``Q_i P_i`` that are not trained, with orthonormal columns in ``Q_i``: ``||Q_i P_i x|| = ||P_i x||``.

    Stacked in ``A_out [N r, d_in]`` and ``B_out [d_out, N r]``; an expert of a lower rank than ``r`` has zeros.
    """

    A_out: Tensor
    B_out: Tensor

    def __init__(self, down: Tensor, up: Tensor, num_experts: int) -> None:
        super().__init__()
        self.r = down.shape[0] // num_experts
        self.register_buffer("A_out", down)
        self.register_buffer("B_out", up)

    @property
    def A(self) -> Tensor:
        """``[N r, d_in]``."""
        return self.A_out

    def token_factors(self) -> tuple[Tensor, ...]:
        """As those of independent experts."""
        return self.A_out, self.B_out

    def mix(self, s: Tensor) -> Tensor:
        """``sum_i g_i Q_i p_i`` for ``s = [p; l] [..., N r + N]``, ``g = softmax(l)`` per token."""
        return gated_up(s, len(self.A_out) // self.r, self.B_out)

    def mask(self, gates: Tensor) -> Tensor:
        """``[g_1, ..., g_N]``, each ``r`` times, ``[u, 1, N r]``, for each gate ``[u, N]``."""
        return gates.to(self.B_out.dtype).repeat_interleave(self.r, dim=-1).unsqueeze(1)

    def up_for(self, gates: Tensor) -> Tensor:
        """``[g_1 Q_1, ..., g_N Q_N]``, ``[u, d_out, N r]``."""
        return self.mask(gates) * self.B_out


Experts = SharedExperts | IndependentExperts | ProjectedExperts | FrozenExperts


class RoutedDelta(nn.Module):
    """``dy = sum_i g_i E_i x`` with ``g = softmax(W_g c)`` over the experts ``E_i``, ``W_g [N, d_c]`` trained.

    The input of a ``token`` router is ``c = x``. The input of any other is one vector per row of the batch
    (:class:`RouterInputs`): the experts of a row collapse to one low-rank pair, and routing costs nothing per token.
    With ``top_k`` only the largest gates of a row count. ``by_block``: the delta has one expert, and the experts of its
    gate are those of all modules of a block of the model (MiLoRA): ``dy = g_m E x`` in the module ``m``.
    Each module has the row ``w_m`` of the router of its block.

    The gate varies, so there is no single ``dW``: such a delta cannot be merged and stays live.
    """

    mergeable = False

    def __init__(
        self,
        experts: Experts,
        num_experts: int,
        router: str,
        width: int,
        dropout: float = 0.0,
        *,
        top_k: int = 0,
        by_block: bool = False,
    ) -> None:
        super().__init__()
        self.top_k, self.by_block = top_k, by_block
        self.block: Block | None = None
        """With ``by_block``: the key of its block in :attr:`RouterInputs.blocks`."""
        self.experts = experts
        self.router = router
        self.router_inputs: RouterInputs | None = None
        self.W_g = nn.Parameter(0.1 / math.sqrt(width) * torch.randn(num_experts, width))
        self.dropout = nn.Dropout(dropout)

    @property
    def conditioned(self) -> bool:
        """Whether there is one gate per row of the batch, not per token."""
        return self.router != "token"

    def forward(self, x: Tensor, contract: functional.Contract) -> Tensor:
        """``dy = sum_i g_i E_i x``, ``[..., d_out]`` with channels last, unscaled."""
        return self.from_skinny(contract(x, self.skinny_weight()))

    def skinny_weight(self) -> Tensor:
        """``A [k, d_in]``; with a token router ``[A; W_g] [k + N, d_in]``."""
        return self.experts.A if self.conditioned else torch.cat([self.experts.A, self.W_g])

    def from_skinny(self, p: Tensor, rows: Tensor | None = None) -> Tensor:
        """``dy [..., d_out]`` from ``p = x S^T``; ``rows``: indices in the batch of the rows of ``p``, if not all."""
        k = self.experts.A.shape[0]
        if not self.conditioned:
            if self.drops:
                p = torch.cat([self.dropout(p[..., :k]), p[..., k:]], dim=-1)
            return self.experts.mix(p)
        ups = self.row_ups(len(p), rows).to(p.dtype)
        p = self.dropout(p)
        return F.linear(p, ups[0]) if len(ups) == 1 else functional.rowwise(p, ups.transpose(1, 2))

    @property
    def drops(self) -> bool:
        """Whether the next pass drops some of ``p``."""
        return self.training and self.dropout.p > 0

    @property
    def fuses(self) -> bool:
        """Whether :meth:`linear` serves the next pass."""
        return not self.drops

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """``y = W x + b + s dy``, ``[..., d_out]``, for a frozen linear projection: the fast training path."""
        down, *up = self.experts.token_factors()
        if self.conditioned:
            with functional.AutocastOff(x):  # it would cast each factor, to save nothing at this size
                mask = self.experts.mask(self.gates_of(len(x)))
            return rowwise_linear(x, weight, bias, scale, down, mask, up[0])
        return routed_linear(x, weight, bias, scale, down, self.W_g, *up)

    def row_ups(self, count: int, rows: Tensor | None = None) -> Tensor:
        """The up factor ``[count or 1, d_out, k]`` of each of ``count`` rows; ``rows``: their indices in the batch."""
        return self.experts.up_for(self.gates_of(count, rows))

    def gates_of(self, count: int, rows: Tensor | None = None) -> Tensor:
        """The gate ``[count or 1, N]`` of each of ``count`` rows; ``rows``: their indices in the batch."""
        gates = self.row_gates()
        gates = gates if rows is None or len(gates) == 1 else gates[rows]
        return gates if len(gates) in (1, count) else self._common_gate(gates, count)

    def _common_gate(self, gates: Tensor, rows: int) -> Tensor:
        """The gate ``[1, N]`` that all rows share, for a batch whose rows the model has rearranged (frames, say).

        Raises :class:`UserError` if their gates differ.
        """
        if not torch.equal(gates, gates[:1].expand_as(gates)):
            raise UserError(
                f"a layer with the {self.router!r} router got {rows} rows in a batch of {len(gates)}, and cannot tell "
                "which gate belongs to which row: do not target this layer"
            )
        return gates[:1]

    def row_gates(self) -> Tensor:
        """The gates ``[rows, N]`` of the current batch, at least in fp32."""
        vectors = self._connected().rows(self.router)
        gates = functional.router_gates(F.linear(vectors, self.router_weight().to(vectors.dtype)))
        gates = functional.top_gates(gates, self.top_k)
        return gates[:, [self.peers().index(self)]] if self.by_block else gates

    def peers(self) -> Sequence[RoutedDelta]:
        """The deltas that share the gate: those of the block, or this one alone."""
        if not self.by_block:
            return (self,)
        if self.block is None:
            raise self._unconnected()
        return self._connected().blocks[self.block]

    def router_weight(self) -> Tensor:
        """``W_g [N, d_c]``; with ``by_block`` that of the block, a row for each of its modules."""
        return torch.cat([peer.W_g for peer in self.peers()]) if self.by_block else self.W_g

    def _connected(self) -> RouterInputs:
        if self.router_inputs is None:
            raise self._unconnected()
        return self.router_inputs

    def _unconnected(self) -> UserError:
        return UserError(f"the {self.router!r} router is not connected to its model: use nora_diffusion.add_adapter")

    def gates(self, x: Tensor, contract: functional.Contract) -> Tensor:
        """The gates of an input, at least in fp32: ``[..., N]`` by token, or ``[rows, N]``."""
        if not self.conditioned:
            return functional.router_gates(functional.at_least_single(contract(x, self.W_g)))
        return self.row_gates()

    def router_input(self, x: Tensor) -> Tensor:
        """What the router reads in a pass with the input ``x [..., d_in]``: this, or ``c [rows, d_c]``."""
        return self._connected().rows(self.router) if self.conditioned else x

    def pair(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The LoRA pair ``(A [k, d_in], B [d_out, k])`` of the experts under one fixed gate ``[N]``."""
        return self.experts.A, self.experts.up_for(gate.unsqueeze(0))[0]

    def delta_weight(self) -> Tensor:
        """Raises ``ValueError``: there is no single ``dW``."""
        raise ValueError("a routed mixture has no single dW: it cannot be merged or exported exactly")
