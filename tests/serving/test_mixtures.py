"""Random mixtures of requests: each picture that is not cancelled equals a run of its own, and no ticket stays open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from solo_runs import NAMES, Alone, gray_levels_apart, write_library

from nora_diffusion import open_pipeline
from nora_diffusion.generation.library import list_library
from nora_diffusion.generation.samplers import SAMPLERS
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import list_adapters
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.tickets import Cancelled, Event, Ticket

EXAMPLES = 20
QUIET: Any = {
    "deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True,
}  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A request, sent when the one before it has made so many events, and cancelled after so many of its own."""

    request: Request
    after: int
    cancel: int | None


def weights() -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, 0.0, 0.3, 1.0])


@st.composite
def sent(draw: st.DrawFn) -> Sent:
    size, steps = draw(st.sampled_from([16, 24])), draw(st.integers(1, 4))
    sampling = Sampling(steps, draw(st.sampled_from([1.0, 4.0])), width=size, height=16,
                        sampler=draw(st.sampled_from([None, *SAMPLERS])))  # fmt: skip
    request = Request(
        draw(st.sampled_from(["a sks dog", "a red car in the snow"])), sampling,
        draw(st.dictionaries(st.sampled_from(sorted(NAMES)), weights(), max_size=2)), draw(st.integers(0, 3)),
        draw(st.integers(1, 2)), draw(st.sampled_from(["", "alice"])),
    )  # fmt: skip
    return Sent(request, draw(st.integers(0, 3)), draw(st.none() | st.integers(1, 3)))


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tiny_base, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def alone(tiny_base: Path, folder: Path) -> Iterator[Alone]:
    """Makes the pictures of requests alone, each once."""
    yield Alone(tiny_base, folder)


class Sender:
    """Sends requests in order, notes their events, and cancels some."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._changed = engine, threading.Condition()

    def send(self, own: Sent) -> tuple[Ticket, list[Event]]:
        """Send a request, and wait for some of its events; the list of events grows until its end."""
        ticket, events = self._engine.submit(own.request), list[Event]()

        def note() -> None:
            with self._changed:
                events.extend(ticket.take())
                self._changed.notify_all()
            if own.cancel is not None and len(events) >= own.cancel:
                ticket.cancel()

        ticket.listen(note)
        self.wait(lambda: len(events) >= own.after or is_over(own.request, events))
        return ticket, events

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)


def is_over(request: Request, events: Sequence[Event]) -> bool:
    return sum(event.is_last for event in events) == request.count


@pytest.mark.slow
@settings(max_examples=EXAMPLES, **QUIET)
@given(plan=st.lists(sent(), min_size=2, max_size=6), at_once=st.integers(1, 4), resident=st.integers(8, 12))
def test_each_picture_equals_a_run_of_its_own(
    tiny_base: Path, folder: Path, alone: Alone, plan: list[Sent], at_once: int, resident: int
) -> None:
    pipe = open_pipeline(tiny_base)
    expected = [alone.made(own.request) for own in plan]
    with Engine(pipe, list_library(folder), at_once=at_once, resident=resident, host_memory=0) as engine:
        sender = Sender(engine)
        sent = [sender.send(own)[1] for own in plan]
        sender.wait(lambda: all(is_over(own.request, events) for own, events in zip(plan, sent, strict=True)))
        assert engine.statistics.at_work == engine.statistics.waiting == 0
    for own, events, made in zip(plan, sent, expected, strict=True):
        latents = {event.index: event.latents for event in events if event.kind == "step" and event.step == event.steps}
        for last in (event for event in events if event.is_last):
            if last.picture is None:
                assert own.cancel is not None and isinstance(last.error, Cancelled)
            else:
                image, theirs = made[last.index]
                assert gray_levels_apart(last.picture.image, image) <= 1, own
                assert (latents[last.index] - theirs).norm() <= 1e-4 * theirs.norm(), own
    assert len(list_adapters(pipe).get("unet", [])) <= resident
