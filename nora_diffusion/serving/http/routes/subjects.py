"""``/v1/subjects``: what requests may name; uploads and their removal."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Path as Parameter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from ..answers import Refused, errors
from ..catalog import Subject
from ..state import State
from ..uploads import NAME, Uploads

Named = Annotated[str, Parameter(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]


class SubjectAnswer(BaseModel):
    """A subject. ``resident``: it is loaded. ``uploaded``: it may be deleted."""

    name: str
    trigger: str
    class_word: str
    instance_prompt: str
    method: str
    ranks: str
    parameters: int
    sha256: str
    bytes: int
    resident: bool
    uploaded: bool


class SubjectsAnswer(BaseModel):
    """All subjects."""

    subjects: list[SubjectAnswer]


class DeletedAnswer(BaseModel):
    """What was deleted."""

    name: str
    deleted: Literal[True] = True


def routes(state: State) -> APIRouter:
    """The routes of subjects."""
    router = APIRouter(prefix="/v1/subjects", tags=["subjects"])
    body = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @router.get("")
    def subjects() -> SubjectsAnswer:
        """All subjects; ``resident`` ones are loaded."""
        loaded = state.engine.resident_paths
        found = list(state.catalog.subjects.items())
        return SubjectsAnswer(subjects=[described(name, subject, loaded) for name, subject in found])

    @router.put(
        "/{name}", status_code=201, openapi_extra={"requestBody": {"required": True, "content": body}},
        responses=errors(400, 408, 409, 413, 429, 503, 507),
    )  # fmt: skip
    async def upload(name: Named, http: HttpRequest) -> SubjectAnswer:
        """Add an adapter: its safetensors file is the body."""
        uploads = state.catalog.open_uploads
        if not NAME.fullmatch(name):
            raise Refused(400, "the name of a subject has letters, digits, '_' and '-', at most 64: choose another")
        _check_free(state, name)
        path = await uploads.receive(http.stream())
        subject = await run_in_threadpool(_keep, state, uploads, path, name)
        return described(name, subject, set())

    @router.delete("/{name}", responses=errors(404, 429))
    def delete(name: str) -> DeletedAnswer:
        """Remove an uploaded adapter from the disk, and from memory when no picture at work uses it."""
        uploads = state.catalog.open_uploads
        subject = state.catalog.subjects.get(name)
        if subject is None:
            raise Refused(404, f"there is no subject {name[:80]!r}")
        if not subject.uploaded:
            raise Refused(403, f"the subject {name!r} was not uploaded: only uploaded ones can be deleted")
        with state.changing:
            if state.catalog.subjects.pop(name, None) is not None:
                state.engine.remove_subject(name)
                uploads.delete(subject.adapter)
        return DeletedAnswer(name=name)

    return router


def _keep(state: State, uploads: Uploads, path: Any, name: str) -> Subject:
    """Keep an upload; one at a time, so that two of the same name do not both find it free."""
    with state.changing:
        try:
            _check_free(state, name)
        except Refused:
            path.unlink(missing_ok=True)
            raise
        adapter, info = uploads.keep(path, name, state.engine)
        subject = Subject(adapter, info, True)
        state.engine.add_subject(adapter)
        state.catalog.subjects[name] = subject
        return subject


def _check_free(state: State, name: str) -> None:
    """Raises :class:`Refused` for a name that is taken, also in other case: on some disks their files would be one."""
    for own in list(state.catalog.subjects):
        if own.lower() == name.lower():
            raise Refused(409, f"there is a subject {own!r} already: delete it first, or choose another name")


def described(name: str, subject: Subject, loaded: set[str]) -> SubjectAnswer:
    """A subject as clients see it."""
    info = subject.info
    return SubjectAnswer(
        name=name, trigger=info.trigger, class_word=info.class_word, instance_prompt=info.instance_prompt,
        method=info.method, ranks=info.ranks, parameters=info.trained_parameters, sha256=info.sha256,
        bytes=info.bytes, resident=subject.adapter.path in loaded, uploaded=subject.uploaded,
    )  # fmt: skip
