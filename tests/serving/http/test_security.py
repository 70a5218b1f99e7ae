"""Hostile requests to every route: what is refused, with which status, and that nothing else happens.

The rows are those of the app (tests/ui/test_security.py) as far as a server without pages has them.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion.serving.http import gate
from nora_diffusion.serving.http.access.keys import Keys, new_key

Serve = Callable[..., Any]
FILE = "nora_adapter.safetensors"
GETS = (
    "/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/v1/subjects", "/sdapi/v1/loras",
    "/sdapi/v1/samplers", "/sdapi/v1/options", "/sdapi/v1/sd-models", "/v1/server",
)  # fmt: skip
POSTS = ("/v1/pictures", "/v1/images/generations", "/sdapi/v1/txt2img")
OTHERS = (("PUT", "/v1/subjects/x"), ("DELETE", "/v1/subjects/dog"))
ROUTES = [*(("GET", path) for path in GETS), *(("POST", path) for path in POSTS), *OTHERS]
OPEN = {"/health", "/ready"}
SMALL = {"prompt": "a car", "steps": 2, "width": 16, "height": 16, "size": "16x16"}


def small(path: str) -> dict[str, Any]:
    """A body that makes a small picture."""
    sides = ("size",) if "images" in path else ("width", "height")
    return {name: SMALL[name] for name in ("prompt", "steps", *sides)}


def send(client: Any, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    if method == "POST" and not more:
        known = {"/v1/images/generations": {"prompt", "size", "steps"}}.get(
            path, {"prompt", "steps", "width", "height"}
        )
        more = {"json": {name: SMALL[name] for name in known}}
    return client.request(method, path, headers=headers, **more)


def assert_a_sentence(answer: Any) -> None:
    """One line that says what is wrong, without anything of the server's."""
    sentence = answer.json()["detail"]
    assert sentence and sentence.isprintable() and len(sentence) < 1000, sentence
    assert not any(word in sentence for word in ("Traceback", "site-packages", "/tmp", ".upload", " at 0x")), sentence
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/json"


def test_the_table_has_every_route(serve: Serve) -> None:
    paths = serve().get("/openapi.json").json()["paths"]
    known = {(method.upper(), path.replace("{name}", "x")) for path, own in paths.items() for method in own}
    assert known == {(m, p.replace("dog", "x")) for m, p in ROUTES if p != "/openapi.json"}


