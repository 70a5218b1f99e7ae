"""Names are reserved by the file system: threads and processes that want the same name never share it."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from nora_diffusion import UserError
from nora_diffusion.io.files import TakenError, numbered, reserved_name, write_atomic, write_first_free

WRITERS, EACH = 6, 20


def stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def write_images(folder: Path, writer: int) -> list[Path]:
    return [
        write_first_free((folder / f"{n:04d}.png" for n in range(10_000)), f"{writer} {number}".encode())
        for number in range(EACH)
    ]


def reserve_names(folder: Path, writer: int) -> list[Path]:
    """Adapters that are a file beside their reserved folder, and others in it, by turns."""
    made = []
    for number in range(EACH):
        with reserved_name(folder, "dog", stem) as path:
            file = path / "adapter" if number % 2 else path.with_suffix(".safetensors")
            made.append(write_atomic(file, f"{writer} {number}", new=True))
    return made


@pytest.mark.parametrize("write", [write_images, reserve_names])
@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_names_are_never_shared(write: object, pool: str, tmp_path: Path) -> None:
    assert callable(write)
    executor = ThreadPoolExecutor(WRITERS) if pool == "threads" else ProcessPoolExecutor(WRITERS, get_context("spawn"))
    with executor:
        made = list(executor.map(write, [tmp_path] * WRITERS, range(WRITERS)))
    files = [file for own in made for file in own]
    names = {file.parent.name if file.name == "adapter" else stem(file) for file in files}
    assert len(set(files)) == len(names) == WRITERS * EACH
    # Each file holds what its writer wrote, and nothing else is left.
    assert [[file.read_text() for file in own] for own in made] == [
        [f"{writer} {number}" for number in range(EACH)] for writer in range(WRITERS)
    ]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    assert all(any(path.iterdir()) for path in tmp_path.iterdir() if path.is_dir())


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_disks_without_hard_links(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", link)
    files = write_images(tmp_path, 1)
    assert len(set(files)) == EACH and sorted(tmp_path.iterdir()) == sorted(files)
    with pytest.raises(TakenError, match="already exists"):
        write_atomic(files[0], b"other", new=True)
    assert files[0].read_text() == "1 0"


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "link to nowhere", "other case"])
def test_whatever_has_the_name_is_left_alone(kind: str, tmp_path: Path) -> None:
    name = "Dog" if kind == "other case" else "dog"
    path = tmp_path / (name if "folder" in kind else f"{name}.safetensors")
    if "folder" in kind:
        path.mkdir()
    elif kind == "link to nowhere":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("old")
    if kind == "folder":
        (path / "adapter").write_text("old")
    with reserved_name(tmp_path, "dog", stem) as reserved:
        assert reserved == tmp_path / "dog-2"
        (reserved / "adapter").write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([path, reserved])
    if kind == "file":
        with pytest.raises(TakenError):
            write_atomic(path, b"new", new=True)
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_a_failure_gives_the_name_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reserved_name(tmp_path, "dog", stem):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="choose a shorter name"), reserved_name(tmp_path, "x" * 300, stem):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), reserved_name(tmp_path / "file", "dog", stem):
        pass


def test_numbered_names() -> None:
    names = numbered(Path("a/dog"))
    assert [next(names) for _ in range(3)] == [Path("a/dog"), Path("a/dog-2"), Path("a/dog-3")]


def test_text_that_is_not_unicode_is_written_as_escapes(tmp_path: Path) -> None:
    """A report that lists a file name which is not UTF-8 must not be lost."""
    name = os.fsdecode(b"caf\xe9.png")
    assert write_atomic(tmp_path / "report.html", f"<p>é {name}").read_bytes() == "<p>é caf\\udce9.png".encode()
