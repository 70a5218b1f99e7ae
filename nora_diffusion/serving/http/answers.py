"""Answers to what fails: a status and one sentence, in the form that OpenAI's and A1111's clients read."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ...errors import UserError, explanation, out_of_memory, printable
from ..tickets import Cancelled, Closed, Late
from ..waiting import Full

log = logging.getLogger(__name__)

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout", 409: "conflict_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 499: "cancelled", 503: "unavailable", 504: "timeout",
}  # fmt: skip
MEANINGS = {
    400: "A value is wrong; the sentence says which.", 401: "The key is missing or wrong.",
    403: "This is not allowed here.", 404: "There is none of that name.", 409: "The name is taken.",
    408: "The body came too slowly.", 413: "The body is too large.", 415: "The body is not JSON.",
    429: "Too much at once: wait.",
    500: "The server failed; its log shows why.", 503: "The server is busy or being stopped: wait.",
    504: "The request was not finished in its time.", 507: "The server has no room.",
}  # fmt: skip
WAITS = {429, 503}
MAKING = (400, 408, 413, 415, 429, 503, 504)
"""How a request for pictures may fail, besides what any request may."""
WORDINGS = {
    "extra_forbidden": "there is no such field: check its spelling, /openapi.json lists them",
    "dict_type": 'input should be an object, such as {"name": 1}',
}
"""Sentences for problems whose own wording, pydantic's, is about Python."""
INTERNAL = "the server failed on this request: its log shows why"
FOLDERS = re.compile(r"""(?<![\w:/.<>])/(?:[^\s/:;,'"<>]+/)+""")
"""The folders of a path in a message: clients need not know them."""


class Problem(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that fails: ``error`` for OpenAI's clients, ``detail`` for A1111's."""

    error: Problem
    detail: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These answers, for the description of a route."""
    wait = {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
    headers = {status: {"Retry-After": wait} for status in WAITS}
    return {
        status: {"model": ErrorAnswer, "description": MEANINGS[status], "headers": headers.get(status, {})}
        for status in statuses
    }


class Refused(Exception):
    """A request that is refused with a status, a sentence and perhaps the seconds to wait."""

    def __init__(self, status: int, sentence: str, wait: float | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.wait = status, printable(sentence), wait


def refused(error: BaseException) -> Refused:
    """What an error means to the client. A bug is logged with its stack trace."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(429, f"the queue is full ({error.waiting} pictures wait): try again later", 5)
    if isinstance(error, Late | Cancelled | Closed):
        status = {Late: 504, Cancelled: 499, Closed: 503}[type(error)]
        return Refused(status, str(error), 10 if status == 503 else None)
    if isinstance(error, UserError):
        return Refused(400, FOLDERS.sub("", str(error)))
    if isinstance(error, Exception) and out_of_memory(error):
        return Refused(503, "the memory of the server is full: ask for a smaller picture, or try again later", 10)
    log.error("a request failed: %s", explanation(error) or type(error).__name__, exc_info=error)
    return Refused(500, INTERNAL)


def body_of(refusal: Refused) -> dict[str, Any]:
    """``error`` as OpenAI's clients read it, ``detail`` as A1111's do."""
    kind = KINDS.get(refusal.status, "server_error")
    error = {"message": refusal.sentence, "type": kind, "param": None, "code": None}
    return {"error": error, "detail": refusal.sentence}


def answer(refusal: Refused, own: Mapping[str, str] | None = None) -> JSONResponse:
    """The response of a refusal. ``own``: more headers."""
    headers = dict(own or {})
    headers |= {"Retry-After": str(max(1, math.ceil(refusal.wait)))} if refusal.wait is not None else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(refusal), refusal.status, headers)


def sentence_of(problems: Sequence[Mapping[str, Any]]) -> str:
    """The first problem that pydantic found with a body, as a sentence."""
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "the body"
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    sentence = WORDINGS.get(first["type"], str(first["msg"]))
    return f"{where[:100]}: {sentence[:1].lower()}{sentence[1:200]}{more}"
