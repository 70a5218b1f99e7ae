"""Attacks on the running app, and the defaults that stop them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nora_diffusion import UserError
from nora_diffusion.ui import AppConfig
from nora_diffusion.ui.security.bodies import MAX_BODY
from nora_diffusion.ui.security.gate import Gatekeeper
from nora_diffusion.ui.security.uploads import MAX_UPLOAD
from nora_diffusion.ui.state import App

from .conftest import ROOT, Server, start

JOIN = "/gradio_api/queue/join"
UPLOAD = "/gradio_api/upload"


def generate(server: Server, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "prompt": "a dog", "negative": "", "count": 1, "seed": 3, "steps": 2, "guidance": 2.0, "width": 16,
        "height": 16, "blocks": {}, "apart": True, "sampler": "own", "hires": 1, "hires_strength": 0.5,
        "start_file": None, "mask": "", "strength": 0.7, "closely": True,
    }  # fmt: skip
    assert set(changes) <= set(values)
    return server.call("generate", *{**values, **changes}.values())


def error(result: dict[str, Any]) -> str:
    assert not result["success"], result
    return str(result["output"].get("error"))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80"])
def test_dns_rebinding_is_refused(server: Server, host: str) -> None:
    with server.client(host=host) as http:
        assert http.get("/").status_code == 400
        assert http.post(JOIN, json={}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
    ids=str,
)
def test_cross_site_posts_are_refused(server: Server, headers: dict[str, str]) -> None:
    before = sorted(server.scratch.rglob("*"))
    with server.client(**headers) as http:
        assert http.post(JOIN, json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code == 403
        assert http.post(UPLOAD, files={"files": ("a.png", b"x")}).status_code == 403
    assert sorted(server.scratch.rglob("*")) == before


def test_the_page_itself_still_works(server: Server) -> None:
    with server.client(origin=server.url, **{"sec-fetch-site": "same-origin"}) as http:
        assert http.post(UPLOAD, files={"files": ("a.txt", b"x")}).status_code == 200
    with server.client(**{"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}) as http:
        assert http.get("/").status_code == 200  # a link on another website may open the app


def test_no_file_outside_is_served(server: Server, base: Path) -> None:
    adapter = server.library / "dog" / "nora_adapter.safetensors"
    targets = [
        "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data", "../../../etc/passwd",
        str(ROOT / "app.py"), str(adapter), str(base / "unet" / "config.json"), "app.py",
        f"{server.scratch}/../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
        str(ROOT / "nora_diffusion" / "pipelines" / "base.py"),
    ]  # fmt: skip
    with server.client() as http:
        for target in targets:
            response = http.get(f"/gradio_api/file={target}")
            assert response.status_code in (400, 403, 404, 405), (target, response.status_code)


def test_unused_routes_of_gradio_are_closed(server: Server) -> None:
    with server.client() as http:
        for path in ("/monitoring", "/gradio_api/proxy=https://example.com/", "/gradio_api/runs", "/gradio_api/mcp/sse",
                     "/docs", "/openapi.json", "/gradio_api/vibe-code"):  # fmt: skip
            assert http.get(path).status_code in (404, 405), path
        assert http.post("/gradio_api/cancel", json={"session_hash": "a", "event_id": "b"}).status_code == 404
        assert http.post("/gradio_api/call/generate", json={"data": []}).status_code == 404
        config = http.get("/config").json()
    assert not config.get("run_history") and not config["show_error"]


def test_forged_file_data_is_refused(server: Server, library: Path) -> None:
    """The page sends the path of an uploaded file; a script could send any path, even that of a valid adapter."""

    def listed() -> list[str]:
        return sorted(
            p.name for p in server.library.iterdir() if p.name != ".hashes.json"
        )  # a cache, written at any time

    before = listed()
    adapter = library / "dog" / "nora_adapter.safetensors"
    for path in ("/etc/passwd", "/proc/self/environ", str(adapter), os.path.relpath(adapter, server.scratch / "work")):
        forged = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.safetensors"}
        server.call("import", [forged], 0)
    assert listed() == before
    # The same call with an uploaded file reaches the library, which already has this adapter.
    (uploaded,) = upload(server, adapter.read_bytes(), "mine.safetensors")
    result = server.call("import", [{**forged, "path": uploaded}], 0)
    assert result["success"], result
    assert sorted(p.name for p in server.library.iterdir() if not p.name.startswith(".")) == [
        name for name in before if not name.startswith(".")
    ]


def upload(server: Server, content: bytes, name: str) -> list[str]:
    with server.client() as http:
        return list(http.post(UPLOAD, files={"files": (name, content)}).json())


def bomb() -> bytes:
    """A small PNG file of 16000x8000 pixels; only its header is valid."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 16000, 8000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def long_text() -> bytes:
    import io

    from PIL import Image, PngImagePlugin

    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("parameters", "a" * (2**20 + 1))
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (bomb(), "megapixels"),
        (long_text(), "KiB"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PNG"),
        (b"%PDF-1.7", "PNG"),
        (b"II*\0" + bytes(64), "PNG"),
        (b"PK\3\4" + bytes(64), "PNG"),
        (b"", "PNG"),
    ],
    ids=["bomb", "text", "svg", "eps", "pdf", "tiff", "zip", "empty"],
)
def test_images_are_refused_from_their_header(server: Server, content: bytes, word: str) -> None:
    (path,) = upload(server, content, "a.png")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    now = ["a dog", "", 1, 0, 2, 2.0, 16, 16, True, "own", 1, 0.5]
    result = server.call("preview_settings", file, *now)
    assert result["success"], result
    _, text, choice = result["output"]["data"]
    assert "bad" in text and word in text and choice["visible"] is False


