"""Uploads: broken ones leave nothing behind, only their bytes are limited, and a killed app's folder is removed."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nora_diffusion import UserError
from nora_diffusion.io.files import is_held
from nora_diffusion.ui import AppConfig
from nora_diffusion.ui.security import uploads
from nora_diffusion.ui.security.scratch import LOCK, PREFIX, private_folder
from nora_diffusion.ui.security.uploads import UPLOAD, Uploads
from nora_diffusion.ui.state import App

from .conftest import Server, start, until

PART = '--cut\r\nContent-Disposition: form-data; name="files"; filename="{}"\r\n\r\n'


def files_in(folder: Path) -> list[Path]:
    """Files below a folder that may change at the same time."""
    return sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names if name != LOCK)


def stored(server: Server) -> list[Path]:
    return files_in(server.scratch / "files" / "uploads")


def send(server: Server, length: int, body: bytes, boundary: str = "cut") -> socket.socket:
    """Begin an upload and leave it open."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    head = (
        f"POST {UPLOAD} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {length}\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


BROKEN: dict[str, bytes] = {
    "in the headers of the part": b"--cut\r\nContent-Dispo",
    "at the start of the file": PART.format("a.png").encode(),
    "in the file": PART.format("a.png").encode() + bytes(300_000),
    "in the second file": (PART.format("a.png") + "a\r\n" + PART.format("b.png")).encode() + bytes(300_000),
    "after a hundred files": "".join(PART.format(f"{n}.png") + "a\r\n" for n in range(100)).encode(),
    "before the last line": (PART.format("a.png") + "a\r\n--cu").encode(),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_leaves_no_file(server: Server, body: bytes) -> None:
    before = stored(server)
    with send(server, len(body) + 10**6, body):
        if b"filename" in body:
            until(lambda: stored(server) != before)
    until(lambda: stored(server) == before)


def test_an_upload_that_fails_leaves_the_others(server: Server) -> None:
    """A slow upload stays open while another one fails: only the files of the failed one are removed."""
    before = stored(server)
    body = PART.format("slow.png").encode() + bytes(1000)
    end = b"\r\n--cut--\r\n"
    with send(server, len(body + end), body) as slow:
        until(lambda: len(stored(server)) == len(before) + 1)
        with send(server, 10**6, PART.format("cut.png").encode() + bytes(1000)):
            until(lambda: len(stored(server)) == len(before) + 2)
        until(lambda: len(stored(server)) == len(before) + 1)
        slow.sendall(end)
        assert slow.recv(10_000).startswith(b"HTTP/1.1 200")
    assert [path.name for path in stored(server) if path not in before] == ["slow.png"]


@pytest.mark.parametrize(
    ("length", "body", "status"),
    [
        (600 * 2**20, b"", 413),
        (1000, PART.format("a.png").encode().replace(b"name=", b"nam=") + bytes(905), 400),
        (3, b"xyz", 400),
        (9000, b"--cut\r\nX: " + b"a" * 8990, 413),
    ],
    ids=["too large", "no name", "not a form", "long header"],
)
def test_a_refused_upload_leaves_no_file(server: Server, length: int, body: bytes, status: int) -> None:
    before = stored(server)
    with send(server, length, body[:length]) as connection:
        assert f" {status} ".encode() in connection.recv(1000)
    assert stored(server) == before


def test_an_upload_has_to_announce_its_length(server: Server) -> None:
    def chunks() -> object:
        yield PART.format("a.png").encode() + bytes(1000)

    before = stored(server)
    with server.client(**{"content-type": "multipart/form-data; boundary=cut"}) as http:
        assert http.post(UPLOAD, content=chunks()).status_code == 411  # type: ignore[arg-type]
    assert stored(server) == before


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/evil.png", "..\\evil.png", "evil.png\0", ".." + "/x" * 200, "a" * 300, ".", ""]
)
def test_the_name_of_an_upload_is_not_a_path(server: Server, name: str) -> None:
    with server.client() as http:
        response = http.post(UPLOAD, files={"files": (name, b"x")})
    folder = server.scratch / "files" / "uploads"
    assert response.status_code in (200, 400, 507), response.text
    if response.status_code == 200:
        assert all(Path(os.path.normpath(path)).is_relative_to(folder) for path in response.json())
    assert not [path for path in server.scratch.parent.rglob("*evil*") if not path.is_relative_to(folder)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 100 kB."""
    monkeypatch.setattr(uploads, "MAX_STORED", 100_000)
    monkeypatch.setattr(uploads, "SPARE", 0)


def put(store: Uploads, size: int, files: int = 1) -> Path:
    with store.room(size) as folder:
        for number in range(files):
            (folder / f"{number}.png").write_bytes(bytes(size // files))
    return folder


@pytest.mark.usefixtures("few")
def test_the_limit_counts_bytes_of_uploads(tmp_path: Path) -> None:
    app = App(AppConfig(library=str(tmp_path / "library")), tmp_path / "files")
    store = Uploads(app.scratch / "uploads")
    image = tmp_path / "made.png"
    image.write_bytes(bytes(150_000))
    for number in range(8):  # the app's own images do not count
        os.utime(image, ns=(number, number))
        app.hand_out(image)
    put(store, 60_000)
    with pytest.raises(UserError, match="too much was uploaded"), store.room(60_000):
        pass
    put(store, 30_000)


@pytest.mark.usefixtures("few")
def test_unfinished_uploads_count_what_they_announced(tmp_path: Path) -> None:
    store = Uploads(tmp_path)
    with store.room(60_000), pytest.raises(UserError, match="too much"), store.room(60_000):
        pass
    put(store, 60_000)  # the first is over, and its folder gone or counted by its files
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("few")
def test_many_small_files_count_as_the_disk_counts_them(tmp_path: Path) -> None:
    store = Uploads(tmp_path)
    put(store, 20, files=20)
    with pytest.raises(UserError, match="too much"), store.room(30_000):
        pass


@pytest.mark.usefixtures("few")
def test_old_uploads_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now)
    store = Uploads(tmp_path)
    first, second = put(store, 45_000), put(store, 45_000)
    now += uploads.IN_USE_SECONDS + 1
    assert put(store, 45_000).exists() and second.exists() and not first.exists()  # only as many as needed
    now += 24 * 3600 + 1
    put(store, 1)
    assert not second.exists()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(uploads.shutil, "disk_usage", lambda _: usage._replace(free=uploads.SPARE))
    with pytest.raises(UserError, match="disk with the app's temporary folder is full"), Uploads(tmp_path).room(1):
        pass


def test_a_killed_apps_folder_is_removed_at_the_next_start(base: Path, tmp_path: Path) -> None:
    killed = start(tmp_path / "first", "--base", str(base))
    with killed.client() as http:
        assert http.post(UPLOAD, files={"files": ("face.jpg", b"private")}).status_code == 200
    killed.process.kill()
    killed.process.wait()
    assert "face.jpg" in [path.name for path in files_in(killed.scratch)]
    temporary = killed.scratch.parent
    foreign = temporary / f"{PREFIX}other"  # no lock file: not made by this version of the app
    foreign.mkdir()
    (temporary / f"{PREFIX}link").symlink_to(tmp_path)
    following = start(tmp_path / "second", "--base", str(base), temporary=temporary)
    try:
        assert not killed.scratch.exists(), is_held(killed.scratch / LOCK)
        assert foreign.exists() and tmp_path.exists()
        assert following.scratch.exists()
    finally:
        assert following.stop() == 0
    assert not following.scratch.exists()


def test_a_running_apps_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_folder() as first:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with private_folder() as second:
            assert first.exists() and second.exists() and first != second
            assert first.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_the_last_downloads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.ui.state.MAX_DOWNLOADS", 2)
    app = App(AppConfig(library=str(tmp_path / "library")), tmp_path / "files")
    made = []
    for _ in range(3):
        with app.download() as folder:
            (folder / "lora.safetensors").write_bytes(b"weights")
        made.append(folder)
    with pytest.raises(UserError), app.download() as folder:
        raise UserError("the export failed")
    assert [made_folder.exists() for made_folder in made] == [False, True, True]
    assert sorted(app.scratch.iterdir()) == sorted(made[1:])


@pytest.mark.parametrize("act", [lambda app, file: app.hand_out(file), lambda app, _: app.private_folder()])
def test_a_full_temporary_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[App, Path], object]
) -> None:
    """The image is made and in the library; only its copy for the page has no room."""
    app = App(AppConfig(library=str(tmp_path / "library")), tmp_path / "files")
    image = tmp_path / "made.png"
    image.write_bytes(b"image")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(app.scratch / "copy"))

    monkeypatch.setattr("shutil.copyfile", full)
    monkeypatch.setattr("os.mkdir", full)
    with pytest.raises(UserError, match=r"disk with the app's temporary folder.*No space left") as caught:
        act(app, image)
    assert "saved" in str(caught.value)
    assert not list(app.scratch.iterdir())
