"""Pictures that share passes equal runs of their own, whatever else is at work."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from factories import randomize
from solo_runs import COMPONENTS, SUBJECTS, Alone, ask, assert_equal_to_runs_alone, gray_levels_apart, write_library
from torch import nn

from nora_diffusion import UserError, add_adapter, load_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters.tuner.row_banks import _KeptPair
from nora_diffusion.generation.library import list_library
from nora_diffusion.generation.samplers import SAMPLERS
from nora_diffusion.loaders import delete_adapter
from nora_diffusion.loaders.tokens import add_tokens
from nora_diffusion.pipelines.components import components
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.merging import Arguments
from nora_diffusion.serving.passes import Passes
from nora_diffusion.serving.pictures import Copies, Work
from nora_diffusion.serving.rendezvous import Call, Rendezvous
from nora_diffusion.serving.tickets import Cancelled, Closed, Event, Late, Ticket
from nora_diffusion.serving.waiting import Full


@pytest.fixture(scope="module")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of several methods."""
    return write_library(tiny_base, tmp_path_factory.mktemp("library"))


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    """A pipeline that an engine may have."""
    return open_pipeline(tiny_base)


def test_pictures_equal_runs_of_their_own(tiny_base: Path, library: Path, pipe: Any) -> None:
    requests = [
        ask("a sks dog <lora:dog:0.8>", steps=4, sampler="ddim"),
        ask("a sks cat", steps=2, seed=1, subjects={"cat": 0.5}, sampler="euler"),
        ask("a red car", steps=5, seed=2, sampler="euler_a", count=2),
        ask("a sks mug <lora:mug>", guidance=1.0, seed=3, sampler="dpmpp_2m"),
        ask("a hat <lora:hat> <lora:dog:0.3>", seed=4, sampler="unipc"),
        ask("a mix <lora:mix>", seed=5),
        ask("a sks dog, a sks cat <lora:gated:0.7>", seed=6),
    ]
    with Engine(pipe, list_library(library), at_once=3) as engine:
        tickets = [engine.submit(request) for request in requests]
        assert_equal_to_runs_alone(tiny_base, library, tickets)


@pytest.mark.parametrize("sampler", [*SAMPLERS, None])
def test_pictures_join_at_any_step(tiny_base: Path, library: Path, pipe: Any, sampler: str | None) -> None:
    with Engine(pipe, list_library(library), at_once=4) as engine:
        first = engine.submit(ask("a sks dog <lora:dog>", steps=6, sampler=sampler))
        next(event for event in first.events() if event.kind == "step" and event.step >= 2)
        second = engine.submit(ask("a sks mug <lora:mug>", steps=3, seed=7, sampler=sampler))
        assert_equal_to_runs_alone(tiny_base, library, [second])


def test_few_subjects_stay_loaded(tiny_base: Path, library: Path, pipe: Any) -> None:
    names = ["dog", "cat", "mug", "dog", "cat", "hat"]
    with Engine(pipe, list_library(library), at_once=2, resident=2) as engine:
        tickets = [engine.submit(ask(f"a picture <lora:{name}>", seed=i)) for i, name in enumerate(names)]
        assert_equal_to_runs_alone(tiny_base, library, tickets)
        assert len(engine.resident_paths) <= 2


def test_pictures_wait_for_room_for_their_subjects(tiny_base: Path, library: Path, pipe: Any) -> None:
    requests = [ask(f"a picture <lora:{name}>", seed=i) for i, name in enumerate(["dog", "cat", "dog", "mug"])]
    with Engine(pipe, list_library(library), at_once=4, resident=1) as engine:
        with at_once(engine):
            tickets = [engine.submit(request) for request in requests]
        assert_equal_to_runs_alone(tiny_base, library, tickets)
        with pytest.raises(UserError, match="all 1 loaded subjects are in use"):
            engine.submit(ask("two <lora:dog> <lora:cat>")).pictures()