FOREIGN = (
    {"Host": "evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.evil.example:8000"},
    {"Host": "localhost@evil.example"},
    {"Host": "[::1"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost:81"},
    {"Origin": "null"},
    {"Origin": "file://"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example", "X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"},
)


def test_websites_and_foreign_names_are_refused_everywhere(serve: Serve) -> None:
    client = serve()
    for method, path in ROUTES:
        for headers in FOREIGN:
            answer = send(client, method, path, headers)
            if path in OPEN:
                assert answer.status_code == 200  # they tell nothing
            else:
                assert answer.status_code == 403, (method, path, headers)
                assert_a_sentence(answer)
    assert client.state.engine.statistics.passes == 0 and "dog" in client.state.catalog.subjects


def test_nothing_without_a_key(serve: Serve, tmp_path: Path) -> None:
    token = new_key(tmp_path / "keys", "alice")
    client = serve(keys=Keys.of(tmp_path / "keys"))
    wrong = (
        {}, {"Authorization": ""}, {"Authorization": token}, {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {token[:-1]}"}, {"Authorization": f"Bearer {token}x"},
        {"Authorization": f"Bearer {token.upper()}"}, {"Authorization": "Bearer \u00e9\u00ff".encode("latin-1")},
        {"Authorization": f"Bearer {(tmp_path / 'keys').read_text().split()[1]}"},  # the hash that the file holds
        {"Authorization": "Basic " + base64.b64encode(b"alice:").decode()}, {"Authorization": "Basic ===="},
        {"X-Api-Key": token}, {"Cookie": f"Authorization={token}"},
    )  # fmt: skip
    for method, path in ROUTES:
        for headers in wrong:
            answer = send(client, method, path, headers)
            assert answer.status_code == (200 if path in OPEN else 401), (method, path, headers)
            assert token not in answer.text
    assert client.get(f"/v1/models?key={token}&api_key={token}").status_code == 401
    assert client.state.engine.statistics.passes == 0


NUMBERS = ("-1e400", "1e400", "1e308", "9" * 5000, "-9223372036854775809", "18446744073709551616", "1e-400", "0x10",
           "NaN", "Infinity", "-Infinity", "true", '"2"', "[2]", "{}", "[[2]]")  # fmt: skip
FIELDS = {
    "/v1/pictures": ("seed", "steps", "guidance", "width", "height", "count", "priority", "timeout", "previews"),
    "/v1/images/generations": ("seed", "steps", "guidance", "n"),
    "/sdapi/v1/txt2img": ("seed", "steps", "cfg_scale", "width", "height", "batch_size", "n_iter"),
}


@pytest.mark.parametrize("path", POSTS)
def test_odd_numbers(serve: Serve, path: str) -> None:
    """In each number of each body. ``1e-400`` is 0; A1111's clients send numbers as text."""
    client = serve()
    for field in FIELDS[path]:
        for number in NUMBERS:
            body = f'{{"prompt": "a car", "{field}": {number}}}'
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            lenient = path.startswith("/sdapi") and number in ("true", '"2"', "1e-400")
            if not lenient and (field, number) != ("guidance", "1e-400"):
                assert answer.status_code == 400, (field, number, answer.text)
                assert_a_sentence(answer)


TEXTS = {
    "a\0b": 400, "\ud800": 400, "x" * 4001: 400, "<lora:": 400, "<lora:x:nan>": 400, "<lora:x:1e99>": 400,
    "<lora:../../etc/passwd:1>": 400, "<lora:/etc/passwd:1>": 400, "<lora:dog:1><lora:dog:1>": 400,
    "<lora:file=///etc/passwd>": 400, "<lora:d\u043eg>": 400, "<lora:\uff44og>": 400, "<lora:dog\u200b>": 400,
    "<script>alert(1)</script>": 200, "{{7*7}} ${jndi:ldap://x} %s%n'\"; DROP TABLE": 200, "\u202egac a\u202c": 200,
    "a\u0301\u200d\U0001f469": 200, "\r\nSet-Cookie: a=b": 200,
}  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
def test_odd_prompts(serve: Serve, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, lines = serve(), list[str]()
    monkeypatch.setattr(gate.log, "info", lines.append)
    for text, status in TEXTS.items():
        body = json.dumps({**small(path), "prompt": text})
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (text, answer.text)
        if status == 400:
            assert_a_sentence(answer)
    assert not any(text in line for line in lines for text in TEXTS) and "passwd" not in "".join(lines)


FORMS = (
    (b"", "application/json", 400),
    (b"null", "application/json", 400),
    (b'"prompt"', "application/json", 400),
    (b'{"prompt": "x"', "application/json", 400),
    (b'{"prompt": "x"}{}', "application/json", 400),
    (b"{'prompt': 'x'}", "application/json", 400),
    (b'\xef\xbb\xbf{"prompt": "x"}', "application/json", 400),
    ('{"prompt": "x"}'.encode("utf-16"), "application/json", 400),
    (b'{"prompt": "\xff"}', "application/json", 400),
    (b'{"prompt": "x", "prompt": "y"}', "application/json", 400),
    (b'{"prompt": "x", "\\u0070rompt": "y"}', "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "application/json", 400),
    (b'{"prompt": "x", "a": [' + b"0," * 2000 + b"0]}", "application/json", 400),
    (b'{"prompt": "' + b"x" * 5_000_000 + b'"}', "application/json", 413),
    (b'{"prompt": "x"}', "", 415),
    (b'{"prompt": "x"}', "text/plain", 415),
    (b'{"prompt": "x"}', "application/jsonx", 415),
    (b"prompt=x", "application/x-www-form-urlencoded", 415),
    (b"--b\r\n\r\n--b--", "multipart/form-data; boundary=b", 415),
    (b"<prompt>x</prompt>", "application/xml", 415),
)


@pytest.mark.parametrize("path", POSTS)
def test_odd_bodies(serve: Serve, path: str) -> None:
    client = serve(uploads=False)
    for body, kind, status in FORMS:
        answer = client.post(path, content=body, headers={"Content-Type": kind})
        assert answer.status_code == status, (body[:40], kind, answer.text)
        assert_a_sentence(answer)
    for length in ("-1", "1e3", "0x10", "9" * 30, "\u0664"):
        headers = {"Content-Type": "application/json", "Content-Length": length.encode()}
        assert client.post(path, content=b"{}", headers=headers).status_code == 400  # type: ignore[arg-type]
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post(path, content=b"\x1f\x8b\x08\0\0\0\0\0\0\xff", headers=packed).status_code == 400
    assert client.state.engine.statistics.passes == 0


NAMES = (
    "..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "..", ".", "%2e%2e", "a%00", "a%0d%0aSet-Cookie:x", "a%20b",
    ".hidden", "-flag", "a" * 65, "d%D0%BEg", "%EF%BD%84og", "a%E2%80%8B", "a..b%5C..%5Cc", "C:%5Cx", "a;b", "a|b",
    "%24(id)", "a%2ezip",
)  # fmt: skip


def test_odd_names(serve: Serve, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, lines = serve(), list[str]()
    monkeypatch.setattr(gate.log, "info", lines.append)
    content = (library / "other/hat" / FILE).read_bytes()
    before = sorted(tmp_path.rglob("*"))
    for name in NAMES:
        for method in ("PUT", "DELETE"):
            answer = client.request(method, f"/v1/subjects/{name}", content=content if method == "PUT" else None)
            assert answer.status_code in (400, 404, 405), (method, name, answer.text)
            assert_a_sentence(answer)
    assert sorted(tmp_path.rglob("*")) == before and all("\n" not in line and "\r" not in line for line in lines)


def test_names_that_differ_in_case_only_are_one(serve: Serve, library: Path) -> None:
    """On the disks of macOS and Windows their files would be one."""
    client, content = serve(), (library / "other/hat" / FILE).read_bytes()
    assert client.put("/v1/subjects/hat", content=content).status_code == 201
    for name in ("Hat", "HAT", "DOG"):
        assert client.put(f"/v1/subjects/{name}", content=content).status_code == 409


def tensors(header: Any, size: int = 0, length: int | None = None) -> bytes:
    """A safetensors file; ``length``: what it says about its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * size


class Command:
    """Its pickle runs a command where it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def hostile(good: bytes) -> dict[str, bytes]:
    """Files that are no adapters, or adapters that must not be loaded."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("adapter.safetensors", b"\0" * 10_000_000)
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    data = good[8 + length :]
    first = next(name for name in header if name != "__metadata__")

    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    def changed(**values: Any) -> bytes:
        return tensors({**header, first: {**header[first], **values}}) + data

    return {
        "empty": b"",
        "text": b"<!DOCTYPE html><title>x</title>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zip": packed.getvalue(),
        "pickle": pickle.dumps(Command()),
        "gzip": b"\x1f\x8b\x08\0" + b"\0" * 100,
        "endless header": tensors({}, length=2**63),
        "long header": tensors(b" " * 11_000_000),
        "negative": tensors({}, length=2**64 - 1),
        "deep header": tensors(b'{"a":' * 50_000),
        "many tensors": tensors({f"{i}": none for i in range(25_000)}),
        "huge shape": changed(shape=[2**40, 2**40]),
        "huge empty": tensors({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}),
        "negative shape": changed(shape=[-1, -1]),
        "overlap": changed(data_offsets=[0, 8]),
        "outside": changed(data_offsets=[0, 2**40]),
        "odd dtype": changed(dtype="I64"),
        "unknown dtype": changed(dtype="O"),
        "trailing": good + b"\0" * 100,
        "cut": good[:-1],
        "nan": good[:-4] + struct.pack("<f", float("nan")),
        "half a pair": tensors({n: v for n, v in header.items() if n != first}) + data,
        "other metadata": tensors({**header, "__metadata__": {"nora": "{" * 1000}}) + data,
        "no metadata": tensors({n: v for n, v in header.items() if n != "__metadata__"}) + data,
    }


def test_hostile_files(serve: Serve, library: Path, tmp_path: Path) -> None:
    """As an upload and with a request."""
    client = serve()
    for number, (what, content) in enumerate(hostile((library / "other/hat" / FILE).read_bytes()).items()):
        answer = client.put(f"/v1/subjects/x{number}", content=content)
        assert answer.status_code == 400, (what, answer.text)
        assert_a_sentence(answer)
        body = {"prompt": "a car", "steps": 2, "adapters": {"x": base64.b64encode(content).decode()}}
        answer = client.post("/v1/pictures", json=body)
        assert answer.status_code in (400, 413), (what, answer.text)
        assert_a_sentence(answer)
    assert list((tmp_path / "uploads").iterdir()) == [] and not client.state.engine.resident_paths
    assert len(client.get("/v1/subjects").json()["subjects"]) == 2


def test_no_answer_lets_a_website_read_it(serve: Serve) -> None:
    client = serve()
    for method, path in ROUTES:
        answer = send(client, method, path)
        assert not [name for name in answer.headers if name.startswith("access-control")], path
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers
        ask = {"Access-Control-Request-Method": method, "Origin": "http://localhost"}
        answer = client.options(path, headers=ask)
        assert answer.status_code in (403, 405) and "access-control-allow-origin" not in answer.headers
    for path in (
        "/docs",
        "/redoc",
        "/.env",
        "/v1",
        "/v1/pictures/",
        "//v1/models",
        "/v1/%2e%2e/metrics",
        "/static/../x",
    ):
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code in (404, 405), path
        assert_a_sentence(answer)
