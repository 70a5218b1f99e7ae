"""The queue for the device: a full queue, and pages that cannot stop each other's runs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion.ui.device import MAX_WAITING, Device
from nora_diffusion.ui.layout.page import stop_handler
from nora_diffusion.ui.request import MAX_IMAGES, MAX_STEPS
from nora_diffusion.ui.runs import Run, Runs
from nora_diffusion.ui.tabs import compare, generate, mix

from .conftest import LONG, WAIT, Server, open_tab, until

ENDLESS = (MAX_IMAGES, MAX_STEPS)  # longer than any test


def order(prompt: str, count: int = 1, steps: int = 2, seed: int = 3) -> list[Any]:
    return [prompt, "", count, seed, steps, 2.0, 16, 16, {}, True, "own", 1, 0.5, None, "", 0.7, True]


class PendingRequest:
    """A generate request of its own page, running in a thread."""

    def __init__(self, server: Server, session: str, *data: Any) -> None:
        self.server, self.session, self.result = server, session, {}
        self._thread = threading.Thread(target=self._send, args=data)
        self._thread.start()

    def _send(self, *data: Any) -> None:
        self.result = self.server.call("generate", *data, session=self.session)

    def end(self) -> str:
        """Interrupt it until it is over. Returns its last output."""
        while self._thread.is_alive():
            assert self.server.press("interrupt", session=self.session).status_code == 200
            self._thread.join(0.3)
        return self.output

    @property
    def output(self) -> str:
        """Its last output; empty until it is over."""
        return str(self.result.get("output", ""))


def image_count(server: Server) -> int:
    return len(list((server.library / "pictures").glob("*.png")))


def test_a_full_queue_is_reported_and_empties(page: Any, server: Server) -> None:
    # One runs, MAX_WAITING wait, and one too many is refused at once.
    requests = [
        PendingRequest(server, f"page {number}", *order("a dog", *ENDLESS)) for number in range(MAX_WAITING + 2)
    ]
    try:
        until(lambda: any("queue is full" in request.output for request in requests))
        page.fill("#prompt textarea", "a cat")
        page.click("#generate")
        page.get_by_text(f"The queue is full ({MAX_WAITING} are waiting): try again in a moment").wait_for()
        expect(page.locator("#generate")).to_be_visible()
    finally:
        outputs = [request.end() for request in requests]
    assert ["Interrupted" in output for output in outputs].count(True) == MAX_WAITING + 1
    assert server.call("generate", *order("a cat"), session="late")["success"]


def test_a_page_cannot_stop_the_run_of_another_page(server: Server) -> None:
    before = image_count(server)
    mine = PendingRequest(server, "mine", *order("a dog", MAX_IMAGES, 50))
    try:
        until(lambda: image_count(server) > before, LONG)
        for name in ("interrupt", "skip"):
            server.press(name, session="somebody else")
        now = image_count(server)
        until(lambda: image_count(server) > now, LONG)
    finally:
        output = mine.end()
    assert "Interrupted" in output


@pytest.mark.parametrize(("work", "end"), [(generate.WORK, "0 images in"), (mix.WORK, "Interrupted after")])
def test_only_its_own_button_stops_a_batch(work: str, end: str, tmp_path: Path) -> None:
    pressed = threading.Event()

    def make_batch(order: Any, rows: Any, out: Any, run: Run) -> None:
        assert pressed.wait(WAIT)
        run.check()

    app: Any = SimpleNamespace(
        device=Device(tmp_path / "lock"), runs=Runs(), engine=SimpleNamespace(make_batch=make_batch, is_remote=False),
        library=SimpleNamespace(images=tmp_path),
    )  # fmt: skip
    page: Any = SimpleNamespace(username="", session_hash="page")
    batch = mix.batch_handler(app)("a dog", 2, 2.0, 1, page)
    next(batch)
    for act in (Run.interrupt, Run.skip) if work == generate.WORK else (Run.interrupt,):
        stop_handler(app, act, work)(page)
    pressed.set()
    assert end in [status["value"] for _, _, status, _ in batch][-1]
    assert len({generate.WORK, mix.WORK, compare.WORK}) == 3


def test_a_removed_adapter_leaves_no_trace_in_the_running_app(server: Server) -> None:
    """The image before an adapter is used, and after it is removed, is the same byte for byte."""

    def make(prompt: str) -> bytes:
        before = set((server.library / "pictures").glob("*.png"))
        assert server.call("generate", *order(prompt), session="traces")["success"]
        (made,) = set((server.library / "pictures").glob("*.png")) - before
        return made.read_bytes()

    never = make("a dog")
    other = make("a dog <lora:dog:1> <lora:hat:0.7>")
    assert make("a dog") == never and make("a dog <lora:dog:1> <lora:hat:0.7>") == other != never


def test_scripts_cannot_bypass_the_queue(page: Any, server: Server) -> None:
    """A queued handler answers only through the queue."""
    open_tab(page, "library")
    assert server.press("generate", *order("a dog")).status_code == 404
