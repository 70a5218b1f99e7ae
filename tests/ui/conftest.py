"""One running app and one browser for all tests of the app."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from factories import tiny_random_pipeline
from playwright.sync_api import Error, expect

from nora_diffusion import UserError
from nora_diffusion.cli import main
from nora_diffusion.ui.jobs.jobs import Jobs

# An element of each tab that is visible once the tab is open and filled.
LANDMARKS = {
    "generate": "#generate", "mix": "#recipe", "library": "#cards :is(.card, .empty)", "train": "#train-start",
    "compare": "#compare-go", "inspect": "#inspect-go",
}  # fmt: skip
ROOT = Path(__file__).parents[2]
WAIT = 180.0
"""Timeout in seconds for everything but trainings; generous, for slow machines."""
LONG = 600.0
"""Timeout in seconds for trainings."""
expect.set_options(timeout=1000 * WAIT)
# A hostile environment: the app must ignore all of these variables.
HOSTILE = {
    "GRADIO_SHARE": "True", "GRADIO_MCP_SERVER": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_RUN_HISTORY": "True", "GRADIO_ROOT_PATH": "/elsewhere", "GRADIO_DEBUG": "1", "GRADIO_VIBE_MODE": "1",
}  # fmt: skip


@dataclass
class Server:
    """A running app."""

    url: str
    library: Path
    scratch: Path
    process: subprocess.Popen[str]
    log: Path
    cookies: dict[str, str] | None = None
    functions: dict[str, int] = field(default_factory=dict)

    def client(self, **headers: str) -> httpx.Client:
        """An HTTP client for the app."""
        return httpx.Client(base_url=self.url, headers=headers, cookies=self.cookies, timeout=WAIT)

    def call(self, name: str, *data: Any, event: dict[str, Any] | None = None, session: str = "test") -> dict[str, Any]:
        """Call a handler over HTTP, without the page. Returns the last message: ``success`` and ``output``."""
        with self.client() as http:
            body = {"data": data, "fn_index": self.find(name), "session_hash": session, "event_data": event}
            joined = http.post("/gradio_api/queue/join", content=json.dumps(body, allow_nan=True).encode(),
                               headers={"content-type": "application/json"})  # fmt: skip
            if joined.status_code != 200:
                return {"success": False, "output": {"error": joined.text}}
            with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
                for line in lines.iter_lines():
                    message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                    if message.get("msg") == "process_completed":
                        return message
        raise AssertionError("the stream ended without a result")

    def press(self, name: str, *data: Any, session: str = "test") -> httpx.Response:
        """Call an unqueued handler over HTTP."""
        with self.client() as http:
            body = {"data": data, "fn_index": self.find(name), "session_hash": session}
            return http.post("/gradio_api/run/predict", json=body)

    def find(self, name: str) -> int:
        """The function index of a handler, by its ``api_name``."""
        if not self.functions:
            with self.client() as http:
                found = http.get("/config").json()["dependencies"]
            self.functions = {f["api_name"]: f["id"] for f in found}
        return self.functions[name]

    def stop(self) -> int:
        """Stop the app with SIGTERM. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WAIT)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def start(folder: Path, *flags: str, temporary: Path | None = None) -> Server:
    """Start the app in its own process on a free port, with a temporary folder of its own unless one is given."""
    temporary = temporary or folder / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    log = folder / "server.log"
    before = set(temporary.glob("nora_app_*"))
    environment = {**os.environ, **HOSTILE, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "app.py", "--port", "0", "--library", str(folder / "library"), *flags]
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"http://\S+?(?=/?[ ;])", line)
    assert match, line + log.read_text()
    (scratch,) = set(temporary.glob("nora_app_*")) - before
    return Server(match[0], folder / "library", scratch, process, log)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(*flags)``: the error message of an app that does not start. It has not even made its private folder."""

    def started() -> None:
        raise AssertionError("the app starts")

    def call(*flags: str) -> str:
        assert main(["app", *flags]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr("nora_diffusion.ui.server.private_folder", started)
    return call


def save_random(pipe: Any, folder: Path, config: Any, **info: Any) -> Path:
    """Save an adapter with random weights. The pipeline is left unchanged."""
    from nora_diffusion import add_adapter, delete_adapter, save_adapter
    from nora_diffusion.loaders import trainable_parameters

    add_adapter(pipe, config, "fresh", ("unet", "text_encoder"))
    for parameter in trainable_parameters(pipe, "fresh").values():
        parameter.data.normal_(std=0.1)
    file = save_adapter(pipe, folder, "fresh", info=info)
    delete_adapter(pipe, "fresh")
    return file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, so that images are fast."""
    return tiny_random_pipeline(tmp_path_factory.mktemp("ui") / "base")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Adapters: two for that base, one for another base, a broken file, and one with a hostile name."""
    from nora_diffusion import lora, nora, open_pipeline

    folder = tmp_path_factory.mktemp("adapters")
    pipe = open_pipeline(base)
    info = {"trigger": "sks", "instance_prompt": "a sks dog", "class_word": "dog"}
    save_random(pipe, folder / "dog", nora(r=4, inner_r=2, basis="svd"), **info)
    save_random(pipe, folder / "hat", lora(r=2), trigger="zwx", instance_prompt="a zwx hat")
    save_random(pipe, folder / "<img src=x onerror=alert(1)>", lora(r=2), trigger="<script>alert(2)</script>")
    other = open_pipeline(tiny_random_pipeline(tmp_path_factory.mktemp("other") / "other", seed=1))
    save_random(other, folder / "stranger", lora(r=2), trigger="abc")
    (folder / "broken").mkdir()
    (folder / "broken" / "nora_adapter.safetensors").write_bytes(b"<!doctype html><html>not found</html>")
    return folder


def jobs_of(server: Server) -> Jobs:
    """The training jobs of the app."""
    folder = server.library / ".jobs"
    return Jobs(folder, server.library, folder / "device.lock")


def end_trainings(server: Server) -> None:
    """Stop and remove all trainings: they survive the app, and would hold the device in the next test."""
    jobs = jobs_of(server)
    for job in jobs.list():
        with suppress(UserError):  # already over
            jobs.stop(job.id)
        until(lambda job=job: not jobs.get(job.id).running)  # type: ignore[misc]
        jobs.remove(job.id)


def until(true: Callable[[], bool], seconds: float = WAIT, page: Any = None) -> None:
    """Wait for a condition outside the page, while the page keeps running."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "timeout"
        if page is None:
            time.sleep(0.05)
        else:
            page.wait_for_timeout(50)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, library: Path, base: Path) -> Iterator[Server]:
    """The app with that library, which most tests share."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(library, folder / "library")
    running = start(folder, "--base", str(base))
    yield running
    end_trainings(running)
    running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium or Playwright's own. Without one the tests are skipped; in CI they fail."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(program).is_file():
            notice = "no Chromium found: the browser tests need it (make browser, or apt-get install chromium)"
            if os.environ.get("CI"):
                pytest.fail(notice)
            pytest.skip(notice)
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def visit(page: Any, url: str = "") -> None:
    """Open or reload the page, and wait until it has restored its stored settings."""
    page.goto(url) if url else page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_selector("#generate")


def open_tab(page: Any, name: str) -> None:
    """Open a tab, on a narrow screen from the "More tabs" menu, and wait for its content.

    The page moves tabs that do not fit into the menu after it is drawn, so a tab may move while it is clicked.
    """
    title = name.capitalize()
    tab = page.get_by_role("tab", name=title, exact=True).locator("visible=true")
    more = page.get_by_label("More tabs").locator("visible=true")
    entry = page.locator(".overflow-dropdown").get_by_text(title, exact=True).locator("visible=true")
    content = page.locator(f"{LANDMARKS[name]}:visible").first

    def opened() -> bool:
        with suppress(Error):
            if not tab.count() and not entry.count():
                more.click(timeout=2000)
                entry.wait_for(timeout=2000)
            (entry if entry.count() else tab).click(timeout=2000)
            content.wait_for(timeout=2000)
        return bool(content.is_visible())

    until(opened)
    drawn(page)


def drawn(page: Any) -> None:
    """Wait until a tab, an accordion or a field that has just become visible can be filled.

    Gradio sets its fields once more in the next animation frame, and so overwrites what was typed in between.
    """
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def expand(page: Any, title: str) -> None:
    """Open an accordion."""
    page.get_by_role("button", name=title).locator("visible=true").first.click()
    drawn(page)


def number(page: Any, label: str, value: float) -> None:
    """Type the value of a slider that may have just become visible."""
    box = page.get_by_label(f"number input for {label}").locator("visible=true").first
    box.wait_for()
    drawn(page)
    box.fill(str(value))
    box.blur()
    slider = page.get_by_label(f"range slider for {label}").locator("visible=true").first
    expect(slider).to_have_value(str(value))


def select(page: Any, field: str, value: str) -> None:
    """Choose a value from a dropdown, and wait until its list is gone: the next list may have the same entries."""
    box = page.locator(f"{field} input")
    box.click()
    page.get_by_role("option", name=value, exact=True).click()
    expect(box).to_have_value(value)
    expect(page.get_by_role("option")).to_have_count(0)


def press(button: Any, line: Any) -> None:
    """Click a button and wait for a new status line, so that the status belongs to this click."""
    line.locator("p").evaluate_all("lines => lines.forEach(line => line.dataset.old = true)")
    button.click()
    expect(line.locator("p:not([data-old])").first).to_be_attached()


@contextmanager
def visitor(browser: Any) -> Iterator[Any]:
    """An empty page in a fresh browser context. Script errors on the page fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(1000 * WAIT)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    try:
        yield tab
    finally:
        context.close()
    assert not errors, errors


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A fresh visit to the app."""
    with visitor(browser) as tab:
        visit(tab, server.url)
        yield tab
