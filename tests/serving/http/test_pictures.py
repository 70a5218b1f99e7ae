"""The server's own API: pictures, streams, clients that go away, subjects, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asynchronous import leave, run, until
from PIL import Image

from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.latent_preview import LatentPreview
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.serving.http import following
from nora_diffusion.serving.http.previews import Previews
from nora_diffusion.serving.http.routes import own
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.tickets import Cancelled, Event, Ticket

Serve = Callable[..., Any]
SMALL = {"prompt": "a red car", "steps": 2, "width": 16, "height": 16}


def test_pictures_with_their_settings(serve: Serve, tmp_path: Path) -> None:
    body = {**SMALL, "prompt": "a sks dog <lora:dog:0.8>", "subjects": {"cat": 0.5}, "seed": 7, "count": 2}
    answer = serve().post("/v1/pictures", json={**body, "sampler": "euler"})
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["pictures"]
    assert (first["settings"]["seed"], second["settings"]["seed"]) == (7, 8)
    file = tmp_path / "a.png"
    file.write_bytes(base64.b64decode(first["b64"]))
    settings = read_settings(file)
    assert (settings.prompt, settings.seed, settings.base) == ("a sks dog", 7, "base")
    assert {own["name"]: own["weight"] for own in settings.adapters} == {"dog": 0.8, "cat": 0.5}


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_other_formats_have_the_settings_in_exif(serve: Serve, form: str) -> None:
    (picture,) = serve().post("/v1/pictures", json={**SMALL, "format": form}).json()["pictures"]
    with Image.open(io.BytesIO(base64.b64decode(picture["b64"]))) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert image.format == form.upper()
    assert comment.startswith(b"UNICODE\0") and "a red car\nSteps: 2" in comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("how", ["body", "header"])
def test_a_stream(serve: Serve, how: str) -> None:
    client = serve()
    headers, more = ({}, {"stream": True}) if how == "body" else ({"Accept": "text/event-stream"}, {})
    answer = client.post("/v1/pictures", json={**SMALL, **more}, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    kinds = [event[0].removeprefix("event: ") for event in events]
    assert kinds[-2:] == ["picture", "done"] and set(kinds) <= {"queued", "step", "picture", "done"}
    assert json.loads(events[-2][1].removeprefix("data: "))["settings"]["prompt"] == "a red car"


def events_of(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def test_previews_in_a_stream(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(at_once=1)
    keep_all_events(monkeypatch)
    body = {**SMALL, "steps": 6, "width": 32, "stream": True, "sampler": "ddim"}
    (*_, (_, made), _) = events_of(client.post("/v1/pictures", json={**body, "seed": 1}))
    events = events_of(client.post("/v1/pictures", json={**body, "seed": 1, "previews": 2}))
    shown = {values["step"]: values.get("preview") for kind, values in events if kind == "step"}
    assert [step for step, preview in shown.items() if preview] == [2, 4]  # the last step has the picture
    with Image.open(io.BytesIO(base64.b64decode(shown[2] or ""))) as image:
        assert image.format == "JPEG" and image.width == 2 * image.height
    assert next(values for kind, values in events if kind == "picture")["b64"] == made["b64"]


def keep_all_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets keep each step, as if their readers were quick."""

    def tell(self: Ticket, event: Any) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        if self._listener:
            self._listener()

    monkeypatch.setattr(Ticket, "tell", tell)


