"""Traces by OpenTelemetry, if it is asked for: a span for each request, with its waiting and making inside."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ....errors import UserError

log = logging.getLogger(__name__)
NAME = "nora_diffusion.serving"
ASKING = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Environment variables that ask for traces; OpenTelemetry's own say where they go."""
OTLP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Tracing:
    """Spans of requests; without a provider it does nothing. ``end`` sends what is left."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(NAME) if provider else None

    def begin(self, method: str, route: str, headers: Mapping[str, str]) -> Any:
        """The span of a request, which may be a part of its client's trace; ``None`` without tracing.

        ``route``: its template, because spans are grouped by their names; empty for a path that there is not.
        """
        if self._tracer is None:
            return None
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        attributes = {"http.request.method": method, "http.route": route}
        return self._tracer.start_span(f"{method} {route}".strip(), extract(headers), SpanKind.SERVER, attributes)

    def part(self, parent: Any, name: str, index: int, begin: float, end: float) -> None:
        """A part of a request, of picture ``index``: from ``begin`` to ``end``, as ``time.monotonic`` has them."""
        if self._tracer is None or parent is None:
            return
        from opentelemetry.trace import set_span_in_context

        offset = time.time() - time.monotonic()
        first, last = (int((moment + offset) * 1e9) for moment in (begin, end))
        span = self._tracer.start_span(
            name, set_span_in_context(parent), attributes={"nora.picture": index}, start_time=first
        )
        span.end(last)

    def finish(self, span: Any, status: int, client: str) -> None:
        """End the span of a request."""
        if span is None:
            return
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("nora.client", client)
        if status >= 500:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end()

    def end(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def tracing(wanted: bool, environment: Mapping[str, str] = os.environ) -> Tracing:
    """Traces if they are ``wanted``, or if the environment asks for them.

    Raises :class:`UserError` if they are wanted and a package is missing; without the flag that is a warning.
    """
    asked = any(environment.get(name, "none") not in ("", "none") for name in ASKING)
    if not (wanted or asked) or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    try:
        return Tracing(_provider(environment))
    except ImportError as error:
        sentence = f"traces need more packages ({error}): pip install opentelemetry-sdk opentelemetry-exporter-otlp"
        if wanted:
            raise UserError(sentence) from error
        log.warning("%s", sentence)
        return Tracing()


def _provider(environment: Mapping[str, str]) -> Any:
    resources, sdk = import_module("opentelemetry.sdk.resources"), import_module("opentelemetry.sdk.trace")
    export = import_module("opentelemetry.sdk.trace.export")
    resource = resources.Resource.create({"service.name": environment.get("OTEL_SERVICE_NAME", "nora-diffusion")})
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    if environment.get("OTEL_TRACES_EXPORTER") == "console":
        provider.add_span_processor(export.SimpleSpanProcessor(export.ConsoleSpanExporter(out=sys.stderr)))
    else:
        provider.add_span_processor(export.BatchSpanProcessor(import_module(OTLP).OTLPSpanExporter()))
    return provider
