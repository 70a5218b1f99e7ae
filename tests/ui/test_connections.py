"""Slow and endless requests: a connection without a request is closed, and so is a body that stops."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from nora_diffusion.ui.security import bodies
from nora_diffusion.ui.security.bodies import BadBodyError, check_call
from nora_diffusion.ui.security.gate import Gatekeeper
from nora_diffusion.web import connections

PAUSE = 0.3
HEAD = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the body and then streams slowly, as an event stream does."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(5):
        await asyncio.sleep(PAUSE)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
    await send({"type": "http.response.body"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", PAUSE)
    monkeypatch.setattr(bodies, "PAUSE_SECONDS", PAUSE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(Gatekeeper(answer, {"localhost"}, {0}), lifespan="off", **connections.HTTP)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def received(port: int, *pieces: bytes) -> bytes:
    """Send the pieces with short breaks; what the server answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(PAUSE / 10)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize(
    "pieces", [(), (b"GET",), (HEAD,), (HEAD, b"X: a\r\n", b"Y: b\r\n")], ids=["none", "word", *"ab"]
)
def test_a_connection_without_a_request_is_closed(port: int, pieces: tuple[bytes, ...]) -> None:
    assert received(port, *pieces) == b""


def test_a_body_that_stops_is_refused(port: int) -> None:
    assert b" 400 " in received(port, HEAD, b"Content-Length: 100\r\nConnection: close\r\n\r\n", b"{")


def test_a_long_answer_is_not_cut(port: int) -> None:
    found = received(port, HEAD, b"Content-Length: 15\r\nConnection: close\r\n\r\n", b'{"fn_index": 0}')
    assert b" 200 " in found and found.count(b"\r\nx\r\n") == 5


def test_an_endless_head_is_refused(port: int) -> None:
    assert b" 400 " in received(port, HEAD + b"X: " + bytes(70_000).replace(b"\0", b"a"))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"text"', b"\0", b"{", b'{"data": [' + b"9" * 5000 + b"]}", b"[" * 100_000, b"\xff\xfe",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"session_hash": "' + b"a" * 200 + b'"}',
        b'{"fn_index": 0, "data": [{"path": "http://169.254.169.254/latest/meta-data"}]}',
        b'{"fn_index": 0, "data": [[{"x": {"path": "FILE:///etc/passwd"}}]]}',
        b'{"fn_index": 0, "data": {"path": "https://evil.example/large"}}',
        b'{"data": []}', b'{"fn_index": 7}', b'{"fn_index": -1}', b'{"fn_index": "0"}', b'{"fn_index": null}',
        b'{"fn_index": true}', b'{"fn_index": 0.0}', b'{"fn_index": [0]}', b'{"fn_index": 0, "fn_index": 9}',
    ],
    ids=range(23),
)  # fmt: skip
def test_odd_calls_are_refused(body: bytes) -> None:
    with pytest.raises(BadBodyError):
        check_call(body, {0, 1})


def test_an_ordinary_call_is_accepted() -> None:
    data = b'["see http://example.com", {"path": "/tmp/a.png"}, null, 1.5]'
    check_call(b'{"fn_index": 1, "session_hash": "abc", "data": ' + data + b"}", {0, 1})
