"""The app on a server: ``--server URL``."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion.evaluation.axes import Cell
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.client import ServerError
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.http import engines, server
from nora_diffusion.serving.http.access.keys import new_key
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.ui.remote.cells import Cells

from .conftest import Server, expand, number, open_tab, press, select, start, until, visit, visitor

FINISHED = re.compile(r"^\s*\d images? in [\d.]+ s\.\s*$")


@dataclass
class Device:
    """A server that can be stopped and started again on its port."""

    config: ServeConfig
    engine: Any = None
    _running: ExitStack | None = None

    def start(self) -> str:
        """Start it; its address."""

        def kept(*given: Any, **named: Any) -> Any:
            self.engine = Engine(*given, **named)
            return self.engine

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "Engine", kept)
            self._running = ExitStack()
            url = self._running.enter_context(server.started(self.config))
        self.config.port = int(url.rstrip("/").rpartition(":")[2])
        return url

    def stop(self) -> None:
        """Stop it without finishing anything."""
        if self._running is not None:
            self._running.close()
            self._running = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """No pass is computed within the block."""
        holds, free = threading.Event(), threading.Event()

        def hold(_: Any) -> None:
            holds.set()
            free.wait()

        thread = threading.Thread(target=self.engine.ask, args=(hold,))
        thread.start()
        holds.wait()
        try:
            yield
        finally:
            free.set()
            thread.join()

    def is_idle(self) -> bool:
        """Whether it makes no picture, and none waits."""
        now = self.engine.statistics
        return now.waiting == now.at_work == 0


@pytest.fixture(scope="module")
def device(base: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A server with the adapters of the tests of the app, and a key."""
    keys = tmp_path_factory.mktemp("keys")
    (keys / "key").write_text(new_key(keys / "keys", "app"))
    running = Device(
        ServeConfig(BaseSource(str(base), "cpu"), [str(library)], port=0, keys=str(keys / "keys"), drain=0)
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def app(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app on that server."""
    key = Path(device.config.keys or "").with_name("key")
    url = f"http://127.0.0.1:{device.config.port}"
    running = start(tmp_path_factory.mktemp("remote"), "--server", url, "--server_key", str(key))
    yield running
    libraries = Path(f"/proc/{running.process.pid}/maps")
    assert not libraries.exists() or "libtorch" not in libraries.read_text()  # after all that the tests have done
    running.stop()
    assert key.read_text() not in running.log.read_text()


@pytest.fixture
def page(browser: Any, app: Server) -> Iterator[Any]:
    with opened(browser, app) as tab:
        yield tab


@contextmanager
def opened(browser: Any, app: Server) -> Iterator[Any]:
    """A fresh visit, with small images."""
    with visitor(browser) as tab:
        visit(tab, app.url)
        tab.locator("#prompt textarea").fill("a red car")
        expand(tab, "Sampling settings")
        number(tab, "Steps", 4)
        yield tab


def generate(page: Any) -> Any:
    """Press Generate; the status line."""
    status = page.locator("#status")
    press(page.locator("#generate"), status)
    return status


def test_images_of_a_subject(page: Any, app: Server) -> None:
    page.locator("#add-adapter input").click()
    page.get_by_role("option", name="dog", exact=True).click()
    expect(page.locator("#prompt textarea")).to_have_value("a red car <lora:dog:0.8>")
    number(page, "Number of images", 2)
    before = set((app.library / "pictures").glob("*.png"))
    expect(generate(page)).to_have_text(FINISHED)
    expect(page.locator("#gallery img")).to_have_count(2)
    made = set((app.library / "pictures").glob("*.png")) - before
    one, two = sorted(made, key=lambda file: read_settings(file).seed)  # they arrive in any order
    settings = read_settings(one)
    assert (settings.prompt, settings.steps, settings.base) == ("a red car", 4, "base")
    assert read_settings(two).seed == settings.seed + 1 and settings.adapters[0]["name"] == "dog"
    page.get_by_role("button", name="Settings from an image").click()
    page.locator("#drop-image input[type=file]").set_input_files(str(one))
    expect(page.locator("#changes")).to_contain_text("Seed")
    expect(page.locator("#changes")).not_to_contain_text("is not in the library")


def test_what_needs_a_local_base_is_not_there(page: Any, app: Server) -> None:
    expect(page.locator("#title")).to_contain_text("base on the server 127.0.0.1")
    expect(page.locator("#not-here")).to_contain_text("start it without --server")
    for name in ("Train", "Mix", "Inspect"):
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_count(0)
    expect(page.get_by_label("Keep subjects apart")).to_have_count(0)
    open_tab(page, "library")
    card = page.locator("#cards .card", has_text="dog").first
    expect(card).to_contain_text("sks")
    card.click()
    expect(page.locator("#about")).to_contain_text("SHA-256")
    expect(page.locator("#delete")).to_be_hidden()
    page.locator("#insert").click()
    expect(page.locator("#prompt textarea")).to_have_value(re.compile("<lora:dog:1>"))


def test_an_unknown_subject_is_refused_in_words(page: Any) -> None:
    page.locator("#prompt textarea").fill("a red car <lora:nobody>")
    page.locator("#generate").click()
    page.get_by_text("The server has no subject 'nobody'").wait_for()


def test_the_place_in_the_queue_and_stop(page: Any, browser: Any, app: Server, device: Device) -> None:
    number(page, "Number of images", 3)
    with device.held(), opened(browser, app) as other:
        expect(generate(page)).to_have_text("Starting …")
        expect(generate(other)).to_have_text("You are number 3 in the queue; now running: images of other requests.")
        for tab in (page, other):
            tab.locator("#interrupt").click()
            expect(tab.locator("#status")).to_have_text(re.compile("Interrupted after 0 images"))
            expect(tab.locator("#generate")).to_be_visible()
    until(device.is_idle)
    expect(generate(page)).to_have_text(FINISHED)


def test_two_pages_share_the_passes(page: Any, browser: Any, app: Server, device: Device) -> None:
    before = device.engine.statistics
    with opened(browser, app) as other:
        with device.held():
            statuses = [generate(tab) for tab in (page, other)]
            expect(statuses[1]).to_have_text(re.compile("You are number 1"))
        for status in statuses:
            expect(status).to_have_text(FINISHED)
    now = device.engine.statistics
    assert now.rows - before.rows == 4 * (now.passes - before.passes)  # two images with guidance in each pass


def test_a_comparison(page: Any, app: Server, device: Device) -> None:
    open_tab(page, "compare")
    select(page, "#compare-adapter", "dog")
    page.locator("#compare-prompt textarea").fill("a sks dog")
    page.locator("#compare-x-values textarea, #compare-x-values input").first.fill("1, 2")
    page.locator("#compare-y-values textarea, #compare-y-values input").first.fill("0, 1")
    expand(page, "Settings for all cells")
    number(page, "Steps", 3)
    press(page.locator("#compare-go"), page.locator("#compare-status"))
    expect(page.locator("#compare-status")).to_have_text(re.compile(r"4 cells in [\d.]+ s\."))
    expect(page.locator("#compare-grid img")).to_be_visible()
    expect(page.locator("#compare-right input")).to_have_value("seed = 2, weight = 0")
    with page.expect_download() as report:
        page.locator("#compare-json").click()
    cells = json.loads(Path(report.value.path()).read_text())["cells"]
    assert [(own["settings"]["seed"], own["settings"]["adapters"][0]["weight"]) for own in cells] == [
        (1, 0), (2, 0), (1, 1), (2, 1)
    ]  # fmt: skip
    with device.held():
        press(page.locator("#compare-go"), page.locator("#compare-status"))
        until(lambda: device.engine.statistics.waiting == 4)  # they share its passes
        page.locator("#compare-stop").click()
        expect(page.locator("#compare-status")).to_have_text(re.compile("Interrupted with 0 of 4 cells finished"))
    until(device.is_idle)


def test_cells_wait_for_a_busy_server(tmp_path: Path) -> None:
    busy = [ServerError("too many requests", 429, 0), ServerError("too many requests", 429, 0)]
    asked: list[str] = []

    class Busy:
        def stream(self, **body: Any) -> Any:
            asked.append(body["prompt"])
            if busy:
                raise busy.pop()
            raise ServerError("it is broken", 500)

    cells = {tmp_path / "a.png": Cell(Sampling(2, 2.0), "a dog", "dog", 0.5)}
    run: Any = SimpleNamespace(report=lambda **_: None, check_stop=lambda: None)
    with pytest.raises(ServerError, match="it is broken"):
        Cells(Busy(), run, cells).make()  # type: ignore[arg-type]
    assert asked == ["a dog <lora:dog:0.5>"] * 3


def test_a_closed_page_cancels_its_images(browser: Any, app: Server, device: Device) -> None:
    with device.held():
        with opened(browser, app) as tab:
            expect(generate(tab)).to_have_text("Starting …")
        made = len(list((app.library / "pictures").glob("*.png")))
        until(lambda: all(work.ticket.ended is not None for work in device.engine._queue))
    until(device.is_idle)
    assert len(list((app.library / "pictures").glob("*.png"))) == made


def test_a_server_that_is_gone_and_comes_back(page: Any, app: Server, device: Device) -> None:
    with device.held():
        status = generate(page)
        expect(status).to_have_text("Starting …")
        threading.Thread(target=device.stop).start()
        expect(status).to_have_text(re.compile("ended the connection: it was stopped"))
    until(lambda: device._running is None)
    expect(generate(page)).to_have_text(re.compile(f"No server answers at http://127.0.0.1:{device.config.port}: "))
    page.reload()
    device.start()
    page.locator("#prompt textarea").fill("a red car")
    expect(generate(page)).to_have_text(FINISHED)