def test_subjects_of_one_structure_share_slots(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    for seed in range(4):
        add_adapter(pipe, SUBJECTS["dog"], "subject", COMPONENTS)
        randomize(pipe, "subject", seed, size=0.05)
        save_adapter(pipe, tmp_path / f"s{seed}", "subject")
        delete_adapter(pipe, "subject")
    asked = [ask(f"a sks dog <lora:s{i % 4}:{0.5 + 0.1 * i}>", 2 + i % 3, seed=i) for i in range(8)]
    with Engine(pipe, list_library(tmp_path), at_once=2, resident=2, host_memory=0) as engine:
        assert_equal_to_runs_alone(tiny_base, tmp_path, [engine.submit(request) for request in asked])
        now = engine.statistics
    assert now.resident == 2 and now.loads + now.hits == 8 and now.reads == now.loads and now.held == 1


def test_a_pass_that_is_too_large_is_halved_once(
    tiny_base: Path, library: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, rows, failed = pipe.unet.forward, list[int](), list[Any]()

    def small(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert all(activations() is None for activations in failed)  # else the halves would not fit either
        rows.append(len(sample))
        if len(sample) > 4:
            activations = sample + 1
            failed.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small)
    with Engine(pipe, list_library(library), at_once=4) as engine:
        tickets = [engine.submit(ask("a sks dog <lora:dog>", count=4))]
        assert_equal_to_runs_alone(tiny_base, library, tickets)
    assert max(rows) > 4 and len([count for count in rows if count > 4]) == 1


def test_a_cancelled_request_ends_between_steps(pipe: Any) -> None:
    with Engine(pipe) as engine:
        ticket = engine.submit(ask("a red car", steps=500))
        next(event for event in ticket.events() if event.kind == "step")
        ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.pictures()
        assert engine.submit(ask("a red car")).pictures()  # the engine goes on


def test_a_late_request_ends(pipe: Any) -> None:
    with Engine(pipe) as engine, pytest.raises(Late, match="not finished"):
        engine.submit(ask("a red car", steps=500, timeout=0.01)).pictures()


@contextmanager
def at_once(engine: Engine) -> Iterator[None]:
    """Let what is sent meanwhile start in one turn."""
    begun, sent = threading.Event(), threading.Event()
    asking = threading.Thread(target=lambda: engine.ask(lambda _: begun.set() or sent.wait()))
    asking.start()
    begun.wait()
    try:
        yield
    finally:
        sent.set()
        asking.join()


def test_a_failing_picture_fails_alone(tiny_base: Path, library: Path, pipe: Any) -> None:
    load_adapter(pipe, library / "cat", "broken", activate=False)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".broken." in name:
                parameter.fill_(1e30)  # finite, but its products are not
    save_adapter(pipe, library.parent / "bad" / "broken", "broken")
    delete_adapter(pipe, "broken")
    with Engine(pipe, [*list_library(library), *list_library(library.parent / "bad")], at_once=3) as engine:
        bad = engine.submit(ask("a sks cat <lora:broken>"))
        good = engine.submit(ask("a sks dog <lora:dog>"))
        with pytest.raises(UserError, match="NaN or infinity"):
            bad.pictures()
        assert_equal_to_runs_alone(tiny_base, library, [good])


def test_calls_of_a_pass_that_fails_are_answered_once() -> None:
    unet, answered = SimpleNamespace(forward=lambda sample: (sample,)), list[Call]()
    calls = [
        Call(name, "unet.forward", Arguments.of([torch.full((1, 2), value)], {}))
        for name, value in (("good", 1.0), ("bad", float("nan")))
    ]
    with mock.patch.object(Call, "answer", lambda call, _: answered.append(call)):
        Passes(SimpleNamespace(unet=unet), list).compute(calls)
    assert answered == calls[:1] and isinstance(calls[1].error, UserError)


def test_a_full_queue_refuses(pipe: Any) -> None:
    with Engine(pipe, at_once=1, waiting=2) as engine:
        tickets = [engine.submit(ask("a red car", steps=300))]
        next(event for event in tickets[0].events() if event.kind == "step")
        tickets.append(engine.submit(ask("a red car", count=2)))
        with pytest.raises(Full):
            engine.submit(ask("a red car"))
        for ticket in tickets:
            ticket.cancel()


def test_closing_finishes_or_fails_what_was_accepted(pipe: Any) -> None:
    engine = Engine(pipe, at_once=1)
    with engine:
        tickets = [engine.submit(ask("a red car", seed=seed)) for seed in range(3)]
        engine.close(drain=True)
        assert all(ticket.pictures() for ticket in tickets)
        with pytest.raises(Closed):
            engine.submit(ask("a red car"))


def test_closing_without_draining(pipe: Any) -> None:
    with Engine(pipe, at_once=1) as engine:
        tickets = [engine.submit(ask("a red car", steps=500, seed=seed)) for seed in range(3)]
        engine.close(drain=False)
    for ticket in tickets:
        with pytest.raises(Closed):
            ticket.pictures()


def test_pictures_do_not_look_through_modules_that_the_engine_changes(pipe: Any) -> None:
    work = Work(Ticket(ask("a red car")), 0)
    pipe.to("meta")
    own = Copies(pipe, Rendezvous()).of(work)
    with mock.patch.object(nn.Module, "named_modules", side_effect=RuntimeError("dictionary changed size")):
        for module in (own.unet, own.text_encoder, own.vae, own):
            assert (module.dtype, module.device.type) == (torch.float32, "meta")
    assert own._execution_device.type == "meta" and type(own).__name__ == type(pipe).__name__


def test_questions_about_the_pipeline_are_answered_between_passes(pipe: Any) -> None:
    with Engine(pipe) as engine:
        ticket = engine.submit(ask("a red car", steps=100))
        next(event for event in ticket.events() if event.kind == "step")
        assert engine.ask(lambda own: (own is pipe, threading.current_thread().name)) == (True, "engine")
        with pytest.raises(ZeroDivisionError):
            engine.ask(lambda _: 1 / 0)
        ticket.cancel()
    with pytest.raises(Closed):
        engine.ask(lambda own: own)


def test_unknown_subjects_and_samplers_are_refused(library: Path, pipe: Any) -> None:
    engine = Engine(pipe, list_library(library))
    with pytest.raises(UserError, match="names no known adapter"):
        engine.submit(ask("a sks dog <lora:dig>"))
    with pytest.raises(UserError, match="sampler 'best'"):
        engine.submit(ask("a sks dog", sampler="best"))


def test_after_a_bug_nobody_waits(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([RuntimeError("a bug")])

    def fails(engine: Engine) -> None:
        for error in errors:
            raise error

    with Engine(pipe, at_once=1) as engine:
        tickets = [engine.submit(ask("a red car", steps=500, seed=seed)) for seed in range(2)]
        next(event for event in tickets[0].events() if event.kind == "step")
        monkeypatch.setattr(Engine, "_drop_ended", fails)
        for ticket in tickets:
            with pytest.raises(Closed):
                ticket.pictures()
        assert not engine.is_open
        with pytest.raises(Closed):
            engine.submit(ask("a red car"))


def test_after_a_bug_that_comes_again_nobody_waits(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", mock.Mock())
    with Engine(pipe, at_once=1) as engine:
        tickets = [engine.submit(ask("a red car", steps=500, seed=seed)) for seed in range(2)]
        next(event for event in tickets[0].events() if event.kind == "step")
        monkeypatch.setattr(Engine, "_drop_ended", mock.Mock(side_effect=RuntimeError("a bug")))
        for ticket in tickets:
            with pytest.raises(Closed):
                ticket.pictures()


def test_a_stop_is_not_taken_back(pipe: Any) -> None:
    engine = Engine(pipe)
    ticket = engine.submit(ask("a red car"))
    engine.close(drain=False)
    engine.close(drain=True)
    with engine, pytest.raises(Closed):
        ticket.pictures()


def test_a_slow_reader_gets_the_latest_place() -> None:
    ticket = Ticket(ask("a red car", count=2))
    for index, place in ((0, 3), (1, 4), (0, 2), (1, 3)):
        ticket.tell(Event("queued", index, place=place))
    assert [(event.index, event.place) for event in ticket.take()] == [(0, 2), (1, 3)]


def test_errors_of_a_watcher_stop_nothing(pipe: Any) -> None:
    calls = [mock.Mock(side_effect=[None, *[RuntimeError("of the sender")] * 50]) for _ in range(2)]
    with Engine(pipe) as engine:
        with at_once(engine):
            ticket = engine.submit(ask("a red car"))
            ticket.watch(calls[0])
            ticket.listen(calls[1])
        assert ticket.pictures() and all(call.call_count > 1 for call in calls)
        assert engine.submit(ask("a red car")).pictures()


def test_nothing_computed_of_a_removed_subject_stays(library: Path, pipe: Any) -> None:
    with Engine(pipe, list_library(library)) as engine:
        engine.submit(ask("a picture <lora:dog> <lora:mug>")).pictures()
        gc.collect()
        kept = [weakref.ref(own) for own in gc.get_objects() if isinstance(own, _KeptPair)]
        assert kept
        engine.remove_subject("dog")
        for _ in range(2):  # the second one is answered after the turn of the first
            engine.ask(lambda _: None)
        gc.collect()
        assert all(own() is None for own in kept)
        assert engine.submit(ask("a picture <lora:mug>")).pictures()


def write_words(base: Path, folder: Path, words: dict[str, str]) -> None:
    """Adapters with one new token each, by name."""
    pipe = open_pipeline(base)
    for seed, (name, word) in enumerate(words.items()):
        add_adapter(pipe, SUBJECTS["dog"], name)
        randomize(pipe, name, seed, size=0.02)
        vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        add_tokens(pipe, components(pipe), name, {word: {"text_encoder": vectors}})
        save_adapter(pipe, folder / name, name)
        delete_adapter(pipe, name)


def test_new_tokens_are_those_of_a_pictures_own_subjects(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    """The ids of tokens change when subjects come and go, also between a picture's start and its first pass."""
    write_words(tiny_base, tmp_path, {"cat": "<cat>", "dog": "<dog>", "cow": "<cow>"})
    asked = [ask(f"a <{name}> <lora:{name}>") for name in ("dog", "cow")]
    with Engine(pipe, list_library(tmp_path), at_once=2, resident=2) as engine:
        for name in ("cat", "dog"):
            engine.submit(ask(f"a <{name}> <lora:{name}>")).pictures()
        with at_once(engine):
            tickets = [engine.submit(request) for request in asked]
        found = [ticket.pictures()[0].image for ticket in tickets]
        plain = engine.submit(ask("a <dog>")).pictures()[0].image  # it has no subject
    for request, image in zip([*asked, ask("a <dog>")], [*found, plain], strict=True):
        assert gray_levels_apart(image, Alone(tiny_base, tmp_path).images(request)[0]) <= 1, request


def test_subjects_may_have_the_same_new_token(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    write_words(tiny_base, tmp_path, {"one": "<pet>", "two": "<pet>"})
    with Engine(pipe, list_library(tmp_path)) as engine:
        with at_once(engine):
            tickets = [engine.submit(ask(f"a <pet> <lora:{name}>")) for name in ("one", "two", "one")]
        found = [ticket.pictures()[0].image for ticket in tickets]
    for ticket, image in zip(tickets, found, strict=True):
        assert gray_levels_apart(image, Alone(tiny_base, tmp_path).images(ticket.request)[0]) <= 1
