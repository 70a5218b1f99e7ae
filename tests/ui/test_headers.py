"""Security headers on every kind of response, and a page that works under them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from .conftest import LANDMARKS, Server, open_tab, until, visit, visitor

Ask = Callable[[httpx.Client, Server], httpx.Response]


def streamed(http: httpx.Client, url: str) -> httpx.Response:
    with http.stream("GET", url) as response:
        return response


def uploaded(http: httpx.Client, name: str, content: bytes) -> httpx.Response:
    (path,) = http.post("/gradio_api/upload", files={"files": (name, content)}).json()
    return http.get(f"/gradio_api/file={path}")


def body(name: str, server: Server, *data: Any) -> dict[str, Any]:
    index = server.find(name)
    return {"data": data, "fn_index": index, "session_hash": "headers", "event_data": {"name": "dog"}}


RESPONSES: dict[str, tuple[int, Ask]] = {
    "page": (200, lambda http, _: http.get("/")),
    "page without body": (200, lambda http, _: http.head("/")),
    "settings of the page": (200, lambda http, _: http.get("/config")),
    "style": (200, lambda http, _: http.get("/theme.css")),
    "script": (200, lambda http, _: http.get("/static/js/iframeResizer.contentWindow.min.js")),
    "upload": (200, lambda http, _: http.post("/gradio_api/upload", files={"files": ("a.txt", b"x")})),
    "uploaded text": (200, lambda http, _: uploaded(http, "a.txt", b"x")),
    "uploaded page": (200, lambda http, _: uploaded(http, "a.html", b"<script>alert(1)</script>")),
    "uploaded drawing": (200, lambda http, _: uploaded(http, "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "call": (200, lambda http, server: http.post("/gradio_api/queue/join", json=body("pick", server))),
    "unqueued call": (200, lambda http, server: http.post("/gradio_api/run/predict", json=body("interrupt", server))),
    "heartbeat": (200, lambda http, _: streamed(http, "/gradio_api/heartbeat/headers")),
    "events": (200, lambda http, _: streamed(http, "/gradio_api/queue/data?session_hash=headers")),
    "websocket": (404, lambda http, _: http.get("/ws", headers={
        "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        "sec-websocket-version": "13"})),
    "preflight of another site": (403, lambda http, _: http.options("/", headers={"origin": "http://evil.example"})),
    "unknown host": (400, lambda http, _: http.get("/", headers={"host": "evil.example"})),
    "unknown route": (404, lambda http, _: http.get("/nothing")),
    "unknown file": (403, lambda http, _: http.get("/gradio_api/file=/etc/passwd")),
    "unknown asset": (404, lambda http, _: http.get("/assets/nothing.js")),
    "wrong method": (405, lambda http, _: http.delete("/config")),
    "no JSON": (400, lambda http, _: http.post("/gradio_api/queue/join", content=b"{")),
    "wrong fields": (422, lambda http, _: http.post("/gradio_api/queue/join", json={"fn_index": 1})),
    "wrong number of values": (500, lambda http, server: http.post(
        "/gradio_api/run/predict", json={**body("interrupt", server), "fn_index": server.find("show")})),
    "unknown function": (400, lambda http, _: http.post("/gradio_api/queue/join", json={"fn_index": -1, "data": []})),
    "too large": (413, lambda http, _: http.post("/gradio_api/queue/join", content=bytes(2**20 + 1))),
    "not a form": (400, lambda http, _: http.post("/gradio_api/upload", content=b"x")),
}  # fmt: skip


@pytest.mark.parametrize(("status", "ask"), RESPONSES.values(), ids=RESPONSES)
def test_every_kind_of_response_has_the_headers(server: Server, status: int, ask: Ask) -> None:
    with server.client() as http:
        response = ask(http, server)
    assert response.status_code == status, response.text
    headers = response.headers
    for name in ("content-security-policy", "x-frame-options", "x-content-type-options", "referrer-policy",
                 "permissions-policy", "cross-origin-resource-policy"):  # fmt: skip
        assert len(headers.get_list(name)) == 1, name
    policy = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin" and "camera=()" in headers["permissions-policy"]
    assert "server" not in headers


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.xml", "a.js", "a.xhtml", "a"])
def test_nothing_in_an_uploaded_file_may_run(server: Server, name: str) -> None:
    with server.client() as http:
        headers = uploaded(http, name, b"<script>alert(1)</script>").headers
    policy = headers["content-security-policy"]
    assert "sandbox" in policy and "script-src" not in policy and "allow-scripts" not in policy
    assert headers["content-disposition"].startswith("attachment")


def test_the_policy_names_no_other_server(server: Server) -> None:
    with server.client() as http:
        policy = http.get("/").headers["content-security-policy"]
    assert "*" not in policy and "http" not in policy and "//" not in policy


class Attacker(http.server.BaseHTTPRequestHandler):
    """Another website, which shows the app in a frame."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(f'<title>evil</title><iframe src="{self.target}"></iframe>'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_website_cannot_show_the_app_in_a_frame(server: Server, browser: Any, host: str) -> None:
    """Not even one on the same machine: another port is another site's page."""
    Attacker.target = f"http://{host}:{urlsplit(server.url).port}/"
    evil = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Attacker)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    try:
        with visitor(browser) as page:
            refusals: list[str] = []
            page.on("requestfailed", lambda request: refusals.append(request.url))
            page.on("response", lambda answer: answer.status == 403 and refusals.append(answer.url))
            page.goto(f"http://127.0.0.1:{evil.server_port}/")
            until(lambda: Attacker.target in refusals, page=page)
            assert page.frame_locator("iframe").locator("#generate").count() == 0
    finally:
        evil.shutdown()
        evil.server_close()


def test_the_page_works_without_a_console_error(server: Server, browser: Any) -> None:
    problems: list[str] = []

    def watch(tab: Any) -> None:
        tab.on("console", lambda message: message.type == "error" and problems.append(message.text))
        tab.on("response", lambda answer: answer.status >= 400 and problems.append(f"{answer.status} {answer.url}"))

    with visitor(browser) as page:
        watch(page)
        visit(page, server.url)
        for name in LANDMARKS:
            open_tab(page, name)
        open_tab(page, "library")
        page.locator(".card[data-name=dog]").click()
        page.get_by_role("button", name="Export", exact=True).click()
        with page.expect_download() as download:
            page.locator("a[download^=dog]").first.click()
        assert download.value.suggested_filename.startswith("dog")
        page.locator("#import input[type=file]").set_input_files(str(server.library / "dog/nora_adapter.safetensors"))
        page.get_by_text("already in the library").wait_for()
        again = page.context.new_page()  # with the stored settings; a reload would abort what the page still waits for
        watch(again)
        visit(again, server.url)
        assert not problems, problems
