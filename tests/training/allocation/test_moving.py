"""Ranks that move while a run trains: what each rule does to the adapter, and the file that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, assert_same_run, interrupt_after

from nora_diffusion import UserError, inspect_adapter, load_adapter, open_pipeline
from nora_diffusion.formats.adapter_writing import Contents
from nora_diffusion.pipelines.components import components, nora_layers
from nora_diffusion.training import TrainConfig, check, train
from nora_diffusion.training.allocation import ablating, changes, schedules
from nora_diffusion.training.allocation.hook import AllocationHook
from nora_diffusion.training.allocation.ranks import Ranks
from nora_diffusion.training.allocation.table import ALLOCATIONS
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.training.signals import Interrupted

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "inner_rank": None, "basis": None, "alpha": 2.0},
    "dora": {"method": "dora", "inner_rank": None, "basis": None},
    "nora": {"target_modules": ["attn", "conv"]},
    "nora_input": {"method": "nora_input"},
    "lora_mini": {"method": "lora_mini", "basis": None, "train_text_encoder": True},
}
RULES = {
    "adalora": (changes, "mask_to_budget"), "dynamic_dora": (changes, "mask_to_budget"),
    "alora": (ablating, "hand_over"), "prilora": (changes, "zero_lowest_half"),
    "heterolora": (changes, "switch_layers"), "beamlora": (changes, "copy_best"),
}  # fmt: skip
PAIRS = [("lora", name) for name in ALLOCATIONS] + [
    ("nora", "adalora"), ("nora", "alora"), ("nora", "prilora"), ("nora", "heterolora"),
    ("nora_input", "dynamic_dora"), ("nora_input", "prilora"), ("nora_input", "beamlora"),
    ("dora", "adalora"), ("dora", "heterolora"), ("lora_mini", "adalora"), ("lora_mini", "alora"),
]  # fmt: skip
Updates = dict[tuple[str, str], torch.Tensor]


def updates(pipe: Any, name: str) -> Updates:
    return {
        (component, path): layer.get_delta_weight(name).clone()
        for component, module in components(pipe).items()
        for path, layer in nora_layers(module, name).items()
    }


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """PRILoRA prunes every other step."""
    monkeypatch.setattr(schedules, "PRUNING_STEPS", 2)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Updates]:
    """The updates of the adapter in training, as it was when its file was written."""
    found: Updates = {}
    original = AllocationHook.finish

    def finish(self: AllocationHook, contents: Contents) -> Contents:
        found.update(updates(self.ranks.trained.plan.pipe, self.ranks.trained.adapter))
        return original(self, contents)

    monkeypatch.setattr(AllocationHook, "finish", finish)
    return lambda: found


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_the_file_is_the_adapter_that_was_trained(
    name: str, method: str, configure: Configure, live: Callable[[], Updates], tiny_base: Path
) -> None:
    config = configure(rank_allocation=name, max_train_steps=6, **METHODS[method])
    found = train(config)
    pipe = open_pipeline(tiny_base)
    load_adapter(pipe, found.adapter_path, "file")
    loaded, trained = updates(pipe, "file"), live()
    assert any(value.any() for value in loaded.values())
    for key, value in trained.items():
        torch.testing.assert_close(loaded.get(key, torch.zeros_like(value)), value, rtol=1e-4, atol=1e-6)
    info = inspect_adapter(found.adapter_path)
    for axes in info.axes.values():
        assert axes.rank_scales == "none"
    ranks = [
        layer.delta("file").full_rank for m in components(pipe).values() for layer in nora_layers(m, "file").values()
    ]
    mean = 2 if info.axes["unet"].has_inner_rank else 4
    most = mean * len(trained) * (1.05 if name == "prilora" else 1)
    if method != "dora":  # whose layers keep a rank for their magnitude
        assert sum(ranks) <= most + mean
    assert sum(ranks) >= 0.5 * most
    if name in ("adalora", "dynamic_dora", "alora", "prilora"):
        assert len(set(ranks)) > 1 and "by layer" in info.ranks


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., None]], None]:
    """``seen(allocation, look)``: calls ``look(ranks, scores, value, before)`` after each decision of a run."""

    def watch(name: str, look: Callable[..., None]) -> None:
        place, rule = RULES[name]
        original = getattr(place, rule)

        def change(ranks: Ranks, scores: Any, value: float) -> None:
            before = [[factor.clone() for factor, _ in chain.factors] for chain in ranks.chains]
            scores = [own.clone() for own in scores]
            original(ranks, scores, value)
            look(ranks, scores, value, before)

        monkeypatch.setattr(place, rule, change)

    return watch


@pytest.mark.parametrize("name", ["adalora", "dynamic_dora"])
def test_the_budget_is_shared_by_the_best_ranks_of_all_layers(name: str, configure: Configure, seen: Any) -> None:
    kept_at: list[int] = []

    def look(ranks: Ranks, scores: Any, value: float, before: Any) -> None:
        flat = torch.cat(list(scores))
        count = sum(ranks.means) + int(value * (sum(ranks.counts) - sum(ranks.means)))
        worst_kept = sorted(flat.tolist(), reverse=True)[count - 1]
        for chain, own, old in zip(ranks.chains, scores, before, strict=True):
            assert chain.scales is not None
            for i in range(chain.ranks):
                if own[i] > worst_kept:
                    assert chain.scales[i] == old[2][i]
                elif own[i] < worst_kept:
                    assert chain.scales[i] == 0
                    assert (value > 0) == bool(chain.down[i].any())  # the last decision clears the rank
        kept_at.append(count)

    seen(name, look)
    train(configure(rank_allocation=name, max_train_steps=8, **METHODS["lora"]))
    assert kept_at == sorted(kept_at, reverse=True) and len(kept_at) > 2


def test_a_cleared_rank_stays_0(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    after: list[int] = []
    original = AllocationHook.after_step

    def after_step(self: AllocationHook, step: int) -> None:
        original(self, step)
        used = [chain.down.any(1) & chain.up.any(0) for chain in self.ranks.chains]
        after.append(int(torch.cat(used).sum()))
        for chain, own in zip(self.ranks.chains, used, strict=True):
            for factor, dim in chain.factors:
                assert (
                    self.decided < len(self.decisions) or not factor.index_select(dim, (~own).nonzero().flatten()).any()
                )

    monkeypatch.setattr(AllocationHook, "after_step", after_step)
    train(configure(rank_allocation="adalora", max_train_steps=8, **METHODS["lora"]))
    assert after[-1] == after[-3] < after[0]


@pytest.mark.usefixtures("often")
def test_inputs_are_averaged_and_half_of_each_row_goes(configure: Configure, seen: Any) -> None:
    """The norms against hooks of the test's own."""
    squares: dict[int, list[torch.Tensor]] = {}

    def look(ranks: Ranks, scores: Any, value: float, before: Any) -> None:
        for chain, own, (down, up) in zip(ranks.chains, scores, before, strict=True):
            for row, old, score in zip(chain.down, down, own, strict=True):
                order = sorted(range(len(score)), key=lambda j: (float(score[j]), j))
                gone = order[: len(order) // 2]
                assert not row[gone].any()
                assert torch.equal(row[order[len(gone) :]], old[order[len(gone) :]])
            assert torch.equal(chain.up, up)
        squares.setdefault(0, []).append(ranks.memory["norms"].clone())

    seen("prilora", look)
    train(configure(rank_allocation="prilora", max_train_steps=6, target_modules=["attn", "conv"], **METHODS["lora"]))
    assert len(squares[0]) == 2 and all(bool(norms.gt(0).all()) for norms in squares[0])


def test_layers_that_are_off_are_not_trained(configure: Configure, seen: Any) -> None:
    on: list[torch.Tensor] = []

    def look(ranks: Ranks, scores: Any, value: float, before: Any) -> None:
        order = torch.stack(list(scores)).argsort(descending=True, stable=True).tolist()
        on.append(ranks.memory["on"])
        for number, (chain, (down, _)) in enumerate(zip(ranks.chains, before, strict=True)):
            assert bool(on[-1][number]) == (number in order[: (len(order) + 1) // 2])
            assert bool(on[-1][number]) or not chain.up.any()
            assert torch.equal(chain.down, down)

    seen("heterolora", look)
    found = train(configure(rank_allocation="heterolora", max_train_steps=10, **METHODS["lora"]))
    assert len(on) == 5 and any(not torch.equal(on[0], later) for later in on[1:])
    assert len(inspect_adapter(found.adapter_path).base_fingerprint["unet"]) == int(on[-1].sum())


def test_copies_are_the_best_ranks_of_halfway(configure: Configure, seen: Any) -> None:
    replaced: list[int] = []

    def look(ranks: Ranks, scores: Any, value: float, before: Any) -> None:
        earlier = ranks.of_weights("halfway")
        for number, (chain, own, old) in enumerate(zip(ranks.chains, scores, before, strict=True)):
            weak = own.argsort()[0]
            strong = own.argmax()
            assert chain.scales is not None
            if torch.equal(chain.down[weak], old[0][weak]):
                continue
            replaced.append(number)
            assert torch.equal(chain.down[weak], earlier[3 * number][strong])
            assert torch.equal(chain.up[:, weak], earlier[3 * number + 1][:, strong])
            assert torch.equal(chain.down[strong], old[0][strong])
            assert chain.scales[weak] == chain.scales[strong] == (old[2][weak] + old[2][strong]) / 2
            for factor, dim in chain.factors[:2]:
                for moment in ("exp_avg", "exp_avg_sq"):
                    state = ranks.optimizer.state[factor][moment]
                    assert torch.equal(state.select(dim, int(weak)), state.select(dim, int(strong)))
            assert not ranks.optimizer.state[chain.scales]["exp_avg"].any()

    seen("beamlora", look)
    train(configure(rank_allocation="beamlora", max_train_steps=8, **{**METHODS["lora"], "learning_rate": 3e-2}))
    assert replaced


def test_ablations_leave_the_adapter_and_count_losses(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the candidates from losses of adapters that are built anew."""
    found: list[int] = []
    original = ablating.ablated

    def ablated(ranks: Ranks) -> Any:
        before = [chain.up.clone() for chain in ranks.chains]
        scores = original(ranks)
        assert all(torch.equal(chain.up, up) for chain, up in zip(ranks.chains, before, strict=True))
        number = int(ranks.memory["decided"])
        whole = float(ranks.trained.loss_of(number))
        for chain, own in zip(ranks.chains, scores, strict=True):
            for i in own.isfinite().nonzero().flatten().tolist():
                chain.up[:, i] = 0
                without = float(ranks.trained.loss_of(number))
                for other, up in zip(ranks.chains, before, strict=True):
                    other.up.zero_()
                    if other is chain:
                        other.up[:, i] = up[:, i]
                alone = float(ranks.trained.loss_of(number))
                for other, up in zip(ranks.chains, before, strict=True):
                    other.up.copy_(up)
                assert float(own[i]) == pytest.approx(-whole + without - alone, rel=1e-5)
                found.append(i)
        return scores

    monkeypatch.setattr(ablating, "ablated", ablated)
    monkeypatch.setattr(ablating, "PRUNED", 0.01)
    train(configure(rank_allocation="alora", max_train_steps=6, **METHODS["lora"]))
    assert found


def test_a_layer_gains_what_another_lost(configure: Configure, seen: Any) -> None:
    def look(ranks: Ranks, scores: Any, value: float, before: Any) -> None:
        used = ranks.of_ranks(ranks.memory["used"])
        assert sum(int(own.sum()) for own in used) == sum(ranks.means)
        changed = [int(own.sum()) - int(old[0].any(1).sum()) for own, old in zip(used, before, strict=True)]
        assert sum(changed) == 0 and any(changed)
        for chain, own, old in zip(ranks.chains, used, before, strict=True):
            new = own & ~old[0].any(1)
            assert not chain.up[:, new].any() and bool(chain.down[new].any(1).all())
            assert not chain.down[~own].any()

    seen("alora", look)
    train(configure(rank_allocation="alora", max_train_steps=6, **METHODS["lora"]))


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", ["prilora", "alora", "beamlora"])
def test_an_interrupted_run_continues_bit_for_bit(
    name: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a decision, and before the next one, for which it remembers something."""
    changes: dict[str, Any] = {"rank_allocation": name, "max_train_steps": 6, "gradient_accumulation_steps": 2}
    changes |= METHODS["lora"] | {"target_modules": ["attn", "conv"]}
    whole = train(configure(output_dir=str(tmp_path / "whole"), **changes)).adapter_path.parent
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Interrupted):
            train(configure(output_dir=str(tmp_path / "parts"), **changes))
    parts = train(configure(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest", **changes))
    assert_same_run(whole, parts.adapter_path.parent, last=6)


def test_triplets_have_a_rate_of_their_own() -> None:
    def rate(method: str, **changes: Any) -> float:
        return with_defaults(TrainConfig(method=method, **changes)).learning_rate or 0.0

    for name in ("adalora", "dynamic_dora"):
        assert rate("lora", rank_allocation=name) == 4 * rate("lora") == 4 * rate("lora", rank_allocation="alora")
        assert rate("nora", rank_allocation=name) == rate("nora")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"method": "melora", "inner_rank": None, "basis": None},
            "needs two trained factors in a row: use --method nora",
        ),
        ({"method": "mor", "inner_rank": None, "basis": None}, "needs two trained factors in a row"),
        ({"method": "dylora", "inner_rank": None, "basis": None}, "needs two trained factors in a row"),
        ({"method": "mora", "inner_rank": None, "basis": None}, "needs two trained factors in a row"),
        ({"core": "dense", "inner_rank": None}, "needs an inner rank, which --core dense does not have"),
        ({"optimizer": "lora_rite"}, "--optimizer lora_rite keeps no state of single ranks"),
        ({"ema_decay": 0.9}, "--ema_decay averages ranks that --rank_allocation adalora removes or replaces"),
    ],
)
def test_where_ranks_cannot_move(settings: dict[str, Any], words: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=words):
        check(configure(rank_allocation="adalora", **settings))
