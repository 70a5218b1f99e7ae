"""Clients that do not read what they asked for."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import uvicorn

from nora_diffusion.web import connections
from nora_diffusion.web.connections import HTTP, patient
from nora_diffusion.web.listening import bind, run_in_thread, wait_until_started

HEAD = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n"
LARGE = b"x" * 2**26


@pytest.mark.parametrize("more", [b"\r\n", b"Connection: close\r\n\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize("path", [b"whole", b"pieces"])
def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch, path: bytes, more: bytes) -> None:
    """Its connection is ended, and the app told so."""
    monkeypatch.setattr(connections, "MIN_RATE", 2**40)
    ended = threading.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == b"whole":
            await send({"type": "http.response.body", "body": LARGE, "more_body": True})
        else:
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    server = uvicorn.Server(uvicorn.Config(answer, lifespan="off", **{**HTTP, "http": patient(0.2)}))
    with bind("127.0.0.1", 0) as listener:
        thread = run_in_thread(server, listener)
        wait_until_started(server, thread)
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(HEAD % path + more)
            ended.wait()
            assert not server.server_state.connections
        server.should_exit = True
        thread.join()


def test_a_client_that_reads_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": LARGE})

    server = uvicorn.Server(uvicorn.Config(answer, lifespan="off", **{**HTTP, "http": patient(0.2)}))
    with bind("127.0.0.1", 0) as listener:
        thread = run_in_thread(server, listener)
        wait_until_started(server, thread)
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(HEAD % b"" + b"Connection: close\r\n\r\n")
            found = 0
            while piece := client.recv(2**20):
                found += piece.count(b"x")
        server.should_exit = True
        thread.join()
    assert found == len(LARGE)
