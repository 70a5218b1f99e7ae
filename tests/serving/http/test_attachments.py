"""Adapters that come with a request, and subjects that are named by their hashes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asynchronous import leave, until

from nora_diffusion.generation.library import NamedAdapter
from nora_diffusion.serving.http import attachments, bodies
from nora_diffusion.serving.http.catalog import Subject

Serve = Callable[..., Any]
SMALL = {"prompt": "a sks hat", "steps": 2, "width": 16, "height": 16, "seed": 1}
FILE = "nora_adapter.safetensors"


@pytest.fixture(scope="module")
def hat(library: Path) -> str:
    return base64.b64encode((library / "other/hat" / FILE).read_bytes()).decode()


def picture_of(client: Any, **body: Any) -> Any:
    answer = client.post("/v1/pictures", json={**SMALL, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["pictures"][0]


def assert_nothing_is_left(client: Any, folder: Path) -> None:
    until(lambda: not client.state.engine.resident_paths)
    assert list((folder / "uploads").iterdir()) == []


def test_an_adapter_of_one_request(serve: Serve, hat: str, library: Path, tmp_path: Path) -> None:
    client = serve()
    client.put("/v1/subjects/hat", content=base64.b64decode(hat))
    expected = {weight: picture_of(client, subjects={"hat": weight})["b64"] for weight in (0.5, 1)}
    client.delete("/v1/subjects/hat")
    assert expected[1] != picture_of(client)["b64"] != expected[0.5] != expected[1]
    for body, weight in (
        ({"prompt": "a sks hat"}, 1.0),
        ({"prompt": "a sks hat", "subjects": {"hat": 0.5}}, 0.5),
        ({"prompt": "a sks hat <lora:hat:0.5>"}, 0.5),
    ):
        made = picture_of(client, **body, adapters={"hat": hat})
        assert made["b64"] == expected[weight]
        (described,) = made["settings"]["adapters"]
        assert (described["name"], described["weight"], described["path"]) == ("hat", weight, "")
        assert "hat" not in client.get("/v1/subjects").text + client.get("/v1/models").text
        assert_nothing_is_left(client, tmp_path)
    assert client.post("/v1/pictures", json={**SMALL, "subjects": {"hat": 1}}).status_code == 400


def test_it_wins_over_a_subject_of_its_name(serve: Serve, hat: str) -> None:
    client = serve()
    own = picture_of(client, adapters={"hat": hat})
    same = picture_of(client, adapters={"dog": hat})
    assert same["settings"]["adapters"][0]["sha256"] == own["settings"]["adapters"][0]["sha256"]
    assert picture_of(client, subjects={"dog": 1})["settings"]["adapters"][0]["trigger"] == "sks"
    both = picture_of(client, adapters={"hat": hat}, subjects={"dog": 0.5})
    assert {own["name"] for own in both["settings"]["adapters"]} == {"dog", "hat"}


@pytest.mark.parametrize("more", [{"timeout": 0.001}, {"timeout": 0.001, "stream": True}, {"subjects": {"dig": 1}}])
def test_nothing_is_left_of_a_request_that_fails(serve: Serve, hat: str, tmp_path: Path, more: Any) -> None:
    client = serve()
    client.post("/v1/pictures", json={**SMALL, "steps": 100, "adapters": {"hat": hat}, **more})
    assert_nothing_is_left(client, tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_left_when_the_client_goes_away(serve: Serve, hat: str, tmp_path: Path, stream: bool) -> None:
    client = serve()
    values = {**SMALL, "steps": 150, "count": 4, "stream": stream, "adapters": {"hat": hat}}
    leave(client.app, "/v1/pictures", values)
    assert_nothing_is_left(client, tmp_path)
    until(lambda: client.state.engine.statistics.at_work == 0)


def test_wrong_adapters_are_refused(serve: Serve, hat: str, library: Path, tmp_path: Path) -> None:
    client = serve()
    alien = base64.b64encode((library / "alien/alien" / FILE).read_bytes()).decode()
    for adapters, sentence in (
        ({"hat": ""}, "the adapter hat"),
        ({"hat": "%%%"}, "the adapter hat is not base64"),
        ({"hat": hat[:400]}, "the adapter hat"),
        ({"one": hat, "two": alien}, "the adapter two"),
        ({"../hat": hat}, "the name of an adapter"),
        ({"a\0b": hat}, "not valid in a tag"),
        ({"hat": 1}, "adapters.hat"),
        ({f"hat{i}": "" for i in range(9)}, "name at most 8"),
    ):
        answer = client.post("/v1/pictures", json={**SMALL, "adapters": adapters})
        assert answer.status_code == 400 and sentence in answer.json()["detail"], answer.text
        assert ".upload" not in answer.text and str(tmp_path) not in answer.text
    assert_nothing_is_left(client, tmp_path)


def test_its_size_is_limited(serve: Serve, hat: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client, body = serve(), {**SMALL, "adapters": {"hat": hat}}
    monkeypatch.setattr(attachments, "MAX_ATTACHED", 100)
    assert client.post("/v1/pictures", json=body).status_code == 413
    monkeypatch.setattr(attachments, "MAX_ATTACHED", 2**30)
    monkeypatch.setattr(bodies, "MAX_BODY", 100)
    assert client.post("/v1/pictures", json=body).status_code == 200
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        assert client.post(path, json=body).status_code == 413
    monkeypatch.setattr(bodies, "MAX_HELD", 1000)
    for _ in range(3):
        answer = client.post("/v1/pictures", json=body)
        assert answer.status_code == 503 and answer.headers["retry-after"]
    assert client.post("/v1/pictures", json=SMALL).status_code == 200  # what was refused is not counted
    assert_nothing_is_left(client, tmp_path)


def test_without_uploads_there_are_none(serve: Serve, hat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(uploads=False)
    assert client.post("/v1/pictures", json={**SMALL, "adapters": {"hat": hat}}).status_code == 403
    monkeypatch.setattr(bodies, "MAX_BODY", 100)
    assert client.post("/v1/pictures", json={**SMALL, "adapters": {"hat": hat}}).status_code == 413


def test_subjects_by_their_hashes(serve: Serve) -> None:
    client = serve()
    hashes = {own["name"]: own["sha256"] for own in client.get("/v1/subjects").json()["subjects"]}
    dog = hashes["dog"]
    for body in (
        {"subjects": {dog: 0.5}},
        {"subjects": {dog[:8].upper(): 0.5}},
        {"prompt": f"a sks hat <lora:{dog[:12]}:0.5>"},
    ):
        (described,) = picture_of(client, **body)["settings"]["adapters"]
        assert (described["name"], described["sha256"], described["weight"]) == ("dog", dog, 0.5)
    models = {"model": dog[:10], "prompt": "a sks dog", "size": "16x16", "steps": 2}
    assert client.post("/v1/images/generations", json=models).status_code == 200
    for body, sentence in (
        ({"subjects": {dog[:7]: 1}}, "names no known adapter"),
        ({"subjects": {"0" * 64: 1}}, "names no known adapter"),
        ({"subjects": {dog: 1, "dog": 1}}, "give it once"),
        ({"subjects": {dog: 1}, "prompt": "a <lora:dog>"}, "give it once"),
        ({"prompt": f"a <lora:dog> <lora:{dog}>"}, "two tags"),
    ):
        answer = client.post("/v1/pictures", json={**SMALL, **body})
        assert answer.status_code == 400 and sentence in answer.json()["detail"], answer.text


def test_a_hash_that_two_files_begin_with_is_refused(serve: Serve) -> None:
    client = serve()
    catalog = client.state.catalog
    for name, digest in (("one", "12345678a" + "0" * 55), ("two", "12345678b" + "0" * 55)):
        info = type(catalog.subjects["dog"].info)(components={}, sha256=digest)
        catalog.subjects[name] = Subject(NamedAdapter(name, name), info)
    answer = client.post("/v1/pictures", json={**SMALL, "subjects": {"12345678": 1}})
    assert answer.status_code == 400 and "may mean one or two" in answer.json()["detail"]
    catalog.subjects["12345678"] = catalog.subjects["dog"]
    assert catalog.named("12345678") == "12345678" and catalog.named("12345678b") == "two"
