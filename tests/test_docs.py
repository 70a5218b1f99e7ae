"""Every command and every Python block of README.md and its neighbors and of docs/ is run, each document top to bottom.

A shell line runs through the same entry points as on a command line. A model's hub id stands for a tiny random one of
its layout, in a folder of ``base``; training and denoising are cut to two steps; nothing else is changed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent

import pytest
from architectures import tiny_pipeline
from factories import tiny_dino, tiny_random_pipeline, write_photos
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "openai/clip-vit-large-patch14": "judge", "facebook/dinov2-base": "dino",
}  # fmt: skip
SHORT = ["--max_train_steps", "2", "--num_class_images", "2", "--sample_steps", "1", "--num_validation_images", "1"]
BLOCK = re.compile(r"^ *```(bash|python)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    return [(language, dedent(text)) for language, text in BLOCK.findall(path.read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def train(words: list[str], base: Path) -> int:
    from nora_diffusion.training import main

    small = ["--resolution", "16"] if str(base) in " ".join(words) else []
    return main([*words, *SHORT, *small])


def generate(words: list[str], base: Path) -> int:
    from nora_diffusion.cli import main

    small = ["--width", "16", "--height", "16"] if str(base) in " ".join(words) else []
    return main([*words, *(["--steps", "2", *small] if words[0] in ("generate", "grid", "evaluate") else [])])


def serve_once(flags: list[str]) -> None:
    """Start the app; a server that it generates on is one of this process."""
    import httpx

    from nora_diffusion.cli import build_parser
    from nora_diffusion.cli.servers.app import app_config
    from nora_diffusion.serving.http import server
    from nora_diffusion.serving.http.config import ServeConfig
    from nora_diffusion.ui.server import started

    with ExitStack() as stack:
        if "--server" in flags:
            place = flags.index("--server") + 1
            flags = [*flags[:place], stack.enter_context(server.started(ServeConfig(port=0))), *flags[place + 1 :]]
        config = app_config(build_parser().parse(["app", *flags, "--port", "0"]))
        _, url = stack.enter_context(started(config))
        assert httpx.get(url).status_code == 200


def answer_once(flags: list[str]) -> None:
    import httpx

    from nora_diffusion.cli import build_parser
    from nora_diffusion.cli.servers.serve import serve_config
    from nora_diffusion.serving.http.server import started

    config = serve_config(build_parser().parse(["serve", *flags, "--host", "127.0.0.1", "--port", "0"]))
    with started(config) as url:
        assert httpx.get(f"{url}ready").status_code == 200


def run_command(words: list[str], base: Path) -> None:
    for hub_id, folder in HUB_IDS.items():
        words = [word.replace(hub_id, str(base / folder)) for word in words]
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[2:]]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words == ["pre-commit", "install"]:
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif words == [".", ".venv/bin/activate"]:
        pass
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).exists(), words
    elif words[:2] == ["python", "train_dreambooth_nora.py"] or words[:2] == ["nora-diffusion", "train"]:
        assert train(words[2:], base) == 0, words
    elif words[:2] == ["nora-diffusion", "federate"]:
        assert generate([*words[1:], "--rounds", "1", *SHORT], base) == 0, words
    elif words[:2] in (["python", "app.py"], ["nora-diffusion", "app"]):
        serve_once(words[2:])
    elif words[:2] == ["nora-diffusion", "serve"] and "--new_key" not in words:
        answer_once(words[2:])
    elif words[:2] == ["nora-diffusion", "demo"]:
        assert generate([*words[1:], "--max_train_steps", "2"], base) == 0, words
    elif words[:3] == ["nora-diffusion", "basis", "learn"]:
        few = ["--subjects", "2", "--images", "1", "--steps", "1", "--lora_rank", "16"]
        assert generate([*words[1:], *few], base) == 0, words
    elif words[0] == "nora-diffusion":
        assert generate(words[1:], base) == 0, words
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
    else:
        raise AssertionError(f"no test runs {' '.join(words)!r}: teach tests/test_docs.py how, or leave it out")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model for each of :data:`HUB_IDS`."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_random_pipeline(folder / "sd", tokens=77)  # for the prompts of the documents
    tiny_pipeline("sdxl", folder.parent / "files").save_pretrained(folder / "sdxl")
    tiny_dino(folder / "dino")
    (folder / "judge").symlink_to(ROOT / "nora_diffusion/tiny_sd/weights/judge")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("document", [*filter(blocks, DOCUMENTS)], ids=lambda p: p.name)
def test_documents_run(document: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("dog", "vase", "prints"):
        write_photos(tmp_path / "photos" / name, 4)
    (tmp_path / "photos/vase/masks").mkdir()
    Image.new("L", (24, 20), 255).save(tmp_path / "photos/vase/masks/0.png")
    namespace: dict[str, object] = {}
    runners: dict[str, Callable[[str], None]] = {
        "bash": lambda text: [run_command(words, base) for words in commands(text)] and None,
        "python": lambda text: exec(compile(text, document.name, "exec"), namespace),
    }
    for language, text in blocks(document):
        runners[language](text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"
