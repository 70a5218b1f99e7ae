"""The balance loss of mixtures: it keeps a router from using few of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...adapters import NoraLayer
from ...adapters.deltas import functional
from ...adapters.deltas.gated import GatedDelta
from ...adapters.deltas.routed import RoutedDelta
from .step_hook import StepHook
from .trained import Trained


class BalanceLoss(StepHook):
    """Adds ``w mean_l L_l`` to the loss, with ``L = N sum_i f_i P_i`` and ``P [N]`` the mean gate of a layer's pass.

    The loss of the Switch Transformer (https://arxiv.org/abs/2101.03961), with ``f_i`` the share of the inputs that
    expert ``i`` computes, a constant. That is how often it is among the ``top_k``, divided by ``k``. With dense gates
    each expert computes every input, weighted by its gate: its share is ``P_i``, and ``L = N sum_i P_i^2`` is 1 where
    all ``N`` experts have the same share, and ``N`` where one has all. The mean is over the positions of a token
    router, and over the rows of the batch for any other.

    Only routers get its gradient, not what they read: ``dL/dW_g`` is computed during the forward pass, and nothing but
    its value is kept until backward. Layers that gradient checkpointing computes again are counted once. Each process
    balances its own batch, and the gradients are averaged.
    """

    name: ClassVar[str] = "balance"
    needs_own_pass: ClassVar[bool] = True  # a shared pass has the rows of other subjects too

    def __init__(self, trained: Trained, weight: float) -> None:
        self.weight = weight
        found = {layer: layer.delta(trained.adapter) for layer in trained.layers.values()}
        self.routed: dict[NoraLayer, RoutedDelta] = {k: d for k, d in found.items() if isinstance(d, RoutedDelta)}
        self.losses: list[Tensor] = []
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.inputs: dict[str, Tensor] = {}
        self.waiting: list[RoutedDelta] = []
        self.listens = False

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """Read the inputs of all routers until :meth:`penalty` is called."""
        self.losses, self.gradients, self.listens = [], [], True
        self.inputs, self.waiting = {}, []
        with ExitStack() as stack:
            for layer, delta in self.routed.items():
                handle = layer.register_forward_pre_hook(partial(self._measure, delta))
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def _measure(self, delta: RoutedDelta, layer: NoraLayer, args: tuple[Tensor, ...]) -> None:
        if not self.listens or delta is not delta.peers()[0]:  # backward computes a layer again; a gate counts once
            return
        x = args[0].movedim(1, -1) if isinstance(layer.base_layer, nn.Conv2d) else args[0]
        if delta.conditioned:  # all layers have the same input: computed at once
            self.inputs.setdefault(delta.router, delta.router_input(x))
            self.waiting.append(delta)
        else:
            self._add([delta], *balance(x, delta.W_g.unsqueeze(0)))

    def _add(self, deltas: Sequence[RoutedDelta], losses: Tensor, gradients: Tensor) -> None:
        """Losses ``[L]`` of gates and their gradients ``[L, N, d]``."""
        self.losses.append(losses)
        for delta, gradient in zip(deltas, gradients, strict=True):
            peers = delta.peers()
            rows = gradient.split([len(peer.W_g) for peer in peers])
            self.gradients += [(peer.W_g, row) for peer, row in zip(peers, rows, strict=True)]

    @torch.no_grad()
    def _add_waiting(self) -> None:
        kinds: dict[tuple[str, int, int], list[RoutedDelta]] = {}
        for delta in self.waiting:
            kinds.setdefault((delta.router, len(delta.router_weight()), delta.top_k), []).append(delta)
        for (router, _, top_k), deltas in kinds.items():
            weights = torch.stack([delta.router_weight() for delta in deltas])
            self._add(deltas, *balance(self.inputs[router], weights, top_k))

    def penalty(self, step: int) -> Tensor | None:
        """The mean over the layers that the pass has called, times the weight."""
        self.listens = False
        self._add_waiting()
        if not self.losses:
            return None
        losses = torch.cat(self.losses)
        parameters, gradients = zip(*self.gradients, strict=True)
        share = self.weight / len(losses)
        return with_gradients(share * losses.sum(), parameters, [share * gradient for gradient in gradients])


class GateShares(StepHook):
    """Adds ``-w log prod_i q_i`` to the loss, with ``q [N]`` the mean gate over all layers: MoLE's balance loss.

    https://arxiv.org/abs/2404.13628, with the gates of a layer averaged over its positions and rows. A layer may use
    one adapter only, as long as others use the others.
    """

    name: ClassVar[str] = "shares"
    needs_own_pass: ClassVar[bool] = True

    def __init__(self, trained: Trained, weight: float) -> None:
        self.weight = weight
        found = (layer.delta(trained.adapter) for layer in trained.layers.values())
        self.gated = [delta for delta in found if isinstance(delta, GatedDelta)]
        self.shares: list[Tensor] = []

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """Listen to the gates until :meth:`penalty` is called."""
        self.shares = []
        for delta in self.gated:
            delta.listener = lambda gates: self.shares.append(gates.flatten(0, -2).mean(0))
        try:
            yield
        finally:
            self._ignore()

    def penalty(self, step: int) -> Tensor | None:
        """``-w sum_i log q_i``."""
        self._ignore()  # backward may compute layers again
        shares, self.shares = self.shares, []
        return -self.weight * torch.stack(shares).mean(0).log().sum() if shares else None

    def _ignore(self) -> None:
        for delta in self.gated:
            delta.listener = None


def balance(x: Tensor, router: Tensor, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """``L = N sum_i f_i P_i`` for inputs ``x [..., d]`` of routers ``[..., N, d]``, and the gradients ``dL/dW_g``.

    With ``g_t = softmax(W_g x_t)`` and ``P = mean_t g_t``: ``dl_t = (N / T) g_t o (c - g_t . c)``, ``c = f``, or for
    dense gates (``top_k = 0``), where ``f = P``, ``c = 2 P``.
    """
    flat = x.reshape(-1, x.shape[-1])
    with functional.AutocastOff(flat) as dtype:
        flat = flat.to(dtype)
        logits = functional.at_least_single(router.to(dtype) @ flat.T)  # [N, T]: a softmax is slow in memory order
        gates = torch.softmax(logits, -2)
        count, inputs = gates.shape[-2:]
        share = gates.mean(-1, keepdim=True)
        computed, slope = share, 2 * share
        if 0 < top_k < count:
            chosen = torch.zeros_like(gates).scatter_(-2, gates.topk(top_k, -2).indices, 1 / top_k)
            computed = slope = chosen.mean(-1, keepdim=True)
        d_logits = gates * (slope - (gates * slope).sum(-2, keepdim=True)) * (count / inputs)
        return count * (computed * share).sum((-2, -1)), (d_logits.to(dtype) @ flat).to(router.dtype)


def with_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """``value``, whose gradients with respect to the parameters are known."""
    result: Tensor = _Known.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call]
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(dy.to(gradient.dtype) * gradient for gradient in ctx.gradients)
