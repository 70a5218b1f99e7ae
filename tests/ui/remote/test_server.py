"""What the app remembers about its server."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nora_diffusion.serving.client import About, Client, ServerError, Subject
from nora_diffusion.ui.remote import server as module
from nora_diffusion.ui.remote.library import RemoteLibrary
from nora_diffusion.ui.remote.server import Server

ABOUT = About("1", "base", False, 30, 7.5, 150, 1024, 16)


class Fake:
    """A client whose server has ``named`` subjects; ``failing``: it is away; ``hangs``: until it is set."""

    url, with_key, is_encrypted, on_loopback = "http://server", False, False, True

    def __init__(self) -> None:
        self.named, self.failing, self.hangs, self.asked = ["dog"], False, threading.Event(), 0
        self.hangs.set()

    def about(self) -> About:
        self.asked += 1
        self.hangs.wait()
        if self.failing:
            raise ServerError("no server answers")
        return ABOUT

    def subjects(self) -> list[Subject]:
        return [Subject(name) for name in self.named]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``clock["now"]``: the time, in seconds."""
    now = {"now": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["now"])
    return now


def names(server: Server) -> list[str]:
    return [subject.name for subject in server.subjects]


def test_answers_are_used_again_until_they_are_old(clock: Any) -> None:
    fake = Fake()
    server: Any = Server(fake)  # type: ignore[arg-type]
    fake.named = ["cat"]
    assert names(server) == ["dog"] and fake.asked == 1
    clock["now"] = 6
    assert names(server) == ["cat"]


def test_a_server_that_is_away_has_the_subjects_that_it_had(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    server = Server(fake)  # type: ignore[arg-type]
    fake.failing, fake.named = True, ["cat"]
    clock["now"] = 6
    assert names(server) == names(server) == ["dog"] and fake.asked == 2  # it is left in peace for a while
    assert "no server answers; the page shows what it said last" in caplog.text
    fake.failing = False
    clock["now"] = 12
    assert names(server) == ["cat"]


def test_a_server_that_hangs_keeps_one_page_waiting(clock: Any) -> None:
    fake = Fake()
    server = Server(fake)  # type: ignore[arg-type]
    fake.hangs.clear()
    clock["now"] = 6
    waiting = threading.Thread(target=names, args=(server,))
    waiting.start()
    while fake.asked < 2:
        waiting.join(0.01)
    assert names(server) == ["dog"]
    fake.hangs.set()
    waiting.join()


def test_the_app_does_not_start_without_its_server() -> None:
    fake = Fake()
    fake.failing = True
    with pytest.raises(ServerError):
        Server(fake)  # type: ignore[arg-type]


def test_a_key_without_encryption_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Client, "about", lambda self: ABOUT)
    monkeypatch.setattr(Client, "subjects", lambda self: [])
    for url, key in (("http://localhost:1", "k"), ("https://pictures.example", "k"), ("http://pictures.example", None)):
        Server(Client(url, key))
    assert not caplog.text
    Server(Client("http://pictures.example", "nora-secret"))
    assert "without encryption" in caplog.text and "secret" not in caplog.text


def test_hostile_names_are_no_subjects_and_no_paths(tmp_path: Any) -> None:
    fake = Fake()
    fake.named = ["../../etc", "<b>", "", "a:b", "dog"]
    library = RemoteLibrary(tmp_path, Server(fake))  # type: ignore[arg-type]
    assert [entry.name for entry in library.entries()] == ["../../etc", "dog"]
    entry = library.entry("../../etc")
    assert entry.thumbnail() is None and entry.scores() == {} and entry.pack is None
    with pytest.raises(ValueError, match="the adapters are on the server"):
        entry.choose_thumbnail(tmp_path)
    with pytest.raises(ValueError, match="the server has no subject 'cat'"):
        library.entry("cat")
    for change in (lambda: library.delete("dog"), lambda: library.add(tmp_path, "x"), lambda: library.reserved("x")):
        with pytest.raises(ValueError, match="the adapters are on the server"):
            change()
