"""Replicas on a real Ray Serve: they are killed, replaced and stopped, and no accepted request is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.cluster.front import Front
from nora_diffusion.serving.http.catalog import Catalog
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.engines import portable, renew, running
from nora_diffusion.serving.http.state import State
from nora_diffusion.serving.http.uploads import Uploads
from nora_diffusion.serving.tickets import Cancelled, Late, Ticket
from nora_diffusion.serving.waiting import Full

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas need a core each"),
]
NAMES = ("dog", "cat", "hat")


@dataclass
class Server:
    """A server without a network. ``http``: a client of it."""

    state: State
    front: Front
    http: Any


@pytest.fixture(scope="module")
def server(tiny_base: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two replicas in a Ray cluster of its own, of which nothing is left at the end."""
    pytest.importorskip("ray.serve")
    from starlette.testclient import TestClient

    from nora_diffusion.serving.http.application import application

    before = {process.pid for process in psutil.Process().children(recursive=True)}
    uploads = tmp_path_factory.mktemp("uploads")
    config = portable(
        ServeConfig(
            BaseSource(str(tiny_base), "cpu"), [str(library)], uploads=str(uploads), at_once=4, waiting=12,
            engine="ray", replicas="2",
        )
    )  # fmt: skip
    catalog = Catalog(config.subjects, Uploads(uploads))
    handler = signal.getsignal(signal.SIGTERM)
    with running(config, catalog) as front:
        assert isinstance(front, Front) and signal.getsignal(signal.SIGTERM) == handler  # Ray would exit
        state = State(config, front, catalog)
        yield Server(state, front, TestClient(application(state), base_url="http://localhost"))
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def pid(pipe: Any) -> int:
    return os.getpid()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other processes do; a busy one may miss a question."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_subject_stays_where_it_is_loaded(server: Server, ask: Any) -> None:
    for seed, name in enumerate(NAMES * 6):
        server.front.submit(ask(f"a picture <lora:{name}>", seed=seed)).pictures()
    until(lambda: len(server.front._replicas.reports()) == 2)
    found = server.front.statistics
    assert found.loads + found.hits == 18
    assert found.resident == found.loads <= 2 * 3  # a replica that is busy may be passed over, but none loads twice


def test_pictures_equal_those_of_an_engine(
    server: Server, ask: Any, equal_to_an_engine: Callable[[Sequence[Ticket]], None]
) -> None:
    tickets = [
        server.front.submit(ask("a sks dog <lora:dog:0.8>", count=2, sampler="euler_a")),
        server.front.submit(ask("a red car", subjects={"cat": 0.5}, seed=3)),
        server.front.submit(ask("a red car <lora:hat> <lora:dog:0.3>", seed=4)),
    ]
    equal_to_an_engine(tickets)


def test_cancelled_and_late_requests_end_in_the_replica(server: Server, ask: Any) -> None:
    ticket = server.front.submit(ask("a red car", steps=500))
    next(event for event in ticket.events() if event.kind == "step")
    ticket.cancel()
    with pytest.raises(Cancelled):
        ticket.pictures()
    with pytest.raises(Late):
        server.front.submit(ask("a red car", steps=500, timeout=0.2)).pictures()
    until(lambda: not any(report.statistics.at_work for report in server.front._replicas.reports()))


def test_too_many_waiting_pictures_are_refused(server: Server, ask: Any) -> None:
    tickets = [server.front.submit(ask("a red car", steps=500, count=4)) for _ in range(2)]
    until(lambda: len(server.front._at_work) == 8)
    tickets.append(server.front.submit(ask("a red car", count=12)))
    with pytest.raises(Full):
        server.front.submit(ask("a red car"))
    for ticket in tickets:
        ticket.cancel()
    with pytest.raises(Cancelled):
        tickets[-1].pictures()


def test_uploads_reach_the_replicas_and_leave_them(server: Server, library: Path) -> None:
    body = {"prompt": "a bird <lora:bird>", "steps": 1, "width": 16, "height": 16, "seed": 0}
    content = (library / "cat" / "nora_adapter.safetensors").read_bytes()
    answer = server.http.put("/v1/subjects/bird", content=content)
    assert answer.status_code == 201, answer.text
    path = server.state.catalog.subjects["bird"].adapter.path
    assert server.http.post("/v1/pictures", json=body).status_code == 200
    until(lambda: path in server.front.resident_paths)
    assert server.http.delete("/v1/subjects/bird").status_code == 200
    assert server.http.post("/v1/pictures", json=body).status_code == 400
    until(lambda: path not in server.front.resident_paths)


def test_a_killed_replica_loses_no_request(
    server: Server, ask: Any, equal_to_an_engine: Callable[[Sequence[Ticket]], None], caplog: pytest.LogCaptureFixture
) -> None:
    victim = server.front.ask(pid)
    requests = [ask(f"a picture <lora:{NAMES[seed % 3]}>", steps=60, seed=seed) for seed in range(12)]
    tickets = [server.front.submit(request) for request in requests]
    until(lambda: len(server.front._at_work) == 8)
    next(event for event in tickets[0].events() if event.kind == "step")
    os.kill(victim, signal.SIGKILL)
    equal_to_an_engine(tickets)
    assert "the replica of a picture died: the picture is made again" in caplog.text


def test_a_renewal_loses_no_request(server: Server, ask: Any) -> None:
    before = server.front.ask(pid)
    tickets = [server.front.submit(ask(f"a picture <lora:{NAMES[seed % 3]}>", steps=40)) for seed in range(12)]
    renew(server.state)
    assert all(ticket.pictures() for ticket in tickets)
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(before)
    assert server.front.submit(ask("a picture <lora:dog>")).pictures()


def test_stopping_finishes_what_was_accepted(server: Server, ask: Any) -> None:
    tickets = [server.front.submit(ask("a red car", seed=seed)) for seed in range(12)]
    server.front.close()
    assert all(ticket.pictures() for ticket in tickets)
    assert server.http.get("/ready").status_code == 503
