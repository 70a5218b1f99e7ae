"""Subjects: listed, uploaded with checks, deleted while pictures use them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from asynchronous import until
from PIL import Image

from nora_diffusion import create_pack, export_lora, inspect_adapter
from nora_diffusion.formats.packs import Pack
from nora_diffusion.generation.library import NamedAdapter
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.http import uploads as uploading
from nora_diffusion.serving.http.catalog import Catalog
from nora_diffusion.serving.http.uploads import Uploads
from nora_diffusion.serving.request import Request

Serve = Callable[..., Any]
FILE = "nora_adapter.safetensors"
SMALL = {"prompt": "a sks hat <lora:hat>", "steps": 2, "width": 16, "height": 16}


def pixels(client: Any, prompt: str) -> Any:
    (made,) = client.post("/v1/pictures", json={**SMALL, "seed": 1, "prompt": prompt}).json()["pictures"]
    with Image.open(io.BytesIO(base64.b64decode(made["b64"]))) as image:
        return np.asarray(image, float)


def test_the_list(serve: Serve) -> None:
    client = serve()
    client.post("/v1/pictures", json={**SMALL, "prompt": "a dog <lora:dog>"})
    found = {own["name"]: own for own in client.get("/v1/subjects").json()["subjects"]}
    assert set(found) == {"dog", "cat"} and found["dog"]["trigger"] == "sks" and len(found["cat"]["sha256"]) == 64
    assert found["dog"]["resident"] and not found["cat"]["resident"] and not found["dog"]["uploaded"]


def test_upload_use_and_delete(serve: Serve, library: Path, tmp_path: Path) -> None:
    client, content = serve(), (library / "other/hat" / FILE).read_bytes()
    for _ in range(2):  # the same again, after it was deleted
        answer = client.put("/v1/subjects/hat", content=content)
        assert answer.status_code == 201 and answer.json()["uploaded"], answer.text
        assert client.put("/v1/subjects/hat", content=content).status_code == 409
        assert client.post("/v1/pictures", json=SMALL).status_code == 200
        assert len(Uploads(tmp_path / "uploads").adapters()) == 1
        assert client.delete("/v1/subjects/hat").json() == {"name": "hat", "deleted": True}
        until(lambda: not any("hat" in path for path in client.state.engine.resident_paths))
        assert list((tmp_path / "uploads").iterdir()) == []
        assert client.post("/v1/pictures", json=SMALL).status_code == 400
    assert client.delete("/v1/subjects/hat").status_code == 404
    assert client.delete("/v1/subjects/dog").status_code == 403


def test_a_plain_lora_is_a_subject_too(serve: Serve, library: Path, tmp_path: Path) -> None:
    client = serve()
    client.put("/v1/subjects/hat", content=(library / "other/hat" / FILE).read_bytes())
    file = export_lora(library / "other/hat", tmp_path / "plain.safetensors", "kohya").path
    answer = client.put("/v1/subjects/plain", content=file.read_bytes())
    assert answer.status_code == 201, answer.text
    own, plain, base = (pixels(client, f"a sks hat {tag}") for tag in ("<lora:hat:30>", "<lora:plain:30>", ""))
    assert np.abs(own - plain).max() <= 1 < np.abs(own - base).max()


def test_uploads_stay_after_a_restart(library: Path, tmp_path: Path, opened: Any) -> None:
    uploads = Uploads(tmp_path)
    copy = tmp_path / ".upload-1.safetensors"
    copy.write_bytes((library / "other/hat" / FILE).read_bytes())
    with Engine(opened) as engine:
        uploads.keep(copy, "hat", engine)
    (tmp_path / ".upload-2.safetensors").write_bytes(b"half")
    subjects = Catalog([], Uploads(tmp_path)).subjects
    assert list(subjects) == ["hat"] and subjects["hat"].uploaded and not list(tmp_path.glob(".upload*"))


def test_wrong_files_are_refused(serve: Serve, library: Path, tmp_path: Path) -> None:
    client, content = serve(), (library / "other/hat" / FILE).read_bytes()
    wrong = {
        "empty": b"",
        "text": b"no tensors",
        "cut": content[:-100],
        "alien": (library / "alien/alien" / FILE).read_bytes(),
    }
    for name, body in wrong.items():
        answer = client.put(f"/v1/subjects/{name}", content=body)
        assert answer.status_code == 400 and ".upload" not in answer.text and str(tmp_path) not in answer.text, (
            answer.text
        )
    assert client.put("/v1/subjects/a%20b", content=content).status_code == 400
    assert client.put("/v1/subjects/..%2Fx", content=content).status_code in (400, 404)
    assert list((tmp_path / "uploads").iterdir()) == []


def test_uploads_have_limits(serve: Serve, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client, content = serve(), (library / "other/hat" / FILE).read_bytes()
    monkeypatch.setattr(uploading, "MAX_UPLOAD", 100)
    assert client.put("/v1/subjects/hat", content=content).status_code == 413
    monkeypatch.setattr(uploading, "MAX_UPLOAD", 2**30)
    monkeypatch.setattr(uploading, "MAX_STORED", 100)
    assert client.put("/v1/subjects/hat", content=content).status_code == 507
    assert list((tmp_path / "uploads").iterdir()) == []


def test_uploads_are_off_by_default(serve: Serve) -> None:
    client = serve(uploads=False)
    assert client.put("/v1/subjects/hat", content=b"x").status_code == 403
    assert client.delete("/v1/subjects/dog").status_code == 403


def test_a_subject_in_use_is_removed_when_its_picture_ends(pipe: Any, library: Path) -> None:
    hat = NamedAdapter("hat", str(library / "other/hat" / FILE))
    sampling = Sampling(500, 4.0, width=16, height=16)
    with Engine(pipe, at_once=1) as engine:
        engine.add_subject(hat)
        used = engine.submit(Request("a hat <lora:hat>", sampling))
        waiting = engine.submit(Request("a hat <lora:hat>", sampling))
        steps = (event.step for event in used.events() if event.kind == "step")
        at = next(steps)
        engine.remove_subject("hat")
        next(step for step in steps if step > at + 2)
        assert hat.path in engine.resident_paths
        used.cancel()
        with pytest.raises(ValueError, match="was removed"):
            waiting.pictures()
        until(lambda: not engine.resident_paths)
        with pytest.raises(ValueError, match="no subject"):
            engine.remove_subject("hat")


def test_a_pack_of_many_subjects_is_read_once(tmp_path: Path, library: Path) -> None:
    file = create_pack(tmp_path / "all.nora_pack.safetensors", {f"s{i}": library / "shown" / "dog" for i in range(50)})
    with mock.patch.object(Pack, "_open", autospec=True, side_effect=Pack._open) as opened:
        found = Catalog([str(file)])
    assert len(found.subjects) == 50 and opened.call_count == 1
    assert found.subjects["all#s7"].info.sha256 == inspect_adapter(f"{file}#s7").sha256
