"""The log, the metrics and the traces."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import UserError
from nora_diffusion.serving import pictures
from nora_diffusion.serving.histogram import Histogram
from nora_diffusion.serving.http import gate
from nora_diffusion.serving.http.access.keys import Keys, new_key
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.telemetry import metrics
from nora_diffusion.serving.http.telemetry.metrics import Metrics
from nora_diffusion.serving.http.telemetry.tracing import Tracing, tracing
from nora_diffusion.serving.tickets import Cancelled, Closed, Late

Serve = Callable[..., Any]
SMALL = {"prompt": "a secret car", "steps": 3, "width": 16, "height": 16, "sampler": "ddim"}


def ask(client: Any, **more: Any) -> int:
    return int(client.post("/v1/pictures", json={**SMALL, **more}).status_code)


@pytest.mark.parametrize("prompts", [False, True])
def test_the_log(serve: Serve, monkeypatch: pytest.MonkeyPatch, prompts: bool) -> None:
    client, lines = serve(log_prompts=prompts), list[str]()
    monkeypatch.setattr(gate.log, "info", lines.append)
    assert ask(client, prompt="a secret\ncar <lora:dog>", negative_prompt="blue") == 200
    assert ask(client, prompt="a secret <lora:dig>") == 400
    assert client.get("/v1/nowhere").status_code == 404
    found = [json.loads(line) for line in lines]
    assert [(own["path"], own["status"]) for own in found] == [
        ("/v1/pictures", 200), ("/v1/pictures", 400), ("/v1/nowhere", 404),
    ]  # fmt: skip
    assert all(datetime.fromisoformat(own["time"]).tzinfo for own in found)
    if prompts:
        assert (found[0]["prompt"], found[0]["negative_prompt"]) == ("a secret\ncar <lora:dog>", "blue")
        assert found[1]["prompt"] == "a secret <lora:dig>" and "prompt" not in found[2]
    else:
        assert "secret" not in str(lines) and "blue" not in str(lines)
    assert not ServeConfig().log_prompts


def values_of(client: Any) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_the_metrics(serve: Serve, library: Path) -> None:
    client = serve()
    hat = base64.b64encode((library / "other/hat/nora_adapter.safetensors").read_bytes()).decode()
    assert ask(client, prompt="a dog <lora:dog>") == ask(client, subjects={"dog": 1, "cat": 0.5}, count=2) == 200
    assert ask(client, adapters={"hat": hat}) == 200
    assert ask(client, prompt="a <lora:dig>") == 400 and ask(client, steps=150, timeout=0.001) == 504
    values = values_of(client)
    assert values["nora_pictures_total"] == 4 and values['nora_picture_errors_total{reason="late"}'] == 1
    assert values['nora_subject_pictures_total{subject="dog"}'] == 3
    assert values['nora_subject_pictures_total{subject="cat"}'] == 2
    assert not any("hat" in name for name in values)  # an adapter of one request
    assert values['nora_requests_total{status="200"}'] == 3 and values['nora_requests_total{status="400"}'] == 1
    assert values["nora_step_seconds_count"] >= 4 * 2 and values["nora_wait_seconds_count"] >= 4
    assert values["nora_picture_seconds_count"] == values['nora_picture_seconds_bucket{le="+Inf"}'] == 4
    assert values["nora_picture_seconds_sum"] > values["nora_wait_seconds_sum"] >= 0
    assert values["nora_queue_length"] == values["nora_pictures_at_work"] == 0
    assert values["nora_pass_rows_count"] == values["nora_pass_seconds_count"] == values["nora_passes_total"]
    assert values["nora_pass_rows_sum"] / values["nora_passes_total"] == values["nora_pass_rows_mean"]
    assert values["nora_passes_total"] > 0 and values["nora_pass_rows_mean"] >= 2 and values["nora_subjects"] == 2


def test_the_text_of_the_metrics_is_that_of_prometheus(serve: Serve) -> None:
    client = serve()
    client.state.metrics.finished(1.0, ['a"b\\c\nd'])
    text = client.get("/metrics").text
    assert '{subject="a\\"b\\\\c\\nd"} 1' in text
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["nora_step_seconds"].type == "histogram" and families["nora_passes"].type == "counter"
    assert [sample.labels for sample in families["nora_subject_pictures"].samples] == [{"subject": 'a"b\\c\nd'}]


def test_a_histogram_counts_up() -> None:
    one, two = Histogram((1.0, 2.0)), Histogram((1.0, 2.0)).with_value(1.5)
    for value in (0.5, 1.0, 9.0):
        one = one.with_value(value)
    assert [*metrics.distribution("x", "X.", one + two)][2:] == [
        'nora_x_bucket{le="1.0"} 2', 'nora_x_bucket{le="2.0"} 3', 'nora_x_bucket{le="+Inf"} 4', "nora_x_sum 12.0",
        "nora_x_count 4",
    ]  # fmt: skip


def test_many_subjects_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 2)
    counts = Metrics()
    for name in "abcda":
        counts.finished(1.0, [name])
    lines = [line for line in counts.lines() if line.startswith("nora_subject_pictures_total")]
    assert [line.partition("=")[2] for line in lines] == ['"(others)"} 2', '"a"} 2', '"b"} 1']


def test_pictures_fail_for_a_reason(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    for error in (Cancelled("x"), Late("x"), Closed("x"), UserError("x"), KeyError("x"), KeyError("y")):
        monkeypatch.setattr(pictures, "sample_images", lambda *_, own=error: (_ for _ in ()).throw(own))
        assert ask(client) >= 400
    errors = {name.partition('"')[2][:-2]: value for name, value in values_of(client).items() if "errors" in name}
    assert errors == {"cancelled": 1, "late": 1, "stopped": 1, "refused": 1, "fault": 2}


@pytest.fixture
def spans() -> Any:
    """``(tracing, exporter)``: spans are kept in memory."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(pytest.importorskip("opentelemetry.sdk.trace.export").SimpleSpanProcessor(memory))
    return Tracing(provider), memory


