"""No result of a queued event gets lost when one event stream of a page ends and the next begins."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion.ui.layout import event_streams
from nora_diffusion.ui.layout.event_streams import JOIN, STREAM, EventStreams

from .conftest import Server, open_tab, visit, visitor

SLOW_STREAMS = """
const plain = window.fetch;
window.fetch = async (...request) => {
  const response = await plain(...request);
  if (!String(request[0].url ?? request[0]).includes('queue/data')) return response;
  const late = new TransformStream({async transform(chunk, stream) {
    await new Promise((done) => setTimeout(done, 700));
    stream.enqueue(chunk);
  }});
  return new Response(response.body.pipeThrough(late), {status: response.status, headers: response.headers});
};
"""
"""A client that reads each part of an event stream late, as a busy browser does."""


def test_a_click_while_a_stream_ends_is_not_lost(browser: Any, server: Server) -> None:
    with visitor(browser) as page:
        page.add_init_script(SLOW_STREAMS)
        visit(page, server.url)
        open_tab(page, "library")
        for name in ("dog", "hat"):
            page.locator(f"[data-name={name}]").click()
            expect(page.locator("#about")).to_contain_text(name, timeout=20_000)


class Client:
    """One connection of an ASGI client: ``answers`` are the messages it got."""

    def __init__(self, app: Any, path: str, body: bytes = b"", session: str = "") -> None:
        self.answers: list[Any] = []
        self.gone = asyncio.Event()
        scope = {"type": "http", "path": path, "query_string": f"session_hash={session}".encode()}
        self.received = False

        async def receive() -> dict[str, Any]:
            if not self.received:
                self.received = True
                return {"type": "http.request", "body": body}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.answers.append(message)

        self.task = asyncio.create_task(app(scope, receive, send))

    @property
    def answered(self) -> bool:
        return bool(self.answers)


async def gradio(scope: Any, receive: Any, send: Any) -> None:
    """As Gradio: a stream that ends at once, and an answer to an event."""
    await receive()
    await send({"type": "http.response.start"})
    if scope["path"] == STREAM:
        await send({"type": "http.response.body", "body": b'data: {"msg":"close_stream"}\n\n', "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def wait() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ends", [True, False], ids=["the client ends the stream", "the client never does"])
def test_new_events_wait_until_the_client_has_read_the_end(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_streams, "PATIENCE", 30.0 if ends else 0.2)

    async def scenario() -> None:
        app = EventStreams(gradio)
        stream = Client(app, STREAM, session="mine")
        await wait()
        assert len(stream.answers) == 2  # the end of the stream has been sent, but not the end of its connection
        mine, other = Client(app, JOIN, b'{"session_hash": "mine"}'), Client(app, JOIN, b'{"session_hash": "other"}')
        broken = Client(app, JOIN, b"[1")
        await wait()
        assert (mine.answered, other.answered, broken.answered) == (False, True, True)
        if ends:
            stream.gone.set()
        await asyncio.wait_for(mine.task, 20)
        assert mine.answered and stream.task.done() and len(stream.answers) == 3
        later = Client(app, JOIN, b'{"session_hash": "mine"}')
        await wait()
        assert later.answered

    with ThreadPoolExecutor() as pool:  # Playwright keeps an event loop running in the main thread
        pool.submit(asyncio.run, scenario()).result()


def test_the_routes_are_those_of_gradio(server: Server) -> None:
    with server.client() as http:
        assert http.post(JOIN, json={}).status_code == 400  # it exists: the gate asks for a session
        assert http.get(STREAM).status_code == 422
