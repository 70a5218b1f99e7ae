"""One job at a time, whoever asks: a full queue, and what one page may do to the run of another."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion.ui.device import MAX_WAITING, Device
from nora_diffusion.ui.layout.page import stopper
from nora_diffusion.ui.request import MAX_PICTURES, MAX_STEPS
from nora_diffusion.ui.runs import Run, Runs
from nora_diffusion.ui.tabs import compare, generate, mix

from .conftest import LONG, WAIT, Server, open_tab, until

ENDLESS = (MAX_PICTURES, MAX_STEPS)  # longer than any page needs for what is done meanwhile


def order(prompt: str, count: int = 1, steps: int = 2, seed: int = 3) -> list[Any]:
    return [prompt, "", count, seed, steps, 2.0, 16, 16, {}]


class Asked:
    """A request for pictures of a page of its own, on its way."""

    def __init__(self, server: Server, session: str, *data: Any) -> None:
        self.server, self.session, self.result = server, session, {}
        self._thread = threading.Thread(target=self._ask, args=data)
        self._thread.start()

    def _ask(self, *data: Any) -> None:
        self.result = self.server.call("generate", *data, session=self.session)

    def end(self) -> str:
        """Interrupt it until it is over; returns what its page says at last."""
        while self._thread.is_alive():
            assert self.server.press("interrupt", session=self.session).status_code == 200
            self._thread.join(0.3)
        return self.said

    @property
    def said(self) -> str:
        """What its page says at last; empty as long as it waits or works."""
        return str(self.result.get("output", ""))


def pictures(server: Server) -> int:
    return len(list((server.library / "pictures").glob("*.png")))


def test_a_full_queue_is_said_plainly_and_empties(page: Any, server: Server) -> None:
    # One works, as many as may be are waiting, and one too many is told so at once.
    asked = [Asked(server, f"page {number}", *order("a dog", *ENDLESS)) for number in range(MAX_WAITING + 2)]
    try:
        until(lambda: any("queue is full" in one.said for one in asked))
        page.fill("#prompt textarea", "a cat")
        page.click("#generate")
        page.get_by_text(f"The queue is full ({MAX_WAITING} are waiting): try again in a moment").wait_for()
        expect(page.locator("#generate")).to_be_visible()
    finally:
        ends = [one.end() for one in asked]
    assert ["Interrupted" in end for end in ends].count(True) == MAX_WAITING + 1
    assert server.call("generate", *order("a cat"), session="late")["success"]


def test_nobody_stops_the_run_of_another_page(server: Server) -> None:
    before = pictures(server)
    mine = Asked(server, "mine", *order("a dog", MAX_PICTURES, 50))
    try:
        until(lambda: pictures(server) > before, LONG)
        for name in ("interrupt", "skip"):
            server.press(name, session="somebody else")
        now = pictures(server)
        until(lambda: pictures(server) > now, LONG)
    finally:
        said = mine.end()
    assert "Interrupted" in said


@pytest.mark.parametrize(("work", "end"), [(generate.WORK, "0 pictures in"), (mix.WORK, "Interrupted after")])
def test_a_batch_is_stopped_by_its_own_button_alone(work: str, end: str, tmp_path: Path) -> None:
    pressed = threading.Event()

    def make_batch(order: Any, rows: Any, out: Any, run: Run) -> None:
        assert pressed.wait(WAIT)
        run.check()

    app: Any = SimpleNamespace(
        device=Device(tmp_path / "lock"), runs=Runs(), engine=SimpleNamespace(make_batch=make_batch),
        library=SimpleNamespace(pictures=tmp_path),
    )  # fmt: skip
    page: Any = SimpleNamespace(username="", session_hash="page")
    batch = mix.batcher(app)("a dog", 2, 2.0, 1, page)
    next(batch)
    for act in (Run.interrupt, Run.skip) if work == generate.WORK else (Run.interrupt,):
        stopper(app, act, work)(page)
    pressed.set()
    assert end in [said["value"] for _, _, said, _ in batch][-1]
    assert len({generate.WORK, mix.WORK, compare.WORK}) == 3


def test_a_removed_adapter_leaves_no_trace_in_the_running_app(server: Server) -> None:
    """The same picture, byte for byte, before an adapter was there and after it was gone."""

    def make(prompt: str) -> bytes:
        before = set((server.library / "pictures").glob("*.png"))
        assert server.call("generate", *order(prompt), session="traces")["success"]
        (made,) = set((server.library / "pictures").glob("*.png")) - before
        return made.read_bytes()

    never = make("a dog")
    other = make("a dog <lora:dog:1> <lora:hat:0.7>")
    assert make("a dog") == never and make("a dog <lora:dog:1> <lora:hat:0.7>") == other != never


def test_a_script_s_page_is_that_of_the_browser(page: Any, server: Server) -> None:
    """What a tab asks past the queue is what a script would: nothing is hidden but by the handlers themselves."""
    open_tab(page, "library")
    assert server.press("generate", *order("a dog")).status_code == 404  # not past the line before the device
