"""Threads: adapters are never seen half loaded, and functions that change a pipeline run one at a time."""

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


def start_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("first", [True, False], ids=["into a bare base", "beside another"])
def test_adapter_is_not_seen_while_it_loads(
    pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    if not first:
        load_adapter(pipe, saved / "dog")
    before, seen, fill = predict(pipe), [], load._fill

    def recording_fill(*args: Any) -> None:
        seen.append(predict(pipe))
        fill(*args)
        seen.append(predict(pipe))

    monkeypatch.setattr(load, "_fill", recording_fill)
    load_adapter(pipe, saved / "cat", activate=False)
    assert len(seen) == 2 and all(torch.equal(now, before) for now in (*seen, predict(pipe)))


def test_calls_in_two_threads_run_one_at_a_time(pipe: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, resume, insert = threading.Event(), threading.Event(), load.insert

    def slow(*args: Any) -> None:
        entered.set()
        assert resume.wait(WAIT)
        insert(*args)

    monkeypatch.setattr(load, "insert", slow)
    one = start_thread(lambda: load_adapter(pipe, saved / "dog"))
    assert entered.wait(WAIT)
    done: list[str] = []
    other = start_thread(lambda: (set_adapters(pipe, "dog", 0.5), done.append("weights set")))
    other.join(0.2)
    assert not done  # otherwise it would not have found the adapter
    resume.set()
    one.join(WAIT), other.join(WAIT)
    assert done == ["weights set"] and list_adapters(pipe) == {"unet": ["dog"]}


@pytest.mark.parametrize("context", [lambda pipe: mixed_batch(pipe, ["dog"]), exclusive], ids=["batch", "exclusive"])
def test_other_threads_wait_for_the_context(pipe: Any, saved: Path, context: Callable[[Any], Any]) -> None:
    load_adapter(pipe, saved / "dog")
    with context(pipe):
        other = start_thread(lambda: load_adapter(pipe, saved / "cat"))
        other.join(0.2)
        assert other.is_alive() and list_adapters(pipe) == {"unet": ["dog"]}
    other.join(WAIT)
    assert list_adapters(pipe) == {"unet": ["dog", "cat"]}


def test_mixed_batch_refuses_added_and_deleted_adapters(pipe: Any, saved: Path) -> None:
    """A new adapter would act on every row."""
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
