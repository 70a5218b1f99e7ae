"""The front with replicas in this process: it keeps its promises whatever happens to them."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from asynchronous import run

from nora_diffusion.errors import UserError, out_of_memory
from nora_diffusion.generation.library import NamedAdapter, list_library
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.cluster.front import TRIES, Front, Lost
from nora_diffusion.serving.cluster.replica import Replica, ReplicaSettings, Report, portable
from nora_diffusion.serving.cluster.routing import ranked
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.tickets import Cancelled, Closed, Event, Late, Ticket
from nora_diffusion.serving.waiting import Full


class InThisProcess:
    """Replicas without Ray. ``dies``: called before each event, with the replica's name; whether it is dead."""

    def __init__(self, replicas: Sequence[Replica], dies: Callable[[str], bool]) -> None:
        self.own, self.dies = {replica.name: replica for replica in replicas}, dies
        self.sent: list[tuple[str, str]] = []
        self.closed = False

    async def make(self, request: Request, lasting: Sequence[str]) -> AsyncGenerator[Event, None]:
        subject = next(iter(request.adapters.values()), "")
        name = ranked(subject, dict.fromkeys(self.own, 0))[0]
        self.sent.append((name, subject))
        async with aclosing(self.own[name].make(request, lasting)) as events:
            async for event in events:
                if self.dies(name):
                    raise Lost
                yield pickle.loads(pickle.dumps(event))

    def ask(self, function: Callable[[Any], Any]) -> Any:
        name, replica = next(iter(self.own.items()))
        if self.dies(name):
            raise Lost
        return run(replica.ask(function))

    async def forget(self, paths: Sequence[str]) -> None:
        for replica in self.own.values():
            await replica.forget(paths)

    def reports(self) -> list[Report]:
        return [run(replica.report()) for replica in self.own.values()]

    def renew(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def replicas(tiny_base: Path) -> Iterator[list[Replica]]:
    own = [Replica(ReplicaSettings(BaseSource(str(tiny_base), "cpu"), 4, 8, 2**20)) for _ in range(2)]
    yield own
    for replica in own:
        replica.engine.close(drain=False)


Start = Callable[..., Front]


@pytest.fixture
def start(replicas: list[Replica], library: Path) -> Iterator[Start]:
    """``start(at_work=1)``: a front of two replicas."""
    fronts: list[Front] = []

    def started(dies: Callable[[str], bool] = lambda name: False, **limits: int) -> Front:
        front = Front(InThisProcess(replicas, dies), list_library(library), **limits)
        fronts.append(front)
        return front.__enter__()

    yield started
    for front in fronts:
        front.close(drain=False)


def first_step(ticket: Ticket) -> None:
    next(event for event in ticket.events() if event.kind == "step")


def test_pictures_equal_those_of_an_engine(start: Start, ask: Any, equal_to_an_engine: Any) -> None:
    front = start()
    requests = [
        ask("a sks dog <lora:dog:0.8>", count=3, sampler="euler_a"),
        ask("a red car <lora:hat>", subjects={"cat": 0.5}, seed=3),
        ask("a red car", seed=4),
    ]
    tickets = [front.submit(request) for request in requests]
    assert [event.place for event in tickets[0].take() if event.kind == "queued"] == [1, 2, 3]
    equal_to_an_engine([front.submit(request) for request in requests])
    (first, *_), (second, *_) = front.submit(requests[1]).pictures(), front.submit(requests[1]).pictures()
    assert first.settings == second.settings
    assert [found["name"] for found in first.settings.adapters] == ["hat", "cat"]


def test_pictures_of_a_dead_replica_are_made_again(start: Start, ask: Any, equal_to_an_engine: Any) -> None:
    deaths = iter(range(3))

    def dies(name: str) -> bool:
        return next(deaths, None) is not None

    equal_to_an_engine([start(dies).submit(ask("a sks dog <lora:dog>", steps=3, count=3))])


def test_a_picture_that_kills_replicas_is_given_up(start: Start, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.serving.cluster.front.PAUSE", 0.0)
    front = start(lambda name: True)
    with pytest.raises(RuntimeError, match=f"{TRIES} replicas died"):
        front.submit(ask("a red car")).pictures()
    with pytest.raises(RuntimeError, match=f"{TRIES} replicas died"):
        front.ask(type)


def test_the_first_subject_decides_on_the_replica(start: Start, ask: Any, library: Path) -> None:
    front = start()
    for name in ("dog", "cat", "hat", "dog", "cat", "hat"):
        front.submit(ask(f"a picture <lora:{name}> <lora:{'cat' if name == 'hat' else 'hat'}:0.1>")).pictures()
    sent = front._replicas.sent  # type: ignore[attr-defined]
    assert len(set(sent)) == 3 and len(sent) == 6
    assert {Path(subject).parent.name for _, subject in sent} == {"dog", "cat", "hat"}


def test_cancelled_and_late_requests_end(start: Start, ask: Any) -> None:
    front = start(at_work=1)
    tickets = [front.submit(ask("a red car", steps=500)) for _ in range(2)]
    first_step(tickets[0])
    tickets[1].cancel()  # waits
    with pytest.raises(Cancelled):
        tickets[1].pictures()
    with pytest.raises(Late):
        front.submit(ask("a red car", timeout=0.05)).pictures()
    tickets[0].cancel()
    with pytest.raises(Cancelled):
        tickets[0].pictures()
    with pytest.raises(Late):
        front.submit(ask("a red car", steps=500, timeout=0.05)).pictures()
    assert front.submit(ask("a red car")).pictures()


def test_a_full_queue_refuses(start: Start, ask: Any) -> None:
    front = start(at_work=1, waiting=2)
    tickets = [front.submit(ask("a red car", steps=500))]
    first_step(tickets[0])
    tickets.append(front.submit(ask("a red car", count=2)))
    assert [event.place for event in tickets[1].take()] == [1, 2]
    with pytest.raises(Full):
        front.submit(ask("a red car"))
    assert (front.statistics.waiting, front.statistics.at_work) == (2, 1)
    tickets[0].cancel()
    assert [(event.index, event.place) for event in tickets[1].events() if event.kind == "queued"] == [(1, 1)]


def test_statistics_are_those_of_all_replicas(start: Start, ask: Any, replicas: list[Replica]) -> None:
    front = start()
    for prompt in ("a dog <lora:dog>", "a cat <lora:cat>", "a hat <lora:hat>"):
        front.submit(ask(prompt)).pictures()
    now, own = front.statistics, [replica.engine.statistics for replica in replicas]
    assert now.passes == sum(one.passes for one in own) == sum(now.pass_seconds.counts) == sum(now.pass_rows.counts)
    assert now.rows == sum(one.rows for one in own) == now.pass_rows.sum
    assert now.pass_seconds.sum == pytest.approx(sum(one.pass_seconds.sum for one in own))


def test_subjects_come_and_go(start: Start, ask: Any, library: Path, tmp_path: Path) -> None:
    front = start(at_work=1)
    file = shutil.copy(library / "dog" / "nora_adapter.safetensors", tmp_path / "bird.safetensors")
    bird = NamedAdapter("bird", str(file))
    front.add_subject(bird)
    with pytest.raises(UserError, match="there is a subject 'bird' already"):
        front.add_subject(bird)
    assert front.submit(ask("a bird <lora:bird>")).pictures() and bird.path in front.resident_paths
    busy = front.submit(ask("a red car", steps=500))
    first_step(busy)
    waiting = front.submit(ask("a bird <lora:bird>"))
    front.remove_subject("bird")
    busy.cancel()
    with pytest.raises(UserError, match="was removed while it waited"):
        waiting.pictures()
    with pytest.raises(UserError, match="names no known adapter"):
        front.submit(ask("a bird <lora:bird>"))
    with pytest.raises(UserError, match="there is no subject 'bird'"):
        front.remove_subject("bird")
    while bird.path in front.resident_paths:
        threading.Event().wait(0.01)


def test_questions_are_answered_by_a_replica(start: Start) -> None:
    deaths = iter([True])
    front = start(lambda name: next(deaths, False))
    assert front.ask(lambda pipe: type(pipe).__name__) == "StableDiffusionPipeline"
    with pytest.raises(ZeroDivisionError):
        front.ask(lambda pipe: 1 / 0)


def test_closing_finishes_or_fails_what_was_accepted(start: Start, ask: Any) -> None:
    front = start(at_work=1)
    tickets = [front.submit(ask("a red car", seed=seed)) for seed in range(3)]
    assert front.is_open
    front.close(drain=True)
    assert all(ticket.pictures() for ticket in tickets) and not front.is_open
    assert front._replicas.closed  # type: ignore[attr-defined]
    with pytest.raises(Closed):
        front.submit(ask("a red car"))
    with pytest.raises(Closed):
        front.ask(type)
    tickets[0].cancel()  # too late, and no error
    front = start(at_work=1)
    tickets = [front.submit(ask("a red car", steps=500, seed=seed)) for seed in range(3)]
    front.close(drain=False)
    for ticket in tickets:
        with pytest.raises(Closed):
            ticket.pictures()


def test_a_replica_whose_engine_has_stopped_ends(tiny_base: Path, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    replica = Replica(ReplicaSettings(BaseSource(str(tiny_base), "cpu"), 1, 1, 0))
    run(replica.check_health())

    async def made() -> list[Event]:
        events = replica.make(ask("a red car", steps=500), [])
        first = await anext(events)
        threading.Thread(target=replica.engine.close, args=(False,)).start()
        return [first, *[event async for event in events]]

    assert run(made())[-1].kind == "error"
    with pytest.raises(Closed):
        run(made())
    run(replica.check_health())
    assert codes == [1, 1, 1]


def test_errors_keep_their_meaning_in_another_process() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    for error, kind in ((Late("late"), Late), (Odd(1, 2), RuntimeError), (MemoryError(), MemoryError)):
        found = pickle.loads(pickle.dumps(portable(Event("error", 0, error=error)))).error
        assert type(found) is kind and out_of_memory(found) == out_of_memory(error)
