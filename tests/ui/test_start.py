"""Starting the app: what keeps it from that is one sentence; what a page gets says nothing of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nora_diffusion.ui.config import DEFAULT_LIBRARY

from .conftest import LONG, ROOT, Server


def refused(*flags: str) -> str:
    """What the app says when it does not start."""
    words = [sys.executable, "app.py", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_busy_port(server: Server, base: Path, tmp_path: Path) -> None:
    port = urlsplit(server.url).port
    said = refused("--port", str(port), "--base", str(base), "--library", str(tmp_path / "library"))
    assert f"port {port} on 127.0.0.1 is busy" in said and "--port" in said


@pytest.mark.parametrize(
    ("damage", "words"),
    [("absent", "does not exist"), ("half", "unet/config.json is missing"), ("pickle", "may run code")],
)
def test_a_base_that_cannot_be_used(damage: str, words: str, base: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "base"
    if damage != "absent":
        shutil.copytree(base, place)
        if damage == "half":
            (place / "unet" / "config.json").unlink()
        else:
            for file in (place / "unet").glob("*.safetensors"):
                file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert words in refused("--base", str(place), "--library", str(tmp_path / "library"), "--port", "0")


def test_a_library_where_there_can_be_none(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused("--base", str(base), "--library", str(tmp_path / "file" / "library"), "--port", "0")
    assert "cannot write" in said


def test_a_page_says_nothing_of_this_machine(server: Server, base: Path) -> None:
    with server.client() as http:
        page = http.get("/").text + http.get("/config").text
    broken = server.call("pick", event={"name": "broken"})
    gone = server.call("generate", "a dog <lora:broken:1>", "", 1, 3, 2, 2.0, 16, 16, {})
    assert base.name in page  # it is called by its name
    for text in (page, str(broken["output"]), str(gone["output"])):
        for private in (server.library, base, ROOT, Path.home()):
            assert f"{private}/" not in text and f'{private}"' not in text, private


def test_make_clean_keeps_the_default_library() -> None:
    words = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".mypy_cache" in words.split() and Path(DEFAULT_LIBRARY).parts[0] not in words.split()
