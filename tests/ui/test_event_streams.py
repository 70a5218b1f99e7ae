"""No result of a queued event gets lost when one event stream of a page ends and the next begins."""

from __future__ import annotations

from typing import Any

import asynchronous
import pytest
from factories import write_photos
from playwright.sync_api import expect

from nora_diffusion.ui.layout import event_streams
from nora_diffusion.ui.layout.event_streams import ENDED, JOIN, STREAM, EventStreams

from .conftest import Server, open_tab, visit, visitor

SLOW_READER = """
const plain = window.fetch, encoder = new TextEncoder(), CLOSE = 'data: {"msg":"close_stream"';
let joins = 0, queued = () => {};
window.fetch = async (...request) => {
  const opened = joins, response = await plain(...request), url = String(request[0].url ?? request[0]);
  if (url.includes('queue/join')) { joins++; queued(); }
  if (!url.includes('queue/data')) return response;
  const late = new TransformStream({async transform(chunk, stream) {
    const text = new TextDecoder().decode(chunk), end = text.indexOf(CLOSE);
    if (end < 0) return stream.enqueue(chunk);
    stream.enqueue(encoder.encode(text.slice(0, end)));
    while (joins === opened) await new Promise((done) => queued = done);
    await new Promise((done) => setTimeout(done, 300));  // the answer is read before
    stream.enqueue(encoder.encode(text.slice(end)));
  }});
  return new Response(response.body.pipeThrough(late), {status: response.status, headers: response.headers});
};
"""
"""A client that reads the end of a stream only after the answer to its next event, as a busy browser does."""


def test_what_is_done_while_a_stream_ends_is_not_lost(browser: Any, server: Server, tmp_path: Any) -> None:
    photos = sorted(write_photos(tmp_path, 2).glob("*.png"))
    with visitor(browser) as page:
        page.add_init_script(SLOW_READER)
        visit(page, server.url)
        open_tab(page, "library")
        for name in ("dog", "hat"):
            page.locator(f"[data-name={name}]").click()
            expect(page.locator("#about")).to_contain_text(name)
        open_tab(page, "train")
        page.set_input_files("#train-photos input[type=file]", photos)
        expect(page.locator("#train-report")).to_contain_text("2 photos will be used")


class Client:
    """One connection of an ASGI client: ``answers`` are the messages it got."""

    def __init__(self, app: Any, path: str, body: bytes = b"", session: str = "") -> None:
        self.answers: list[Any] = []
        scope = {"type": "http", "path": path, "query_string": f"session_hash={session}".encode()}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            self.answers.append(message)

        asynchronous.run(app(scope, receive, send))

    @property
    def ended(self) -> bool:
        """Whether the answer says that the last stream has ended."""
        return (ENDED.encode(), b"1") in self.answers[0]["headers"]


async def gradio(scope: Any, receive: Any, send: Any) -> None:
    """As Gradio: a stream that ends at once, and an answer to an event."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == STREAM and b"open" not in scope["query_string"]:
        await send({"type": "http.response.body", "body": b'data: {"msg":"close_stream"}\n\n', "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_an_answer_says_whether_the_last_stream_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_streams, "MAX_SESSIONS", 2)
    app = EventStreams(gradio)

    def ended(body: bytes) -> bool:
        return Client(app, JOIN, body).ended

    assert not ended(b'{"session_hash": "mine"}')
    Client(app, STREAM, session="mine")
    assert [ended(b'{"session_hash": "%s"}' % name) for name in (b"mine", b"other")] == [True, False]
    assert not ended(b"[1")
    Client(app, STREAM, session="open")
    assert not ended(b'{"session_hash": "open"}')
    for name in ("second", "third"):  # only the last pages are remembered
        Client(app, STREAM, session=name)
    assert [ended(b'{"session_hash": "%s"}' % name) for name in (b"mine", b"third")] == [False, True]


def test_the_routes_are_those_of_gradio(server: Server) -> None:
    with server.client() as http:
        assert http.post(JOIN, json={}).status_code == 400  # it exists: the gate asks for a session
        assert http.get(STREAM).status_code == 422
