"""Banks of many adapters: the cost of a pass depends on its rows, not on the number of adapters in the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nora_diffusion.adapters import AdapterConfig, NoraLayer, lora, mor, nora, nora_input
from nora_diffusion.adapters.deltas.routed import RoutedDelta
from nora_diffusion.adapters.tuner.mixed_rows import LayerRows, serve_rows
from nora_diffusion.adapters.tuner.row_plan import RowPlan
from nora_diffusion.training.many.batched import SubjectRows

WIDTH = 12
Make = Callable[[int], AdapterConfig]
BANKS: dict[str, Make] = {
    "CoreBank": lambda rank: nora(r=4, inner_r=rank, basis="svd"),
    "InputBank": lambda rank: nora_input(r=4, inner_r=rank, basis="svd"),
    "PairBank": lambda rank: nora(r=4, inner_r=rank, basis="orthogonal"),
}
"""The bank of a pass with gradients and a config for it; a pass without gradients in a linear layer uses pairs."""
LAYERS = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1)}


class Operations(TorchDispatchMode):
    """Counts the aten operations inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def layer_of_subjects(ranks: list[int], make: Make, kind: str = "linear") -> tuple[NoraLayer, SubjectRows]:
    """A layer with one adapter for each inner rank, as when many subjects train together."""
    torch.manual_seed(0)
    layer = NoraLayer(LAYERS[kind]().requires_grad_(False))
    for number, rank in enumerate(ranks):
        layer.update_layer(f"s{number}", make(rank), "x")
    for parameter in layer.nora_delta.parameters():
        parameter.data.normal_()
        parameter.requires_grad_(True)
    plan = SubjectRows([f"s{number}" for number in range(len(ranks))])
    layer.rows = LayerRows(layer, plan)
    return layer, plan


def run(layer: NoraLayer, plan: SubjectRows, shares: dict[int, int]) -> Tensor:
    """The output of a pass with ``shares[i]`` rows of subject ``i``."""
    rows = sum(shares.values())
    plan.set_counts(shares)
    plan.start(rows)
    return layer(inputs(layer, rows))  # type: ignore[no-any-return]


def inputs(layer: NoraLayer, rows: int) -> Tensor:
    shape = (3, WIDTH) if isinstance(layer.base_layer, nn.Linear) else (WIDTH, 3, 3)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=BANKS)
