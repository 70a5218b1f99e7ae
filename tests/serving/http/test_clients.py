"""The APIs of OpenAI and A1111: their forms, and their real Python clients where they are installed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started

Serve = Callable[..., Any]
SMALL = {"prompt": "a sks dog <lora:dog:0.5>", "steps": 2, "width": 16, "height": 16}


def size_of(text: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.size


def test_openai(serve: Serve) -> None:
    client = serve()
    models = [own["id"] for own in client.get("/v1/models").json()["data"]]
    assert models == ["base", "cat", "dog"]
    body = {"prompt": "a car", "model": "dog", "n": 2, "size": "16x16", "steps": 2, "quality": "hd", "user": "me"}
    answer = client.post("/v1/images/generations", json=body).json()
    assert [size_of(own["b64_json"]) for own in answer["data"]] == [(16, 16)] * 2
    answer = client.post("/v1/images/generations", json={**body, "response_format": "url", "n": 1}).json()
    assert answer["data"][0]["url"].startswith("data:image/png;base64,")
    for wrong, status in (
        ({"model": "dall-e-9"}, 404),
        ({"size": "big"}, 400),
        ({"stream": True}, 400),
        ({"n": 99}, 400),
    ):
        assert client.post("/v1/images/generations", json={**body, **wrong}).status_code == status


@pytest.mark.parametrize("name", ["Euler a", "Euler", "DPM++ 2M", "DDIM", "UniPC", "Automatic", None])
def test_a1111(serve: Serve, name: str | None) -> None:
    body = {
        **SMALL,
        "seed": 5,
        "cfg_scale": 4,
        "sampler_name": name,
        "batch_size": 1,
        "n_iter": 2,
        "save_images": False,
    }
    answer = serve().post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert [size_of(own) for own in answer.json()["images"]] == [(16, 16)] * 2
    assert (
        info["all_seeds"] == [5, 6] and "Steps: 2" in info["infotexts"][0] and "<lora:dog:0.5>" in info["infotexts"][0]
    )
    assert answer.json()["parameters"]["save_images"] is False


def test_a1111_random_seeds_and_refusals(serve: Serve) -> None:
    client = serve()
    seeds = [
        json.loads(client.post("/sdapi/v1/txt2img", json={**SMALL, "seed": -1}).json()["info"])["seed"] for _ in "ab"
    ]
    assert seeds[0] != seeds[1]
    for wrong in ({"sampler_name": "Best"}, {"enable_hr": True}, {"batch_size": 16, "n_iter": 2}, {"prompt": ""}):
        assert client.post("/sdapi/v1/txt2img", json={**SMALL, **wrong}).status_code == 400
    assert [own["name"] for own in client.get("/sdapi/v1/loras").json()] == ["cat", "dog"]
    assert "Euler a" in [own["name"] for own in client.get("/sdapi/v1/samplers").json()]
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "base"
    assert client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "base"


@pytest.fixture
def url(tiny_base: Path, library: Path) -> Iterator[str]:
    """A server that is reached over the network of this machine."""
    with started(ServeConfig(BaseSource(str(tiny_base), "cpu"), [str(library / "shown")], port=0)) as url:
        yield url


def test_the_client_of_openai(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}v1", api_key="none")
    assert [own.id for own in client.models.list()] == ["base", "cat", "dog"]
    answer = client.images.generate(
        model="base", prompt="a dog <lora:dog:0.5>", n=1, size="16x16", response_format="b64_json", user="me",
        extra_body={"steps": 2, "seed": 1},
    )  # fmt: skip
    assert size_of(answer.data[0].b64_json) == (16, 16)
    with pytest.raises(openai.BadRequestError, match="names no known adapter"):
        client.images.generate(model="base", prompt="a dog <lora:dig>", size="16x16")


def test_the_client_of_a1111(url: str) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    client = webuiapi.WebUIApi(baseurl=f"{url}sdapi/v1")
    result = client.txt2img(prompt="a dog <lora:dog:0.5>", steps=2, width=16, height=16, seed=3, sampler_name="Euler a")
    assert result.image.size == (16, 16) and result.info["seed"] == 3
    assert [own["name"] for own in client.get_loras()] == ["cat", "dog"]
