"""The description of the API, and that all answers are as it says, to whatever is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from nora_diffusion.serving.http.access.keys import Key, Keys

Serve = Callable[..., Any]
TOKEN = "nora-secret"


@pytest.fixture
def keyed(serve: Serve) -> Any:
    keys = Keys([Key("alice", hashlib.sha256(TOKEN.encode()).hexdigest())])
    client = serve(keys=keys, rate=1e6, max_side=16, max_steps=2, timeout=60.0)
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    return client


@pytest.mark.slow
def test_all_answers_are_as_described(keyed: Any) -> None:
    """Bodies at and beyond each limit, random ones, other methods and types, missing and wrong keys."""
    schemathesis = pytest.importorskip("schemathesis")  # not for Python 3.10
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    config = SchemathesisConfig.from_dict({
        "seed": 0, "continue-on-failure": True, "warnings": False,
        "headers": {"Authorization": f"Bearer {TOKEN}"},
        "generation": {"max-examples": 10, "deterministic": True, "database": "none"},
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2xx", "4xx", 503, 504, 507]},
            "positive_data_acceptance": {"enabled": False},  # a description cannot say which names there are
        },
        "operations": [  # A1111's clients send numbers as strings
            {"include-path": "/sdapi/v1/txt2img", "checks": {"negative_data_rejection": {"enabled": False}}},
        ],
    })  # fmt: skip
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", keyed.app, config=config, headers={"Authorization": f"Bearer {TOKEN}"}
    )
    failures, answered = list[str](), set[tuple[str, int]]()
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            cases = {key: node.value for key, node in event.recorder.cases.items()}
            for key, checks in event.recorder.checks.items():
                found = [check.failure_info.failure for check in checks if check.failure_info]
                failures += [f"{cases[key].method} {cases[key].path} {cases[key].body}: {own}" for own in found]
            for key, interaction in event.recorder.interactions.items():
                if interaction.response is not None:
                    answered.add((cases[key].path, interaction.response.status_code))
    assert not failures, "\n".join(failures)
    made = {path for path, status in answered if status == 200}
    assert {"/v1/pictures", "/v1/images/generations", "/sdapi/v1/txt2img"} <= made
    assert {status for _, status in answered} >= {200, 400, 401, 404, 405, 415}


def test_the_limits_and_keys_of_this_server(keyed: Any) -> None:
    document = keyed.get("/openapi.json").json()
    body = document["components"]["schemas"]["PicturesBody"]["properties"]
    assert body["steps"]["anyOf"][0]["maximum"] == 2 and body["width"]["anyOf"][0]["maximum"] == 16
    route = document["paths"]["/v1/pictures"]["post"]
    assert route["security"] == [{"bearer": []}, {"basic": []}]
    assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    statuses = {"200", "400", "401", "403", "408", "413", "415", "429", "500", "503", "504", "507"}
    assert set(route["responses"]) == statuses and "Retry-After" in route["responses"]["429"]["headers"]
    assert "security" not in document["paths"]["/health"]["get"]


def test_a_server_without_keys_asks_for_none(serve: Serve) -> None:
    document = serve().get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert not any("401" in own["responses"] for path in document["paths"].values() for own in path.values())


def test_the_address_of_the_server_says_how_to_go_on(serve: Serve) -> None:
    answer = serve().get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    assert "curl http://localhost/v1/pictures" in answer.text and '{"prompt": "a red car"}' in answer.text


def test_a_wrong_method_names_the_right_ones(keyed: Any) -> None:
    for path, allowed in (("/v1/pictures", "POST"), ("/v1/subjects/dog", "DELETE, PUT"), ("/v1/models", "GET")):
        answer = keyed.patch(path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed
        assert answer.json()["detail"] == f"PATCH is not possible here: use {allowed}"