@pytest.mark.parametrize(
    "name", ["../dog", "/etc/passwd", "dog/../dog", "dog\0", "..", ".", "", "pictures", "dog\\..", "x" * 5000]
)
def test_an_adapter_name_is_not_a_path(server: Server, name: str) -> None:
    session = f"path {name[:20]!r}"
    text = error(server.call("pick", event={"name": name}, session=session))
    assert "no adapter" in text
    error(server.call("delete", name, 0, session=session))
    assert (server.library / "dog").is_dir()


def test_tags_only_name_adapters_of_the_library(server: Server) -> None:
    for name in ("../library/dog", "/etc/passwd", "nobody", "broken"):
        text = error(generate(server, prompt=f"a dog <lora:{name}:1>"))
        assert "adapter" in text.lower(), text


def test_a_symlink_in_the_library_is_not_followed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = server.library / "link"
    link.symlink_to(server.library / "dog")
    try:
        error(server.call("pick", event={"name": "link"}))
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prompt": "a" * 500_000}, ""),
        ({"prompt": "a" * 4001}, "4000"),
        ({"negative": "a" * 4001}, ""),
        ({"steps": 10**9}, ""),
        ({"steps": -1}, ""),
        ({"steps": 2.5}, ""),
        ({"count": 10**6}, ""),
        ({"guidance": float("nan")}, ""),
        ({"guidance": float("inf")}, ""),
        ({"guidance": "5; import os"}, ""),
        ({"seed": -7}, ""),
        ({"seed": float("nan")}, ""),
        ({"width": 10**6}, ""),
        ({"width": 17}, ""),
        ({"prompt": "a <lora:dog:nan>"}, "weight"),
        ({"prompt": "a <lora:dog:1e9>"}, "weight"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "  "}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_bypass_the_sliders_are_refused(server: Server, changes: dict[str, Any], word: str) -> None:
    text = error(generate(server, **changes))
    assert word in text
    assert "Traceback" not in text


def test_a_prompt_of_a_megabyte_is_refused_early(server: Server) -> None:
    with server.client() as http:
        assert http.post(JOIN, content=b'{"data": ["' + b"a" * 2**20 + b'"]}').status_code == 413

        def endless() -> Any:
            for _ in range(40):
                yield b"a" * 2**16

        refused = http.post(JOIN, content=endless())  # no content-length: bytes are counted on arrival
        assert refused.status_code >= 400


def test_a_request_is_limited_as_a_whole() -> None:
    gate = Gatekeeper(None, {"localhost"})  # type: ignore[arg-type]

    def status(size: object, path: str = UPLOAD) -> int | None:
        refusal = gate.refusal({"path": path, "method": "POST"}, {"host": "localhost", "content-length": str(size)})
        return refusal.status if refusal else None

    # The limit is for all files of a request together.
    assert [status(n) for n in (MAX_UPLOAD, MAX_UPLOAD + 1, "-1", "x", "\u00b2", "1 ")] == [None, *[413] * 5]
    assert status(MAX_BODY, JOIN) is None and status(MAX_BODY + 1, JOIN) == 413


def test_old_copies_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.ui.state.MAX_COPIES", 2)
    (tmp_path / "scratch").mkdir()
    app = App(AppConfig(library=str(tmp_path / "library")), tmp_path / "scratch")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        file.write_text(file.name)
    permanent = app.copy_permanently(files[0])
    old, *_ = (Path(app.hand_out(file)) for file in (files[0], files[1], files[2], files[1]))
    assert not old.parent.exists()
    again = Path(app.hand_out(files[0]))  # replaces the least recently used copy
    kept = [Path(app.hand_out(files[1])), again, permanent]
    assert [copy.read_text() for copy in kept] == ["1.png", "0.png", "0.png"]
    assert sorted((tmp_path / "scratch").rglob("*.png")) == sorted(kept)


