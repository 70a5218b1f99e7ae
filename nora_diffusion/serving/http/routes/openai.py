"""``POST /v1/images/generations`` and ``GET /v1/models``, as OpenAI's clients call them."""

from __future__ import annotations

import re
import time
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from ....errors import UserError
from ...request import MAX_COUNT, Request
from ..answers import MAKING, Refused, errors
from ..encoding import Format, as_base64
from ..following import pictures, submitted
from ..state import State, seed_of, tagged
from .own import client_of

SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
OWNER = "nora-diffusion"


class GenerationsBody(BaseModel):
    """OpenAI's fields, and those of diffusion models for ``extra_body``; unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    prompt: str
    model: str | None = None
    n: int | None = Field(1, ge=1, le=MAX_COUNT)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    stream: bool | None = None
    user: str | None = None
    negative_prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None


class ModelAnswer(BaseModel):
    """The base, or a subject."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = OWNER


class ModelsAnswer(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class ImageAnswer(BaseModel):
    """One picture: its file in base64, or as a data URL."""

    b64_json: str | None = None
    url: str | None = None


class GenerationsAnswer(BaseModel):
    """The pictures in the order of their seeds."""

    created: int
    data: list[ImageAnswer]
    output_format: Format


def routes(state: State) -> APIRouter:
    """The routes of this API."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models")
    def models() -> ModelsAnswer:
        """The base, and each subject, which may be given as the model."""
        names = [state.config.base_name, *list(state.catalog.subjects)]
        return ModelsAnswer(data=[ModelAnswer(id=name) for name in names])

    @router.post("/v1/images/generations", response_model_exclude_none=True, responses=errors(*MAKING, 404))
    async def generations(body: GenerationsBody, http: HttpRequest) -> GenerationsAnswer:
        """Make pictures; ``response_format`` ``url`` gives data URLs."""
        if body.stream:
            raise UserError("this route does not stream: use /v1/pictures with stream, or leave it out")
        ticket = await submitted(state, request_of(state, body, client_of(http)), http)
        found = await pictures(ticket, http)
        form: Format = body.output_format or "png"
        files = [(await run_in_threadpool(as_base64, own, state.config.base_name, form))[0] for own in found]
        if body.response_format == "url":
            rows = [ImageAnswer(url=f"data:image/{form};base64,{file}") for file in files]
        else:
            rows = [ImageAnswer(b64_json=file) for file in files]
        return GenerationsAnswer(created=int(time.time()), data=rows, output_format=form)

    return router


def request_of(state: State, body: GenerationsBody, client: str) -> Request:
    """The body as the engine takes it. Raises :class:`UserError`."""
    prompt, (width, height), count = body.prompt, size_of(body.size), body.n or 1
    if body.model and body.model != state.config.base_name:
        model = state.catalog.named(body.model)
        if model not in state.catalog.subjects:
            raise Refused(404, f"there is no model {body.model[:80]!r}: GET /v1/models lists them")
        prompt = tagged(prompt, model)
    sampling = state.sampling(
        body.steps, body.guidance, negative_prompt=body.negative_prompt, width=width, height=height
    )
    seed = seed_of(body.seed, count)
    return Request(prompt, sampling, seed=seed, count=count, client=client, timeout=state.config.timeout)


def size_of(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of ``"64x64"``; the base's own for ``"auto"``."""
    if size is None or size == "auto":
        return None, None
    match = SIZE.fullmatch(size)
    if match is None:
        raise UserError(f"size {size[:40]!r} is not possible: write for example 512x512")
    return int(match[1]), int(match[2])
