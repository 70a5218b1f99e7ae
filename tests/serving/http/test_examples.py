"""The clients in docs/serving.md: each block is run as it stands, against a server at another port."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(console|py|js)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = {"console": ["bash", "-euo", "pipefail", "-c"], "py": [sys.executable, "-c"], "js": ["node", "-e"]}


@pytest.fixture(scope="module")
def folder(tiny_base: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out/``: the adapters that the document has trained."""
    folder = tmp_path_factory.mktemp("examples")
    for name, of in (("mug", "dog"), ("tiger", "cat")):
        shutil.copytree(library / "shown" / of, folder / "out" / name)
    return folder


@pytest.fixture(scope="module")
def address(tiny_base: Path, folder: Path) -> Iterator[str]:
    config = ServeConfig(
        BaseSource(str(tiny_base), "cpu"), [str(folder / "out")], port=0, uploads=str(folder / "uploads")
    )
    with started(config) as url:
        yield url.removeprefix("http://").rstrip("/")


def test_there_is_one_of_each_kind() -> None:
    assert [kind for kind, _ in BLOCKS] == ["console", "console", "py", "py", "js", "py"]


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=lambda value: value[:30].split("\n")[0])
def test_it_runs(kind: str, text: str, address: str, folder: Path) -> None:
    needed = {"console": ["bash", "curl", "jq"], "js": ["node"]}.get(kind, [])
    missing = [name for name in needed if not shutil.which(name)]
    if missing or ("openai" in text and not find_spec("openai")):
        pytest.skip(f"{missing or 'openai'} is not installed")
    text = text.replace("localhost:8000", address)
    if kind == "js":
        text = f"(async () => {{{text}}})().catch((error) => {{ console.error(error); process.exit(1); }})"
    (folder / "mug.png").unlink(missing_ok=True)
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*PROGRAMS[kind], text], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if "mug.png" in text:
        with Image.open(folder / "mug.png") as image:
            assert "a sks mug" in image.text["parameters"]  # type: ignore[attr-defined]
    if "curl -N" in text:
        assert "event: done" in ended.stdout and '"uploaded":true' in ended.stdout
    elif "stream" in text:
        assert re.search(r"step \d+ of", ended.stdout)