def test_an_invalid_adapter_is_refused_and_changes_no_later_image(server: Server, library: Path) -> None:
    """All or nothing: no tensor may be missing, unknown, of a wrong shape or dtype, or contain NaN."""
    from safetensors.torch import load_file, save_file

    def image() -> bytes:
        assert generate(server)["success"]
        return max((server.library / "pictures").glob("*.png"), key=lambda f: f.name).read_bytes()

    source = library / "dog" / "nora_adapter.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    first = next(iter(tensors))
    changes: dict[str, dict[str, Any]] = {
        "nan": {first: torch.full_like(tensors[first], float("nan"))},
        "shape": {first: torch.zeros(3, 5)},
        "dtype": {first: tensors[first].to(torch.int64)},
        "unknown": {"unet.nothing.nora_core": torch.zeros(2, 2)},
        "half": {first: None},
    }
    before = image()
    for name, change in changes.items():
        folder = server.library / f"bad-{name}"
        folder.mkdir()
        kept = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(kept, folder / source.name, metadata)
        try:
            result = generate(server, prompt=f"a dog <lora:bad-{name}:1>")
            output = str(result["output"])
            assert not result["success"] or "status bad" in output, (name, output)
            assert "Internal error" not in output and "Traceback" not in output, (name, output)
            assert image() == before, name
        finally:
            shutil.rmtree(folder)


def test_the_app_still_works_after_all_attacks(server: Server) -> None:
    result = generate(server)
    assert result["success"], result
    # Gradio logs what its own components refuse; no handler of this app logged an unexpected error.
    log = server.log.read_text()
    assert "unexpected error" not in log and "nora_diffusion/ui" not in log, log[-3000:]


def test_files_of_the_app_are_private(server: Server) -> None:
    assert server.scratch.stat().st_mode & 0o777 == 0o700
    assert Path(f"/proc/{server.process.pid}/cwd").readlink() == server.scratch / "work"
    assert not list((server.scratch / "work").iterdir())


def test_it_listens_on_loopback(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")  # although GRADIO_SERVER_NAME is 0.0.0.0


# Off loopback


@pytest.mark.parametrize("flags", [[], ["--auth", "user"], ["--auth", ":x"], ["--auth", "x:"]])
def test_no_listening_without_a_password(flags: list[str], refused: Callable[..., str]) -> None:
    message = refused("--listen", "0.0.0.0", *flags)
    assert message.startswith("error: --") and "auth" in message


def test_settings_are_checked() -> None:
    for bad in (AppConfig(port=70_000), AppConfig(auth="nocolon"), AppConfig(listen="192.0.2.1")):
        with pytest.raises(UserError):
            bad.check()
    AppConfig(listen="::1").check()
    AppConfig(listen="0.0.0.0", auth="a:b:c").check()
    assert AppConfig(auth="a:b:c").credentials == ("a", "b:c")
    assert not AppConfig(listen="0.0.0.0", auth="a:b").may_change
    assert AppConfig(listen="0.0.0.0", auth="a:b", allow_changes=True).may_change


@pytest.mark.slow
def test_a_shared_app(tmp_path: Path, base: Path, library: Path) -> None:
    """Every route needs the password; training, upload and delete are closed; guesses are limited."""
    shutil.copytree(library / "dog", tmp_path / "library" / "dog")
    shared = start(tmp_path, "--listen", "0.0.0.0", "--auth", "nora:secret", "--base", str(base))
    try:
        shared.url = shared.url.replace("0.0.0.0", "127.0.0.1").replace("localhost", "127.0.0.1")
        with shared.client() as http:
            assert http.get("/config").status_code == 401
            assert http.post(JOIN, json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code == 401
            assert http.post(UPLOAD, files={"files": ("a.txt", b"x")}).status_code == 401
            assert http.post("/login", data={"username": "nora", "password": "secret"}).status_code == 200
            shared.cookies = dict(http.cookies)
            assert http.get("/config").status_code == 200
        assert "--allow_changes" in error(shared.call("delete", "dog", 0))
        assert "--allow_changes" in error(shared.call("import", None, 0))
        assert (shared.library / "dog").is_dir()
    finally:
        assert shared.stop() == 0
    assert not shared.scratch.exists()
