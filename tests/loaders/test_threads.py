"""What other threads see while adapters come, go and are served: whole adapters, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    exclusive,
    list_adapters,
    load_adapter,
    lora,
    mix,
    mixed_batch,
    nora,
    open_pipeline,
    save_adapter,
    set_adapters,
)
from nora_diffusion.loaders import load

WAIT = 60.0


@pytest.fixture
def saved(tiny_base: Path, tmp_path: Path) -> Path:
    pipe = open_pipeline(tiny_base)
    for seed, name in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
        randomize(pipe, name, seed)
        save_adapter(pipe, tmp_path / name, name)
    return tmp_path


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    return open_pipeline(tiny_base)


def predict(pipe: Any) -> torch.Tensor:
    width = pipe.unet.config.cross_attention_dim
    source = torch.Generator().manual_seed(0)
    noisy, hidden = (torch.randn(*shape, generator=source) for shape in ((1, 4, 8, 8), (1, 5, width)))
    with torch.no_grad():
        return pipe.unet(noisy, 3, hidden).sample


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("first", [True, False], ids=["into a bare base", "beside another"])
def test_a_half_loaded_adapter_is_not_seen(
    pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    if not first:
        load_adapter(pipe, saved / "dog")
    before, seen, fill = predict(pipe), [], load._fill

    def watched(*given: Any) -> None:
        seen.append(predict(pipe))
        fill(*given)
        seen.append(predict(pipe))

    monkeypatch.setattr(load, "_fill", watched)
    load_adapter(pipe, saved / "cat", activate=False)
    assert len(seen) == 2 and all(torch.equal(now, before) for now in (*seen, predict(pipe)))


def test_verbs_of_two_threads_wait_for_each_other(pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on, place = threading.Event(), threading.Event(), load.place

    def slow(*given: Any) -> None:
        entered.set()
        assert go_on.wait(WAIT)
        place(*given)

    monkeypatch.setattr(load, "place", slow)
    one = beside(lambda: load_adapter(pipe, saved / "dog"))
    assert entered.wait(WAIT)
    done: list[str] = []
    other = beside(lambda: (set_adapters(pipe, "dog", 0.5), done.append("weighed")))
    other.join(0.2)
    assert not done  # else it would not have found the adapter
    go_on.set()
    one.join(WAIT), other.join(WAIT)
    assert done == ["weighed"] and list_adapters(pipe) == {"unet": ["dog"]}


@pytest.mark.parametrize("context", [lambda pipe: mixed_batch(pipe, ["dog"]), exclusive], ids=["batch", "exclusive"])
def test_nothing_changes_while_a_thread_is_alone(pipe: Any, saved: Path, context: Callable[[Any], Any]) -> None:
    load_adapter(pipe, saved / "dog")
    with context(pipe):
        other = beside(lambda: load_adapter(pipe, saved / "cat"))
        other.join(0.2)
        assert other.is_alive() and list_adapters(pipe) == {"unet": ["dog"]}
    other.join(WAIT)
    assert list_adapters(pipe) == {"unet": ["dog", "cat"]}


def test_a_mixed_batch_refuses_new_and_fewer_adapters(pipe: Any, saved: Path) -> None:
    """Its rows would not know of them: a first adapter would act on every row."""
    changes: list[Callable[[], object]] = [
        lambda: load_adapter(pipe, saved / "dog"),
        lambda: add_adapter(pipe, lora(r=2), "new"),
        lambda: mixed_batch(pipe, [None]).__enter__(),
    ]
    for _ in range(2):  # into a bare base, then beside an adapter
        with mixed_batch(pipe, [None]):
            before = predict(pipe)
            for change in changes:
                with pytest.raises(UserError, match="leave that context first"):
                    change()
            assert torch.equal(predict(pipe), before)
        if not list_adapters(pipe):
            load_adapter(pipe, saved / "cat")
            changes += [lambda: delete_adapter(pipe, "cat"), lambda: mix(pipe, {"cat": 1.0})]
    delete_adapter(pipe, "cat")
    assert list_adapters(pipe) == {}
