"""Faults of the machine and of adapters while several requests are at work: a picture fails alone."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nora_diffusion import load_adapter, save_adapter
from nora_diffusion.loaders import delete_adapter

Serve = Callable[..., Any]
SMALL = {"steps": 4, "width": 16, "height": 16, "sampler": "ddim"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/pictures": {**SMALL, "prompt": "a sks dog <lora:dog>", "seed": 1, "count": 2},
    "/v1/images/generations": {"prompt": "a car", "size": "16x16", "steps": 4, "seed": 2, "n": 2},
    "/sdapi/v1/txt2img": {**SMALL, "prompt": "a sks cat <lora:cat>", "seed": 3, "batch_size": 2, "sampler": None},
}


def pictures(answer: Any) -> list[bytes]:
    """The pixels of an answer, whichever API gave it."""
    assert answer.status_code == 200, answer.text
    values = answer.json()
    files = [own["b64"] for own in values.get("pictures", [])] + [own["b64_json"] for own in values.get("data", [])]
    found = []
    for text in [*files, *values.get("images", [])]:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            found.append(image.tobytes())
    return found


def at_once(client: Any, *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    """The answers of requests that are sent at the same moment: none starts before all are in the queue."""
    engine, wanted = client.state.engine, len(requests)
    submit, all_here = engine.submit, threading.Barrier(wanted)
    engine.submit = lambda request: (all_here.wait(), submit(request))[1]
    with ThreadPoolExecutor(wanted) as pool:
        waiting = [pool.submit(client.post, path, json=body) for path, body in requests]
        answers = [own.result() for own in waiting]
    del engine.submit
    return answers


def test_every_request_gets_its_pictures_without_enough_memory(
    serve: Serve, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    alone = [pictures(client.post(path, json=body)) for path, body in BODIES.items()]
    forward, rows = pipe.unet.forward, list[int]()

    def small(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small)
    together = [pictures(answer) for answer in at_once(client, *BODIES.items())]
    assert max(rows) > 2  # some passes did not fit
    for one, two in zip(alone, together, strict=True):
        for a, b in zip(one, two, strict=True):
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1


def test_a_picture_that_does_not_fit_fails_alone(serve: Serve, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    forward = pipe.unet.forward

    def small(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small)
    large = {**BODIES["/v1/pictures"], "width": 64}
    answers = at_once(client, *BODIES.items(), ("/v1/pictures", large))
    assert all(pictures(answer) for answer in answers[:3])
    assert answers[3].status_code == 503 and answers[3].headers["retry-after"]
    assert "ask for a smaller picture" in answers[3].json()["detail"] and "GiB" not in answers[3].text
    assert pictures(client.post("/v1/pictures", json=BODIES["/v1/pictures"]))


def test_an_adapter_that_gives_nan_fails_alone(serve: Serve, pipe: Any, library: Path, tmp_path: Path) -> None:
    load_adapter(pipe, library / "shown" / "cat", "broken", activate=False)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".broken." in name:
                parameter.fill_(1e30)  # finite, but its products are not
    save_adapter(pipe, tmp_path / "broken", "broken")
    delete_adapter(pipe, "broken")
    text = base64.b64encode((tmp_path / "broken" / "nora_adapter.safetensors").read_bytes()).decode()
    client = serve()
    body = {**BODIES["/v1/pictures"], "adapters": {"broken": text}}
    answers = at_once(client, *BODIES.items(), ("/v1/pictures", body))
    assert all(pictures(answer) for answer in answers[:3])
    assert answers[3].status_code == 400 and "NaN or infinity" in answers[3].json()["detail"]
