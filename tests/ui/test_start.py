"""Starting the app: every refusal is one sentence; the page reveals no folders of this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nora_diffusion.ui.config import DEFAULT_LIBRARY

from .conftest import LONG, ROOT, Server, start


def stopped(*flags: str) -> str:
    """The error message of a process that ends while it starts the app."""
    command = [sys.executable, "app.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_busy_port(server: Server, base: Path, tmp_path: Path) -> None:
    port = urlsplit(server.url).port
    message = stopped("--port", str(port), "--base", str(base), "--library", str(tmp_path / "library"))
    assert f"port {port} on 127.0.0.1 is busy" in message and "--port" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [("absent", "does not exist"), ("half", "unet/config.json is missing"), ("pickle", "may run code")],
)
def test_an_unusable_base(damage: str, words: str, base: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    if damage != "absent":
        shutil.copytree(base, folder)
        if damage == "half":
            (folder / "unet" / "config.json").unlink()
        else:
            for file in (folder / "unet").glob("*.safetensors"):
                file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert words in refused("--base", str(folder), "--library", str(tmp_path / "library"), "--port", "0")


def test_a_library_that_cannot_be_created(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = stopped("--base", str(base), "--library", str(tmp_path / "file" / "library"), "--port", "0")
    assert "cannot write" in message


def test_the_page_reveals_no_folders(server: Server, base: Path) -> None:
    with server.client() as http:
        page = http.get("/").text + http.get("/config").text
    broken = server.call("pick", event={"name": "broken"})
    gone = server.call(
        "generate", "a dog <lora:broken:1>", "", 1, 3, 2, 2.0, 16, 16, {}, True, "own", 1, 0.5, None, "", 0.7, True
    )
    assert base.name in page  # only the name of its folder
    for text in (page, str(broken["output"]), str(gone["output"])):
        for folder in (server.library, base, ROOT, Path.home()):
            assert f"{folder}/" not in text and f'{folder}"' not in text, folder


def test_an_open_page_does_not_delay_the_end(base: Path, tmp_path: Path) -> None:
    running = start(tmp_path, "--base", str(base))
    with running.client() as http, http.stream("GET", "/gradio_api/heartbeat/page") as events:
        assert "ALIVE" in next(events.iter_lines())
        assert running.stop() == 0
    assert not running.scratch.exists() and "Traceback" not in running.log.read_text()


def test_make_clean_keeps_the_default_library() -> None:
    words = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".mypy_cache" in words.split() and Path(DEFAULT_LIBRARY).parts[0] not in words.split()
