"""Clients that send slowly, or not at all, and too many of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started

PAUSE = 0.3
HEAD = b"POST /v1/pictures HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a car", "steps": 2, "width": 16, "height": 16}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def port(tiny_base: Path, library: Path, folder: Path) -> Iterator[int]:
    config = ServeConfig(
        BaseSource(str(tiny_base), "cpu"), [str(library / "shown")], port=0, uploads=str(folder), client_timeout=PAUSE,
    )  # fmt: skip
    with started(config) as url:
        yield int(url.rstrip("/").rpartition(":")[2])


def received(port: int, *pieces: bytes) -> bytes:
    """Send the pieces with short breaks; what the server answers until it closes the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection, suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(PAUSE / 10)
        while piece := connection.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize(
    "pieces", [(), (b"GET",), (HEAD,), (HEAD, b"X: a\r\n", b"Y: b\r\n")], ids=["none", "word", *"ab"]
)
def test_a_head_that_stops(port: int, pieces: tuple[bytes, ...]) -> None:
    assert received(port, *pieces) == b""


def test_an_endless_head(port: int) -> None:
    assert b" 400 " in received(port, HEAD + b"X: " + b"a" * 70_000)


@pytest.mark.parametrize("start", [b"", b"{", b'{"prompt": '])
def test_a_body_that_stops(port: int, start: bytes) -> None:
    found = received(port, HEAD + b"Content-Length: 100\r\n\r\n", start)
    assert b" 408 " in found and b"came too slowly" in found


def test_a_body_in_endless_pieces(port: int) -> None:
    """Each comes in time, but all of them together never would."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        found = b""
        connection.settimeout(PAUSE / 3)
        while not found:
            try:
                found = connection.recv(65536)
            except TimeoutError:
                connection.sendall(b" ")
    assert b" 408 " in found


def test_an_upload_that_stops(port: int, folder: Path) -> None:
    head = b"PUT /v1/subjects/hat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    assert b" 408 " in received(port, head, b"x" * 100)
    assert list(folder.iterdir()) == []


def test_a_body_for_a_route_that_reads_none(port: int) -> None:
    found = received(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n", b"x")
    assert b" 200 " in found


def test_a_client_that_is_quick_is_answered_for_longer_than_that(port: int) -> None:
    body = BODY.replace(b'"steps": 2', b'"steps": 100')
    found = received(port, HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b" 200 " in found and b'"pictures"' in found


def test_too_many_connections(tiny_base: Path, library: Path) -> None:
    config = ServeConfig(BaseSource(str(tiny_base), "cpu"), [str(library / "shown")], port=0, connections=4)
    with started(config) as url, ExitStack() as stack:
        port = int(url.rstrip("/").rpartition(":")[2])
        assert httpx.get(f"{url}health").status_code == 200
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        answer = httpx.get(f"{url}health")
        assert answer.status_code == 503
        stack.close()
        while httpx.get(f"{url}health").status_code != 200:
            time.sleep(0.01)