def test_a_base_without_previews_still_streams(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, asked = serve(), list[str]()
    monkeypatch.setattr(LatentPreview, "fit", lambda vae: asked.append("fit") or {}["scaling_factor"])
    for _ in range(2):
        answer = client.post("/v1/pictures", json={**SMALL, "steps": 3, "stream": True, "previews": 1})
        assert "event: picture" in answer.text and '"preview"' not in answer.text
    assert asked == ["fit"]


def test_a_slow_reader_gets_previews_too() -> None:
    shown = []
    previews = Previews(SimpleNamespace(preview=LatentPreview(torch.zeros(5, 3))), 3, Sampling(20, 4.0))  # type: ignore[arg-type]
    for step in (1, 2, 4, 5, 8, 10, 20):
        if previews.of(Event("step", 0, step, 20, torch.zeros(1, 4, 2, 2))):
            shown.append(step)
    assert shown == [4, 8]


def test_the_place_in_the_queue(serve: Serve) -> None:
    """It is told again when it changes."""
    client = serve(at_once=1)
    engine = client.state.engine
    first = engine.submit(Request("a red car", Sampling(500, 4.0, width=16, height=16)))
    next(event for event in first.events() if event.kind == "step")
    engine.submit(Request("a red car", Sampling(2, 4.0, width=16, height=16)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/pictures", json={**SMALL, "count": 2, "stream": True})
        until(lambda: engine.statistics.waiting == 3)
        first.cancel()
        events = events_of(waiting.result())
    told = [(values["index"], values["place"]) for kind, values in events if kind == "queued"]
    assert [place for index, place in told if index == 0] == [2, 1]
    assert [place for index, place in told if index == 1] == [3, 2, 1]


def test_a_stream_is_never_silent_for_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.01)
    state, ticket = serve().state, Ticket(Request("a red car", Sampling(2, 4.0)))

    async def beginning() -> list[str]:
        lines = own.stream(state, ticket, own.PicturesBody(prompt="a red car"))
        first = [await anext(lines), await anext(lines)]
        ticket.tell(Event("step", 0, 1, 2))
        first.append(await anext(lines))
        await lines.aclose()  # type: ignore[attr-defined]
        return first

    *silent, step = run(beginning())
    assert silent == ["event: alive\ndata: {}\n\n"] * 2 and step.startswith("event: step")


def test_an_error_in_a_stream(serve: Serve) -> None:
    answer = serve().post("/v1/pictures", json={**SMALL, "steps": 100, "timeout": 0.001, "stream": True})
    assert "event: error" in answer.text and '"status": 504' in answer.text


def test_a_late_request(serve: Serve) -> None:
    answer = serve().post("/v1/pictures", json={**SMALL, "steps": 150, "timeout": 0.01})
    assert answer.status_code == 504 and "not finished" in answer.json()["detail"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels(serve: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    client, tickets = serve(), list[Ticket]()
    submit = client.state.engine.submit

    def noted(request: Request) -> Ticket:
        tickets.append(submit(request))
        return tickets[-1]

    monkeypatch.setattr(client.state.engine, "submit", noted)
    leave(client.app, "/v1/pictures", {**SMALL, "steps": 150, "count": 16, "stream": stream})
    (ticket,) = tickets
    assert isinstance(ticket.ended, Cancelled)


def test_a_full_queue(serve: Serve) -> None:
    client = serve(waiting=2)
    answer = client.post("/v1/pictures", json={**SMALL, "count": 3})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0 and "queue is full" in answer.text


def test_cancelled_pictures_leave_the_queue(serve: Serve) -> None:
    engine = serve(at_once=1, waiting=2).state.engine

    def ask(steps: int, count: int = 1) -> Ticket:
        return engine.submit(Request("a red car", Sampling(steps, 4.0, width=16, height=16), count=count))

    first = ask(500)
    next(event for event in first.events() if event.kind == "step")
    ask(500, 2).cancel()
    until(lambda: engine.statistics.waiting == 0)  # while the first is still at work
    assert engine.statistics.at_work == 1
    first.cancel()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": 1}, "prompt: input should be a valid string"),
        ({}, "prompt: field required"),
        ({**SMALL, "steps": "2"}, "steps: input should be a valid integer"),
        ({**SMALL, "steps": 10**40}, "steps=1"),
        ({**SMALL, "seed": -2}, "seed=-2 is out of range"),
        ({**SMALL, "seed": 10**400}, "seed"),
        ({**SMALL, "seed": 2**64 - 1}, "seed"),
        ({**SMALL, "width": 2048}, "width=2048 is not possible"),
        ({**SMALL, "width": 17}, "width=17 is not possible"),
        ({**SMALL, "count": 17}, "count: input should be less than or equal to 16"),
        ({**SMALL, "subjects": {"dog": "x"}}, "subjects.dog"),
        ({**SMALL, "subjects": ["dog"]}, "subjects: input should be an object"),
        ({**SMALL, "subjects": {"dog": 1e300}}, "out of range"),
        ({**SMALL, "prompt": "x <lora:dig>"}, "names no known adapter: there is dog"),
        ({**SMALL, "prompt": "<lora:dog>"}, "no prompt besides the tags"),
        ({**SMALL, "prompt": "a \ud83d"}, "prompt"),
        ({**SMALL, "prompt": "a\0b"}, "is not text"),
        ({**SMALL, "sampler": "best"}, "the sampler 'best' is unknown"),
        ({**SMALL, "stepz": 1}, "stepz: there is no such field: check its spelling"),
        ({**SMALL, "format": "gif"}, "format"),
        ({**SMALL, "priority": 99}, "priority"),
        ({**SMALL, "timeout": -1}, "timeout"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_wrong_values_get_a_sentence(serve: Serve, body: dict[str, Any], sentence: str) -> None:
    answer = serve().post("/v1/pictures", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and sentence in answer.json()["detail"], answer.text
    assert answer.json()["error"]["message"] == answer.json()["detail"] and "\n" not in answer.json()["detail"]


ROUTES = ("/v1/pictures", "/v1/images/generations", "/sdapi/v1/txt2img")


@pytest.mark.parametrize("path", ROUTES)
def test_damaged_bodies_are_refused(serve: Serve, path: str) -> None:
    client = serve(uploads=False)
    wrong: list[tuple[bytes, str, int]] = [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "x", "steps": NaN}', "application/json", 400),
        (b'{"prompt": "x", "guidance": Infinity, "cfg_scale": Infinity}', "application/json", 400),
        (b'{"prompt": "x", "guidance": 1e999, "cfg_scale": 1e999}', "application/json", 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json", 400),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "application/json", 400),
        (b'["prompt"]', "application/json", 400),
        (b'{"prompt": "x", "prompt": "y"}', "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b" " * 10_000_000, "application/json", 413),
    ]
    for body, kind, status in wrong:
        answer = client.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code == status and answer.json()["detail"], (body[:50], answer.text)


def test_a_bug_is_no_more_than_a_sentence(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    monkeypatch.setattr(client.state.engine, "submit", lambda request: {}["secret"])
    answer = client.post("/v1/pictures", json=SMALL)
    assert answer.status_code == 500 and "secret" not in answer.text and "log" in answer.json()["detail"]


def test_a_stopped_engine(serve: Serve) -> None:
    client = serve()
    assert client.get("/ready").status_code == 200
    client.state.engine.close()
    for answer in (client.get("/ready"), client.post("/v1/pictures", json=SMALL)):
        assert answer.status_code == 503 and answer.headers["retry-after"]
    assert client.get("/health").json() == {"status": "ok"}


def test_the_document_of_the_api(serve: Serve) -> None:
    document = serve().get("/openapi.json").json()
    assert document["openapi"].startswith("3.") and document["info"]["title"]
    assert set(document["paths"]) == {
        "/v1/pictures", "/v1/models", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/loras",
        "/sdapi/v1/samplers", "/sdapi/v1/options", "/sdapi/v1/sd-models", "/v1/subjects", "/v1/subjects/{name}",
        "/v1/server", "/health", "/ready", "/metrics",
    }  # fmt: skip
    names = [node.rpartition("/")[2] for node in _references(document)]
    assert names and set(names) <= set(document["components"]["schemas"])


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []
