"""``/sdapi/v1``: the part of the API of AUTOMATIC1111's web UI that makes pictures of a text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from ....errors import UserError, quoted
from ....generation.samplers import SAMPLERS, sampler_named
from ...request import MAX_COUNT, Request
from ..answers import MAKING, errors
from ..encoding import as_base64
from ..following import pictures, submitted
from ..state import State, seed_of
from .own import client_of

UNSUPPORTED = ("enable_hr", "firstpass_image", "styles", "init_images", "script_name")
"""Fields that would make another picture: they are refused instead of ignored."""


class TextToImageBody(BaseModel):
    """A1111's fields that this server knows; others are ignored."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    steps: int | None = None
    cfg_scale: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = Field(1, ge=1, le=MAX_COUNT)
    n_iter: int | None = Field(1, ge=1, le=MAX_COUNT)
    sampler_name: str | None = None
    sampler_index: str | None = None


class TextToImageAnswer(BaseModel):
    """The pictures as PNG in base64, the fields that were sent, and A1111's ``info``, which is JSON in a string."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class LoraAnswer(BaseModel):
    """A subject. ``path`` is empty: clients need not know it."""

    name: str
    alias: str
    path: str = ""
    metadata: dict[str, Any]


class SamplerAnswer(BaseModel):
    """A sampler by A1111's name."""

    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class OptionsAnswer(BaseModel):
    """The options that clients read."""

    sd_model_checkpoint: str
    samples_format: str = "png"


class CheckpointAnswer(BaseModel):
    """The base."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


def routes(state: State) -> APIRouter:
    """The routes of this API."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @router.post("/txt2img", response_model=TextToImageAnswer, responses=errors(*MAKING))
    async def txt2img(body: TextToImageBody, http: HttpRequest) -> Any:
        """Make pictures of a prompt with ``<lora:name:0.8>`` tags."""
        request = request_of(state, body, client_of(http))
        found = await pictures(await submitted(state, request, http), http)
        files = [await run_in_threadpool(as_base64, own, state.config.base_name) for own in found]
        settings = [replace(own.settings, base=state.config.base_name) for own in found]
        return {
            "images": [file for file, _ in files],
            "parameters": body.model_dump(),
            "info": json.dumps(info_of(request, settings)),
        }

    @router.get("/loras")
    def loras() -> list[LoraAnswer]:
        """The subjects."""
        return [
            LoraAnswer(name=name, alias=name, metadata={"trigger": subject.info.trigger})
            for name, subject in list(state.catalog.subjects.items())
        ]

    @router.get("/samplers")
    def samplers() -> list[SamplerAnswer]:
        """The samplers."""
        return [SamplerAnswer(name=sampler.title, aliases=[own]) for own, sampler in SAMPLERS.items()]

    @router.get("/options")
    def options() -> OptionsAnswer:
        """The model; nothing else can be set."""
        return OptionsAnswer(sd_model_checkpoint=state.config.base_name)

    @router.get("/sd-models")
    def models() -> list[CheckpointAnswer]:
        """The base."""
        name = state.config.base_name
        return [CheckpointAnswer(title=name, model_name=name, filename=name)]

    return router


def sampler_of(body: TextToImageBody) -> str | None:
    """The engine's name of the sampler; ``None`` for the base's own. Raises :class:`UserError`."""
    name = body.sampler_name or body.sampler_index
    if name in (None, "", "Automatic"):
        return None
    found = sampler_named(str(name))
    if found is None:
        titles = [sampler.title for sampler in SAMPLERS.values()]
        raise UserError(f"the sampler {quoted(name)} is unknown: choose one of {', '.join(titles)}")
    return found


def request_of(state: State, body: TextToImageBody, client: str) -> Request:
    """The body as the engine takes it. Raises :class:`UserError`."""
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise UserError(f"{name} is not supported here: leave it out")
    count = (body.batch_size or 1) * (body.n_iter or 1)
    if count > MAX_COUNT:
        raise UserError(f"batch_size times n_iter is {count}: ask for at most {MAX_COUNT} pictures")
    sampling = state.sampling(
        body.steps,
        body.cfg_scale,
        negative_prompt=body.negative_prompt or "",
        width=body.width,
        height=body.height,
        sampler=sampler_of(body),
    )
    return Request(
        body.prompt, sampling, seed=seed_of(body.seed, count), count=count, client=client,
        timeout=state.config.timeout,
    )  # fmt: skip


def info_of(request: Request, settings: list[Any]) -> dict[str, Any]:
    """A1111's ``info``."""
    first, seeds = settings[0], [own.seed for own in settings]
    return {
        "prompt": request.prompt, "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": first.negative_prompt,
        "seed": seeds[0], "all_seeds": seeds, "width": first.width, "height": first.height, "steps": first.steps,
        "cfg_scale": first.guidance, "sampler_name": first.sampler, "batch_size": len(seeds),
        "sd_model_name": first.base, "infotexts": [own.parameters_text() for own in settings],
    }  # fmt: skip
