"""The client on a running server, and each way in which a server can refuse or fail."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.io.images import png
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.client import Client, Failed, Made, Queued, ServerError, Step, read_key
from nora_diffusion.serving.client import client as module
from nora_diffusion.serving.client.address import check_address
from nora_diffusion.serving.client.events import Lines
from nora_diffusion.serving.http.access.keys import new_key
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started

Serve = Callable[..., str]
SMALL = {"steps": 2, "width": 16, "height": 16, "sampler": "ddim"}
HTML = (200, {"Content-Type": "text/html"}, b"<!doctype html><title>Welcome</title>")
EVENTS = {"Content-Type": "text/event-stream"}


def test_a_server_is_described(serve: Serve) -> None:
    with Client(serve(max_steps=50, max_side=256)) as client:
        about, (dog,) = client.about(), client.subjects()
    assert (about.base, about.embedded, about.steps, about.max_steps, about.max_side) == ("base", False, 30, 50, 256)
    assert (dog.name, dog.trigger, dog.class_word, dog.method, dog.ranks) == ("dog", "sks", "dog", "lora", "r = 2")
    assert len(dog.sha256) == 64 and dog.parameters > 0 and dog.bytes > 0


def test_pictures_arrive_with_their_events(serve: Serve) -> None:
    with Client(serve()) as client:
        events = list(client.stream(prompt="a sks dog <lora:dog:0.5>", seed=7, count=2, **SMALL))
    assert [type(event) for event in events[:2]] == [Queued, Queued]
    steps = {(event.index, event.step, event.steps) for event in events if isinstance(event, Step)}
    assert {(0, 2, 2), (1, 2, 2)} <= steps
    made = sorted((event for event in events if isinstance(event, Made)), key=lambda own: own.index)
    assert [event.settings.seed for event in made] == [7, 8]
    assert {event.image.size for event in made} == {(16, 16)} and made[0].settings.adapters[0]["name"] == "dog"


def test_all_pictures_of_a_request_in_their_order(serve: Serve) -> None:
    with Client(serve()) as client:
        assert [own.settings.seed for own in client.pictures(prompt="a car", seed=1, count=3, **SMALL)] == [1, 2, 3]


def test_leaving_the_loop_cancels_the_request(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from nora_diffusion.serving.tickets import Ticket

    cancelled = threading.Event()
    monkeypatch.setattr(Ticket, "cancel", lambda ticket: cancelled.set())
    with Client(serve()) as client, client.stream(prompt="a car", **{**SMALL, "steps": 150}) as stream:
        next(iter(stream))
    assert cancelled.wait(60)


def test_silence_is_told(odd: Any) -> None:
    odd.answer = (200, {**EVENTS, "Content-Length": "1000"}, event("queued", {"index": 0}))
    odd.ended.clear()
    with Client(odd.url) as client, client.stream(prompt="a car") as stream:
        events = stream.events(0.01)
        while next(events) is None:
            pass
        assert next(events) is None


def test_a_server_that_falls_silent(odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odd.answer = (200, {**EVENTS, "Content-Length": "1000"}, event("queued", {"index": 0}))
    odd.ended.clear()
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)
    with Client(odd.url) as client, pytest.raises(ServerError, match="stopped answering"):
        client.pictures(prompt="a car")


def test_a_picture_fails_alone(serve: Serve) -> None:
    with Client(serve()) as client:
        (*_, last) = client.stream(prompt="a car", timeout=0.001, **SMALL)
        assert isinstance(last, Failed) and last.status == 504 and "was not finished in its" in last.message
        with pytest.raises(ServerError, match="not finished") as caught:
            client.pictures(prompt="a car", timeout=0.001, **SMALL)
    assert caught.value.status == 504


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": ""}, "the server refuses: there is no prompt"),
        ({"prompt": "<lora:nobody> dog"}, "the server refuses: .*nobody"),
        ({"prompt": "a car", "steps": 9999}, "the server refuses: steps=9999 is out of range"),
        ({"prompt": "a" * 2**20}, "the request is too large for the server at .*: the body is too large"),
    ],
)
def test_refusals_of_a_server(serve: Serve, values: dict[str, Any], sentence: str) -> None:
    with Client(serve()) as client, pytest.raises(ServerError, match=sentence):
        client.pictures(**{**SMALL, **values})


def test_a_full_queue(serve: Serve) -> None:
    refused = pytest.raises(ServerError, match=r"the queue is full.*try again in 5 s")
    with Client(serve(waiting=1)) as client, refused as caught:
        client.pictures(prompt="a car", count=2, **SMALL)
    assert (caught.value.status, caught.value.wait) == (429, 5)


def test_keys(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = new_key(tmp_path / "keys", "app")
    url = serve(keys=str(tmp_path / "keys"))
    with Client(url) as client, pytest.raises(ServerError, match="wants a key: give it in a file by --server_key FILE"):
        client.about()
    with Client(url, "nora-wrong") as client:
        for ask in (client.about, client.subjects, lambda: client.pictures(prompt="a car", **SMALL)):
            with pytest.raises(ServerError, match="does not know the key") as caught:
                ask()
            assert caught.value.status == 401 and "nora-wrong" not in str(caught.value)
    with Client(url, key) as client:
        assert client.pictures(prompt="a car", seed=1, **SMALL)
        assert key not in repr(client)
    assert key not in caplog.text and "nora-wrong" not in caplog.text


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORA_SERVER_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("NORA_SERVER_KEY", " nora-one\n")
    assert read_key(None) == "nora-one"
    (tmp_path / "key").write_text("nora-two\n")
    assert read_key(tmp_path / "key") == "nora-two"
    for text in ("", "two words", "two\nlines", "schlüssel"):
        (tmp_path / "key").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="has no key"):
            read_key(tmp_path / "key")
    monkeypatch.setenv("NORA_SERVER_KEY", "two words")
    with pytest.raises(UserError, match="NORA_SERVER_KEY has no key"):
        read_key(None)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://localhost", "http://", "http://localhost:0", "http://localhost:99999", "http://[::1", "",
     "http://a b", "http://a\nb", "http://x?key=1", "http://x#1"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match=r"is not the address of a server|leave out what follows"):
        Client(url)


def test_an_address_holds_no_password() -> None:
    with pytest.raises(UserError, match="no user and password") as caught:
        Client("http://me:secret@localhost:8000")
    assert "secret" not in str(caught.value)
    assert check_address("https://pictures.example/nora/") == "https://pictures.example/nora"


def test_nobody_answers(odd: Any) -> None:
    odd.close()
    with Client(odd.url) as client:
        for ask in (client.about, client.subjects, lambda: client.pictures(prompt="a car")):
            with pytest.raises(ServerError, match=f"no server answers at {odd.url}"):
                ask()
    with Client("http://host.invalid:8000") as client, pytest.raises(ServerError, match="no server answers"):
        client.about()


def test_a_server_that_stops_at_work(tiny_base: Path) -> None:
    config = ServeConfig(BaseSource(str(tiny_base), "cpu"), port=0, drain=0)
    with started(config) as url:
        client = Client(url)
        events = iter(client.stream(prompt="a car", **{**SMALL, "steps": 150}))
        next(events)
    with pytest.raises(ServerError, match=r"the engine was stopped|ended the connection"):
        for arrived in events:
            if isinstance(arrived, Failed):
                raise ServerError(arrived.message)
    client.close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (HTML, "it is not a nora-diffusion server"),
        ((200, {}, b""), "it is not a nora-diffusion server"),
        ((200, {}, b"[1]"), "it is not a nora-diffusion server"),
        ((200, {}, b'{"version": "1", "steps": "many"}'), "it is not a nora-diffusion server"),
        ((404, {}, b"<html>"), "has no such route: it is not a nora-diffusion server"),
        ((403, {}, b'{"error": {"message": "unknown host name"}}'), "the server refuses: unknown host name"),
        ((302, {"Location": "http://elsewhere/"}, b""), "sends requests on to http://elsewhere/"),
        ((308, {}, b""), "sends requests on to another address"),
        ((429, {"Retry-After": "7"}, b""), "too many requests.*try again in 7 s"),
        ((429, {"Retry-After": "Mon, 30 Nov 2026 23:59:59 GMT"}, b""), "too many requests.*try again later"),
        ((503, {}, b'{"error": {"message": "it is being stopped"}}'), "not available .it is being stopped."),
        ((502, {}, b"<html>"), r"not available \(status 502\)"),
        ((504, {}, b""), r"not available \(status 504\)"),
        ((500, {}, b"oops"), "answers with status 500 and no reason"),
        ((400, {}, b'{"error": {"message": "bad\\u001b[31m \\u202e word"}}'), "the server refuses: bad"),
    ],
)
def test_odd_answers(odd: Any, answer: Any, sentence: str) -> None:
    odd.answer = answer
    with Client(odd.url, "nora-key") as client:
        asks = (
            [client.about] if answer[0] == 200 else [client.about, client.subjects, lambda: client.pictures(prompt="x")]
        )
        for ask in asks:
            with pytest.raises(ServerError, match=sentence) as caught:
                ask()
            assert str(caught.value).isprintable() and "nora-key" not in str(caught.value)
    assert {seen["Authorization"] for seen in odd.seen} == {"Bearer nora-key"}


def test_a_key_is_not_sent_on(odd: Any) -> None:
    odd.answer = (307, {"Location": f"{odd.url}/other"}, b"")
    with Client(odd.url, "nora-key") as client, pytest.raises(ServerError, match="if you trust it"):
        client.about()
    assert len(odd.seen) == 1


def test_a_connection_that_is_not_safe(odd: Any) -> None:
    with Client(odd.url.replace("http:", "https:")) as client, pytest.raises(ServerError, match="cannot be made safe"):
        client.about()


def test_answers_are_bounded(odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER", 1000)
    odd.answer = (200, {}, b" " * 2000)
    with Client(odd.url) as client, pytest.raises(ServerError, match="too large"):
        client.about()
    monkeypatch.setattr("nora_diffusion.serving.client.events.MAX_EVENT", 1000)
    odd.answer = (200, EVENTS, b"event: step\ndata: " + b" " * 2000)
    with Client(odd.url) as client, pytest.raises(ServerError, match="an event is too large"):
        client.pictures(prompt="x")


def event(kind: str, values: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n".encode()


GOOD = {
    "index": 0, "b64": base64.b64encode(png(Image.new("RGB", (8, 8)))).decode(),
    "settings": {"prompt": "x", "seed": 1, "steps": 1, "guidance": 1, "width": 8, "height": 8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (b"", "ended the connection"),
        (event("queued", {"index": 0}), "ended the connection"),
        (event("queued", {"index": 1}), "index is '1'"),
        (event("queued", []), "an event is not an object"),
        (b"event: step\ndata: {\n\n", "cannot be read"),
        (event("step", {"index": 0, "step": True, "steps": 1}), "step is 'True'"),
        (event("step", {"index": 0, "step": 1, "steps": 1, "preview": "AAAA"}), "a picture is damaged"),
        (event("picture", {**GOOD, "b64": "%"}), "a picture is damaged"),
        (event("picture", {**GOOD, "b64": None}), "a picture is no text"),
        (event("picture", {**GOOD, "settings": {"prompt": "x"}}), "cannot be read"),
        (event("picture", {**GOOD, "settings": {**GOOD["settings"], "seed": "1"}}), "seed is '1'"),  # type: ignore[dict-item]
    ],
)
def test_odd_events(odd: Any, sent: bytes, sentence: str) -> None:
    odd.answer = (200, EVENTS, sent)
    with Client(odd.url) as client, pytest.raises(ServerError, match=sentence):
        client.pictures(prompt="x")


def test_events_of_newer_servers(odd: Any) -> None:
    newer = event("weather", {}) + b": alive\n\n" + event("queued", {"index": 0, "place": 3, "more": 1})
    odd.answer = (200, EVENTS, newer + event("picture", {**GOOD, "more": 1}) + event("done", {}))
    with Client(odd.url) as client:
        queued, made = client.stream(prompt="x")
    assert queued == Queued(0, 3) and isinstance(made, Made) and made.image.size == (8, 8)


def test_a_page_instead_of_a_stream(odd: Any) -> None:
    odd.answer = HTML
    with Client(odd.url) as client, pytest.raises(ServerError, match="it is no stream of events"):
        client.pictures(prompt="x")


def test_events_in_any_pieces() -> None:
    sent = event("queued", {"index": 0}) + event("done", {})
    for size in range(1, len(sent)):
        lines = Lines()
        pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
        assert [kind for piece in pieces for kind, _ in lines.feed(piece)] == ["queued", "done"]


def test_no_torch() -> None:
    probe = "import sys, nora_diffusion.serving.client; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "False"
