"""``POST /v1/pictures``: this toolkit's own API, as one answer or as a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Annotated, Any, get_args

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ....generation.settings import MAX_STEPS
from ...request import MAX_COUNT, Request
from ...tickets import Event, EventKind, Picture, Ticket
from ..answers import MAKING, body_of, errors, refused
from ..attachments import MAX_BASE64, attached
from ..encoding import Format, as_base64
from ..following import ending_of, pictures, submitted, unsilent
from ..previews import Previews
from ..state import State, seed_of

Number = Annotated[float, Field(allow_inf_nan=False)]


class PicturesBody(BaseModel):
    """What a client sends. Absent values are the base's defaults; an absent seed is a random one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    negative_prompt: str = ""
    subjects: dict[str, Number] = Field({}, description="weights by name, beside the tags of the prompt")
    adapters: dict[str, Annotated[str, Field(max_length=MAX_BASE64)]] = Field(
        {}, description="files of adapters for this request only, in base64 by name; weight 1 if nothing names them"
    )
    seed: int | None = None
    steps: int | None = None
    guidance: Number | None = None
    width: int | None = None
    height: int | None = None
    count: int = Field(1, ge=1, le=MAX_COUNT)
    sampler: str | None = None
    format: Format = "png"
    priority: int = 0
    timeout: Number | None = None
    stream: bool = False
    previews: int = Field(0, ge=0, le=MAX_STEPS, description="in a stream: a preview after so many steps; 0: none")


KINDS = (*get_args(EventKind), "alive", "done")
EVENTS = {"text/event-stream": {"itemSchema": {
    "type": "object", "required": ["event", "data"],
    "properties": {
        "event": {"enum": KINDS}, "data": {"type": "string", "contentMediaType": "application/json"},
    },
}}}  # fmt: skip
"""The stream as OpenAPI 3.2 describes it."""


class PictureAnswer(BaseModel):
    """One picture: its file in base64, and its settings, which are in the file too."""

    index: int
    format: str
    b64: str
    settings: dict[str, Any]


class PicturesAnswer(BaseModel):
    """The pictures in the order of their seeds."""

    pictures: list[PictureAnswer]


def routes(state: State) -> APIRouter:
    """The route of this API."""
    router = APIRouter(tags=["pictures"])

    also: dict[int | str, Any] = {200: {"description": "The pictures, or a stream of events.", "content": EVENTS}}

    @router.post("/v1/pictures", response_model=PicturesAnswer, responses={**also, **errors(*MAKING, 507)})
    async def make_pictures(body: PicturesBody, http: HttpRequest) -> Any:
        """Make pictures. With ``"stream": true`` or ``Accept: text/event-stream``: queued, step, picture and error."""
        request = request_of(state, body, client_of(http))
        if body.adapters:
            files = await run_in_threadpool(attached, state, body.adapters, ending_of(http))
            request = replace(request, adapters=files)
        ticket = await submitted(state, request, http)
        if body.stream or "text/event-stream" in http.headers.get("accept", ""):
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream(state, ticket, body), 200, headers, "text/event-stream")
        found = await pictures(ticket, http)
        return {"pictures": [await run_in_threadpool(described, state, picture, body.format) for picture in found]}

    return router


def client_of(http: HttpRequest) -> str:
    """The name of the client's key; empty without keys."""
    return str(http.scope.get("state", {}).get("client", ""))


def request_of(state: State, body: PicturesBody, client: str) -> Request:
    """The body as the engine takes it. Raises :class:`UserError`."""
    sampling = state.sampling(
        body.steps,
        body.guidance,
        negative_prompt=body.negative_prompt,
        width=body.width,
        height=body.height,
        sampler=body.sampler,
    )
    return Request(
        body.prompt, sampling, body.subjects, seed_of(body.seed, body.count), body.count, client,
        body.priority, state.config.timeout if body.timeout is None else body.timeout,
        dict.fromkeys(body.adapters, "not received yet"),
    )  # fmt: skip


def described(state: State, picture: Picture, form: Format) -> dict[str, Any]:
    """A picture as :class:`PictureAnswer` has it."""
    data, settings = as_base64(picture, state.config.base_name, form)
    return {"index": picture.index, "format": form, "b64": data, "settings": asdict(settings)}


async def stream(state: State, ticket: Ticket, body: PicturesBody) -> AsyncIterator[str]:
    """The events of a request as server-sent events; the last one is ``done``."""
    previews = Previews(state, body.previews, ticket.request.sampling)
    async for event in unsilent(ticket.follow()):
        if event is None:
            yield _sent("alive", {})
            continue
        yield _sent(event.kind, await run_in_threadpool(_values, state, event, body.format, previews))
    yield _sent("done", {})


def _values(state: State, event: Event, form: Format, previews: Previews) -> dict[str, Any]:
    if event.picture is not None:
        return described(state, event.picture, form)
    if event.error is not None:
        refusal = refused(event.error)
        return {"index": event.index, "status": refusal.status, **body_of(refusal)}
    if event.kind == "step":
        return {"index": event.index, "step": event.step, "steps": event.steps, **previews.of(event)}
    return {"index": event.index, "place": event.place}


def _sent(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n"
