"""The wheel and the sdist: what is in them, and whether the demo runs from the wheel alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest
from PIL import Image

import nora_diffusion
from nora_diffusion.demo import SUBJECT

ROOT = Path(__file__).parents[1]
NAME = f"nora_diffusion-{nora_diffusion.__version__}"
WHEEL = f"{NAME}-py3-none-any.whl"
IN_SDIST = ("nora_diffusion", "tests", "examples", "docs", "benchmarks", "results")
FILES_IN_SDIST = {".pre-commit-config.yaml", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"}
OF_THE_BUILD = {"PKG-INFO", ".gitignore"}


def build(source: Path, out: Path, *only: str) -> None:
    """What ``make build`` does."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out), *only], cwd=source, check=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this tree."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    assert sorted(f.name for f in out.iterdir()) == [WHEEL, f"{NAME}.tar.gz"]
    return out


def files(folder: Path) -> set[str]:
    """Paths of all files in a folder of the source tree, relative to its root."""
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name != ".DS_Store")
    return {p.relative_to(ROOT).as_posix() for p in found}


def wheel_contents(path: Path) -> dict[str, str]:
    """Name and SHA-256 of each file in a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}


def test_the_wheel_holds_the_package_and_one_subject(dist: Path) -> None:
    found = {name for name in wheel_contents(dist / WHEEL) if not name.startswith(f"{NAME}.dist-info/")}
    subject = {f"nora_diffusion/{name}" for name in files(ROOT / "examples/subjects" / SUBJECT)}
    assert f"nora_diffusion/examples/subjects/{SUBJECT}/subject.json" in subject
    assert found == files(ROOT / "nora_diffusion") | subject
    assert "nora_diffusion/py.typed" in found and any(name.endswith(".safetensors") for name in found)


def test_the_metadata_says_version_license_and_addresses(dist: Path) -> None:
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        metadata = message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        commands = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
        assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == nora_diffusion.__version__ and metadata["License-Expression"] == "Apache-2.0"
    addresses = dict(value.split(", ") for value in metadata.get_all("Project-URL"))
    assert set(addresses) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(address.startswith(addresses["Homepage"]) for address in addresses.values())
    assert "nora-diffusion = nora_diffusion.__main__:start" in commands


def test_the_sdist_is_the_source_and_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        found = {member.name.removeprefix(f"{NAME}/") for member in sdist.getmembers() if member.isfile()}
        sdist.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    beside = {path.name for pattern in ("*.md", "*.py") for path in ROOT.glob(pattern)}
    wanted = FILES_IN_SDIST.union(beside, *(files(ROOT / folder) for folder in IN_SDIST))
    assert found - OF_THE_BUILD == wanted
    build(tmp_path / NAME, tmp_path / "dist", "-t", "wheel")
    assert wheel_contents(tmp_path / "dist" / WHEEL) == wheel_contents(dist / WHEEL)


@pytest.fixture
def installed(dist: Path, tmp_path: Path) -> Callable[..., str]:
    """``installed(program, *words)`` runs a program of an environment that has the wheel, from an empty folder.

    Its dependencies are those of the environment in use, which come after its own packages. The ``.pth`` files of that
    environment do not count here, so an editable install there is not seen.
    """
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_"))}
    clean |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    programs = environment / ("Scripts" if os.name == "nt" else "bin")

    def call(program: str, *words: str) -> str:
        done = subprocess.run([programs / program, *words], cwd=empty, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{program} {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, env=clean)
    call("python", "-m", "pip", "install", "--no-deps", str(dist / WHEEL))
    own = Path(call("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    used = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "dependencies.pth").write_text("\n".join(used), encoding="utf-8")
    return call


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(installed: Callable[..., str], tmp_path: Path) -> None:
    where = "import nora_diffusion, nora_diffusion.demo as d; print(nora_diffusion.__file__, d.EXAMPLES, sep='\\n')"
    assert all(Path(line).is_relative_to(tmp_path / "environment") for line in installed("python", "-c", where).split())
    assert installed("nora-diffusion", "--version") == f"nora-diffusion {nora_diffusion.__version__}\n"
    printed = installed("nora-diffusion", "demo", "--max_train_steps", "2")
    assert f"--subject takes {SUBJECT} (the package ships only this one" in printed
    out = tmp_path / "empty/outputs/demo"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["subject"], report["steps"]) == (SUBJECT, 2)
    with Image.open(out / "grid.png") as grid:
        assert grid.width >= 6 * 128 and grid.height >= 3 * 128
    assert (out / "nora_adapter.safetensors").is_file() and (out / "subject_lora.safetensors").is_file()
