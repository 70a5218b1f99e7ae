"""The written-out backward pass of a mixture's gated sum against autograd, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.adapters.deltas.mixture import gated_up
from nora_diffusion.adapters.deltas.routed import IndependentExperts, ProjectedExperts, RoutedDelta, SharedExperts
from nora_diffusion.training.step.memory import saved_storages

N, R, D_OUT = 3, 4, 10
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


def plain(s: Tensor, num_experts: int, up: Tensor, inner: Tensor | None = None, outer: Tensor | None = None) -> Tensor:
    """The formula, expert by expert."""
    gates = torch.softmax(s[..., -num_experts:], dim=-1)
    p, total = s[..., :-num_experts], torch.zeros(())
    for i in range(num_experts):
        if inner is None or outer is None:
            y = p.chunk(num_experts, dim=-1)[i] @ up.chunk(num_experts, dim=1)[i].T
        else:
            y = outer[i] * ((inner[i] * p) @ up.T)
        total = total + gates[..., [i]] * y
    return total


def operands(shared: bool, *shape: int) -> list[Tensor]:
    """``s``, ``up`` and, for shared factors, the scalings."""
    k = R if shared else N * R
    sizes = [(*shape, k + N), (D_OUT, k), *([(N, R), (N, D_OUT)] if shared else [])]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def with_gradients(f: object, s: Tensor, *factors: Tensor) -> list[Tensor]:
    y = f(s, N, *factors)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return [y, *torch.autograd.grad((weight * y).sum(), [s, *factors])]


@SHARED
@pytest.mark.parametrize("shape", [(2, 5), (7,), (2, 3, 2), (), (0,)], ids=str)
def test_values_and_gradients_are_those_of_autograd(shared: bool, shape: tuple[int, ...]) -> None:
    values = operands(shared, *shape)
    for ours, autograd in zip(with_gradients(gated_up, *values), with_gradients(plain, *values), strict=True):
        torch.testing.assert_close(ours, autograd, atol=1e-12, rtol=1e-12)


@SHARED
def test_gradients_are_the_limits_of_differences(shared: bool) -> None:
    assert torch.autograd.gradcheck(lambda s, *factors: gated_up(s, N, *factors), operands(shared, 2, 3))


@SHARED
def test_a_gradient_with_strides_or_of_another_dtype_is_read(shared: bool) -> None:
    s, *factors = operands(shared, 4, 3)
    dy = torch.randn(D_OUT, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    values = [s, *factors]
    ours = torch.autograd.grad(gated_up(s, N, *factors), values, dy)
    for found, expected in zip(ours, torch.autograd.grad(plain(s, N, *factors), values, dy), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@SHARED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_master_factors(shared: bool, dtype: torch.dtype) -> None:
    """The factors are fp32, and so are their gradients; products are computed in the dtype of the tokens."""
    torch.manual_seed(0)
    exact = operands(shared, 50)
    s, *factors = (value.detach().float().requires_grad_() for value in exact)
    with torch.autocast("cpu", dtype):
        y = gated_up(s.to(dtype), N, *factors)
    assert y.dtype == dtype
    expected = torch.autograd.grad(plain(exact[0], N, *exact[1:]).sum(), exact)
    for found, value in zip(torch.autograd.grad(y.sum(), [s, *factors]), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - value).norm() < 0.05 * value.norm()


@SHARED
def test_it_is_compiled_in_one_graph(shared: bool) -> None:
    torch._dynamo.reset()
    values = operands(shared, 2, 5)
    compiled = torch.compile(gated_up, fullgraph=True, backend="aot_eager")
    for ours, autograd in zip(with_gradients(compiled, *values), with_gradients(plain, *values), strict=True):
        torch.testing.assert_close(ours, autograd, atol=1e-12, rtol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    s, *factors = operands(True, 2)
    (ds,) = torch.autograd.grad(gated_up(s, N, *factors).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ds.sum().backward()


def test_factors_without_gradient_get_none() -> None:
    s, *factors = operands(True, 5)
    frozen = [factor.detach() for factor in factors]
    (ours,) = torch.autograd.grad(gated_up(s, N, *frozen).sum(), [s])
    (expected,) = torch.autograd.grad(plain(s, N, *frozen).sum(), [s])
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


TOKENS, D_IN, EXPERTS, RANK = 400, 16, 8, 4
ROUTED = {
    "shared": lambda d: SharedExperts(torch.randn(RANK, D_IN), torch.randn(d, RANK), EXPERTS),
    "independent": lambda d: IndependentExperts(torch.randn(8 * RANK, D_IN), torch.randn(d, 8 * RANK), EXPERTS),
    "projected": lambda d: ProjectedExperts(torch.randn(RANK, D_IN), torch.randn(d, RANK), EXPERTS, 2),
}


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("d_out", [64, 640])
def test_a_token_router_saves_the_low_rank_image_of_a_token(kind: str, d_out: int) -> None:
    """No gated row, no gate and no stacked factor: beside the input, what is saved is as narrow as the down factors."""
    delta = RoutedDelta(ROUTED[kind](d_out), EXPERTS, "token", D_IN)
    x = torch.randn(TOKENS, D_IN)
    with saved_storages((x, *delta.parameters())) as saved:
        delta(x, nn.functional.linear)
    widths = {
        "shared": [RANK + EXPERTS],
        "independent": [8 * RANK + EXPERTS],
        "projected": [RANK + EXPERTS, 16 + EXPERTS],
    }
    assert sum(storage.nbytes() for storage in saved.values()) <= 4 * TOKENS * sum(widths[kind])


@pytest.mark.parametrize("kind", ROUTED)
def test_dropout_leaves_the_gates(kind: str) -> None:
    delta = RoutedDelta(ROUTED[kind](D_OUT), EXPERTS, "token", D_IN, dropout=0.5)
    delta.experts.B.data.normal_()
    x = torch.randn(3, D_IN)
    torch.manual_seed(0)
    p = delta.dropout(x @ delta.experts.A.T)
    expected = delta.eval().experts.mix(torch.cat([p, x @ delta.W_g.T], dim=-1))
    torch.manual_seed(0)
    torch.testing.assert_close(delta.train()(x, nn.functional.linear), expected)
