"""``/health``, ``/ready`` and ``/metrics``, for those who run the server; ``/v1/server``, for its clients."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse

from .... import __version__
from ....pipelines.base import default_guidance, default_steps, is_embedded
from ...client.values import About
from ...request import MAX_COUNT
from ..answers import Refused, errors
from ..state import State
from ..telemetry.metrics import distribution, number

START = """This is a nora-diffusion server. To make a picture:

  curl {url}v1/pictures -H 'Content-Type: application/json' \\
    -d '{{"prompt": "a red car"}}' | jq -r '.pictures[0].b64' | base64 -d > car.png

{url}v1/subjects lists the subjects, {url}openapi.json describes everything.
"""


def routes(state: State) -> APIRouter:
    """The routes of operation."""
    router = APIRouter(tags=["operation"])

    @router.get("/", include_in_schema=False)
    def start(http: HttpRequest) -> PlainTextResponse:
        """For a person who opens the address that the server printed: how to make a picture."""
        return PlainTextResponse(START.format(url=http.base_url))

    @router.get("/health")
    def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @router.get("/ready", responses=errors(503))
    def ready() -> dict[str, str]:
        """Whether requests are accepted; 503 while the server stops."""
        if not state.engine.is_open:
            raise Refused(503, "the server is being stopped", 10)
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Counters in the text format of Prometheus."""
        return PlainTextResponse(text_of(state), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/server")
    def server() -> About:
        """The base, its defaults, and the limits of a request."""
        config, base = state.config, state.config.source.base
        return About(
            version=__version__, base=config.base_name, embedded=is_embedded(base), steps=default_steps(base),
            guidance=default_guidance(base), max_steps=config.max_steps, max_side=config.max_side, max_count=MAX_COUNT,
        )  # fmt: skip

    return router


def text_of(state: State) -> str:
    """The metrics as text."""
    now = state.engine.statistics
    rows: list[tuple[str, str, str, float]] = [
        ("queue_length", "gauge", "Pictures that wait.", now.waiting),
        ("pictures_at_work", "gauge", "Pictures at work.", now.at_work),
        ("passes_total", "counter", "Passes of the denoiser.", now.passes),
        ("pass_rows_mean", "gauge", "Mean rows of a pass.", now.rows / now.passes if now.passes else 0),
        ("subjects", "gauge", "Subjects that requests may name.", len(state.catalog.subjects)),
        ("resident_subjects", "gauge", "Subjects in the pipeline.", now.resident),
        ("subject_hits_total", "counter", "Pictures' subjects that were in the pipeline.", now.hits),
        ("subject_loads_total", "counter", "Loads of subjects into the pipeline.", now.loads),
        ("held_subjects", "gauge", "Subjects in host memory.", now.held),
        ("held_bytes", "gauge", "Bytes of subjects and bases in host memory.", now.held_bytes),
        ("subject_reads_total", "counter", "Reads of subjects from their files.", now.reads),
    ]
    lines = [line for row in rows for line in number(*row)]
    lines += distribution("pass_rows", "Rows of a pass of the denoiser.", now.pass_rows)
    lines += distribution("pass_seconds", "A pass of the denoiser.", now.pass_seconds)
    return "\n".join([*lines, *state.metrics.lines()]) + "\n"