def bank(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_cost_depends_on_the_rows_of_the_pass(bank: str, grad: bool) -> None:
    counts = []
    for members in (2, 9):
        layer, plan = layer_of_subjects([2] * members, BANKS[bank])
        with torch.set_grad_enabled(grad):
            kinds = [type(b).__name__ for b in cast(LayerRows, layer.rows).grouped()[0]]
        assert kinds == [bank if grad else "PairBank"]
        with torch.set_grad_enabled(grad), Operations() as operations:
            y = run(layer, plan, {0: 2, 1: 1})
            if grad:
                y.sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_rows_of_a_block_share_their_factors(bank: str) -> None:
    """Subjects with equally many rows: no factor is copied for each row, since adding up the gradients is slow."""
    layer, plan = layer_of_subjects([2] * 3, BANKS[bank])
    copies = []
    for shares in ({0: 3, 2: 3}, {0: 1, 2: 3}):
        with Operations() as operations:
            run(layer, plan, shares)
        copies.append("index" in operations.names)
    assert copies == [False, True]


def test_only_subjects_with_rows_get_gradients(bank: str) -> None:
    layer, plan = layer_of_subjects([2] * 5, BANKS[bank])
    run(layer, plan, {3: 1, 1: 2}).square().sum().backward()
    trained = {name for name in layer.nora_delta for p in layer.delta(name).parameters() if p.grad is not None}
    assert trained == {"s1", "s3"}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_rows_equal_each_subject_alone(bank: str, grad: bool, kind: str) -> None:
    """In consecutive passes with different subjects and ranks: nothing of an earlier pass remains."""
    layer, plan = layer_of_subjects([2, 2, 2, 3, 3], BANKS[bank], kind)
    with torch.set_grad_enabled(grad):
        for shares in ({0: 1, 2: 2}, {2: 2, 0: 1}, {3: 1}, {4: 2, 3: 1}, {1: 1, 4: 1}, {0: 2, 2: 2}, {0: 1, 2: 2}):
            found = run(layer, plan, shares)
            plan_rows, layer.rows = layer.rows, None
            x, start = inputs(layer, len(found)), 0
            for number, rows in shares.items():
                layer.activate([f"s{number}"])
                expected = layer(x[start : start + rows])
                torch.testing.assert_close(found[start : start + rows], expected, atol=1e-5, rtol=1e-5)
                start += rows
            layer.rows = plan_rows


def test_a_compiled_model_is_not_recompiled_from_pass_to_pass() -> None:
    """Graphs are made while the factors of the rows are first built, kept and rebuilt; then no more."""
    layer, _ = layer_of_subjects([2, 2], BANKS["CoreBank"])
    layer.rows, graphs = None, list[int]()
    model = nn.Sequential(layer)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph.forward)
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad(), serve_rows(model, RowPlan([{"s0": 1.0}, {"s1": 0.5}])):
        for _ in range(4):
            before, found = len(graphs), [compiled(x) for _ in range(3)]
            for y in found:
                torch.testing.assert_close(y, model(x))
            next(layer.delta("s1").core.parameters()).mul_(2)  # type: ignore[union-attr]
    assert len(graphs) == before > 0


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_chains_of_a_convolution_share_a_bank(grad: bool) -> None:
    """Output and gradients equal those of each adapter alone, on the rows that use it at their weights."""
    torch.manual_seed(0)
    layer = NoraLayer(nn.Conv2d(3, WIDTH, 3, padding=1).requires_grad_(False))
    presets = {"one": lora(r=2), "two": lora(r=3, alpha=6), "three": nora(r=4, inner_r=2, basis="orthogonal")}
    for name, config in presets.items():
        layer.update_layer(name, config, "x")
    for parameter in layer.nora_delta.parameters():
        parameter.data.normal_()
        parameter.requires_grad_(True)
    specs = [{"one": 1.0}, {"two": 0.5, "three": 2.0}, {}, {"three": 1.0}]
    plan = RowPlan(specs)
    x, target = torch.randn(4, 3, 5, 5), torch.randn(4, WIDTH, 5, 5)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * target).sum(), list(layer.nora_delta.parameters()))) if grad else []

    with torch.set_grad_enabled(grad):
        layer.rows = LayerRows(layer, plan)
        plan.start(4)
        assert [type(b).__name__ for b in cast(LayerRows, layer.rows).grouped()[0]] == [
            "FoldBank" if grad else "StackBank"
        ]
        found = layer(x)
        found_gradients = gradients(found)
        layer.rows, rows = None, []
        for row, spec in zip(x, specs, strict=True):
            layer.activate([*spec])
            for name, weight in spec.items():
                layer.set_scale(name, weight)
            layer.nora_delta.requires_grad_(True)
            rows.append(layer(row[None]) if spec else layer.base_layer(row[None]))
        expected = torch.cat(rows)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(found_gradients, gradients(expected), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shares", [{0: 2, 1: 2, 2: 2}, {1: 4}, {0: 1, 1: 2}], ids=["blocks", "one", "uneven"])
def test_each_block_of_rows_trains_in_one_function_with_the_layer(
    shares: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures of experts are in no bank. Output and gradients equal those of each adapter alone."""
    layer, plan = layer_of_subjects([2, 2, 2], lambda rank: mor(r=rank, num_experts=3))
    parts: list[int] = []
    linear = RoutedDelta.linear
    monkeypatch.setattr(RoutedDelta, "linear", lambda self, x, *args: parts.append(len(x)) or linear(self, x, *args))
    found = run(layer, plan, shares)
    assert parts == ([] if len({*shares.values()}) > 1 else [*shares.values()])
    parameters = [p for number in shares for p in layer.delta(f"s{number}").parameters()]
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    layer.rows, start, alone = None, 0, []
    for number, rows in shares.items():
        layer.activate([f"s{number}"])
        layer.nora_delta.requires_grad_(True)
        alone.append(layer(inputs(layer, sum(shares.values()))[start : start + rows]))
        start += rows
    expected = torch.cat(alone)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kernel, options, kind",
    [(3, {"padding": 1}, "FoldBank"), (1, {}, "FoldBank"), ((3, 5), {"padding": 2, "dilation": (2, 1)}, "FoldBank"),
     (3, {}, "FoldBank"), (3, {"stride": 2, "padding": 1}, "StackBank"), (3, {"padding": "same"}, "StackBank"),
     (3, {"padding": 3}, "StackBank")],
)  # fmt: skip
def test_a_convolution_of_any_shape_has_a_bank(kernel: Any, options: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    layer = NoraLayer(nn.Conv2d(3, WIDTH, kernel, **options).requires_grad_(False))
    for name, rank in (("one", 2), ("two", 3)):
        layer.update_layer(name, lora(r=rank), "x")
    for parameter in layer.nora_delta.parameters():
        parameter.data.normal_()
    plan, x = RowPlan([{"one": 1.0}, {"two": 1.0}]), torch.randn(2, 3, 6, 7)
    layer.rows = LayerRows(layer, plan)
    plan.start(2)
    assert [type(b).__name__ for b in cast(LayerRows, layer.rows).grouped()[0]] == [kind]
    found = layer(x)
    layer.rows = None
    for name, row, y in zip(("one", "two"), x, found, strict=True):
        layer.activate([name])
        torch.testing.assert_close(y, layer(row[None])[0], atol=1e-4, rtol=1e-5)


def test_an_adapter_may_have_any_name() -> None:
    """The tensors of a plan are cached by name."""
    plan, cpu = RowPlan([{}, {"index": 0.5}]), torch.device("cpu")
    plan.start(4)
    assert plan.index(cpu).tolist() == [0, 1, 0, 1]
    share = plan.share("index", cpu)
    assert share is not None and [value.tolist() for value in share] == [[1, 3], [0.5, 0.5]]