def test_the_spans_of_a_request(serve: Serve, spans: Any, tmp_path: Path) -> None:
    token = new_key(tmp_path / "keys", "alice")
    client = serve(keys=Keys.of(tmp_path / "keys"))
    client.state.tracing, memory = spans
    client.headers["Authorization"] = f"Bearer {token}"
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    client.headers["traceparent"] = f"00-{trace}-{parent}-01"
    assert ask(client, count=2) == 200
    *parts, request = memory.get_finished_spans()
    assert request.name == "POST /v1/pictures" and request.kind.name == "SERVER"
    assert format(request.context.trace_id, "032x") == trace and format(request.parent.span_id, "016x") == parent
    assert request.attributes["http.response.status_code"] == 200 and request.attributes["nora.client"] == "alice"
    assert "secret" not in str([span.to_json() for span in memory.get_finished_spans()])
    assert {(span.name, span.attributes["nora.picture"]) for span in parts} == {
        ("queue", 0), ("making", 0), ("queue", 1), ("making", 1),
    }  # fmt: skip
    for span in parts:
        assert span.parent.span_id == request.context.span_id and span.start_time <= span.end_time
    memory.clear()
    for path, name in (("/v1/subjects/dog", "DELETE /v1/subjects/{name}"), ("/secret/x", "DELETE")):
        client.delete(path)
        assert memory.get_finished_spans()[-1].name == name
    memory.clear()
    assert ask(client, steps=150, timeout=0.001) == 504
    assert memory.get_finished_spans()[-1].status.status_code.name == "ERROR"


def test_traces_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for environment in (
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    ):
        assert tracing(False, environment).begin("GET", "/", {}) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    assert tracing(False, {"OTEL_TRACES_EXPORTER": "console"}).begin("GET", "/", {}) is None
    with pytest.raises(UserError, match="pip install opentelemetry-sdk"):
        tracing(True, {})


def test_traces_by_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    traces = tracing(False, {"OTEL_TRACES_EXPORTER": "console", "OTEL_SERVICE_NAME": "mine"})
    traces.finish(traces.begin("GET", "/ready", {}), 200, "")
    traces.end()
    span = json.loads(capsys.readouterr().err)
    assert span["name"] == "GET /ready" and span["resource"]["attributes"]["service.name"] == "mine"
