"""The ASGI app of the server: all routes, and the answers to what fails."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ... import __version__
from ...errors import UserError
from ..waiting import Full
from .answers import Refused, answer, errors, refused, sentence_of
from .document import describe, methods
from .gate import Gate
from .routes import a1111, openai, operations, own, subjects
from .state import State


def application(state: State) -> Gate:
    """The app behind its gate. Its documentation is ``/openapi.json``; a page that loads scripts is not served."""
    app = FastAPI(title="nora-diffusion", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (own, openai, a1111, subjects, operations):
        app.include_router(module.routes(state), responses=errors(401, 403, 500))
    document = describe(app, state.config, state.keys is not None)

    async def on_error(_: Any, error: Exception) -> Response:
        return answer(refused(error))

    async def on_invalid(_: Any, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(Refused(400, sentence_of(error.errors())))

    async def on_http(http: Any, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        allowed = methods(document, http.url.path)
        known = {
            404: "there is no such route: /openapi.json lists them",
            405: f"{http.method} is not possible here: use {allowed}",
        }
        headers = {"Allow": allowed} if error.status_code == 405 else {}
        return answer(Refused(error.status_code, known.get(error.status_code, str(error.detail))), headers)

    for kind in (UserError, Full, Refused, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    return Gate(app, state, document)
