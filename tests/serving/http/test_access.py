"""Keys, rates, hosts and origins, the metrics and the log."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import UserError
from nora_diffusion.cli import main
from nora_diffusion.serving.http import gate
from nora_diffusion.serving.http.access.keys import Keys, new_key, read_keys
from nora_diffusion.serving.http.access.rates import Rates
from nora_diffusion.serving.http.config import ServeConfig

Serve = Callable[..., Any]
SMALL = {"prompt": "a secret car", "steps": 2, "width": 16, "height": 16}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_each_request_needs_a_key(serve: Serve, tmp_path: Path) -> None:
    token = new_key(tmp_path / "keys", "alice")
    client = serve(keys=Keys(read_keys(tmp_path / "keys")))
    for path in ("/v1/models", "/v1/subjects", "/metrics", "/openapi.json", "/sdapi/v1/loras", "/nowhere"):
        for headers in ({}, bearer("nora-wrong"), bearer(""), {"Authorization": "Basic !"}):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert client.get("/v1/models", headers=bearer(token)).status_code == 200
    basic = base64.b64encode(f"anyone:{token}".encode()).decode()
    assert client.get("/sdapi/v1/loras", headers={"Authorization": f"Basic {basic}"}).status_code == 200
    assert client.get("/v1/models", headers={**bearer(token), "Host": "pictures.example"}).status_code == 200


def test_the_key_is_the_client_of_the_engine(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = new_key(tmp_path / "keys", "alice")
    client, clients = serve(keys=Keys(read_keys(tmp_path / "keys"))), list[str]()
    submit = client.state.engine.submit
    monkeypatch.setattr(client.state.engine, "submit", lambda own: (clients.append(own.client), submit(own))[1])
    for path in ("/v1/pictures", "/v1/images/generations", "/sdapi/v1/txt2img"):
        body = {**SMALL, "size": "16x16"} if "images" in path else SMALL
        assert client.post(path, json=body, headers=bearer(token)).status_code == 200
    assert clients == ["alice"] * 3


def test_a_key_has_a_rate(serve: Serve, tmp_path: Path) -> None:
    one, two = (bearer(new_key(tmp_path / "keys", name)) for name in ("one", "two"))
    client = serve(keys=Keys(read_keys(tmp_path / "keys")), rate=0.1)
    assert client.post("/v1/pictures", json=SMALL, headers=one).status_code == 200
    refused = client.post("/v1/pictures", json=SMALL, headers=one)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 300
    assert client.get("/v1/models", headers=one).status_code == 200
    assert client.post("/v1/pictures", json=SMALL, headers=two).status_code == 200


def test_the_bucket_fills_again() -> None:
    rates = Rates(60)
    assert [rates.wait("a", 0.0) for _ in range(11)] == [0] * 10 + [1.0]
    assert rates.wait("a", 1.0) == 0 and rates.wait("a", 1.0) == 1.0 and rates.wait("b", 1.0) == 0


def test_the_file_of_keys_has_hashes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert main(["serve", "--keys", str(file), "--new_key", "alice"]) == 0
    token = capsys.readouterr().out.strip()
    assert token not in file.read_text() and Keys(read_keys(file)).owner(f"Bearer {token}") == "alice"
    assert file.stat().st_mode & 0o077 == 0
    for words in (
        ["--new_key", "bob"],
        ["--keys", str(file), "--new_key", "alice"],
        ["--keys", str(file), "--new_key", "a b"],
    ):
        assert main(["serve", *words]) == 2
    file.write_text("alice 123\n")
    with pytest.raises(UserError, match="line 1 is not a name and a SHA-256"):
        read_keys(file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com"])
def test_other_machines_need_keys(host: str) -> None:
    with pytest.raises(UserError, match="add --keys"):
        ServeConfig(host=host).check()
    ServeConfig(host=host, keys="file").check()


def test_without_keys_only_programs_of_this_machine_are_served(serve: Serve) -> None:
    client = serve()
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 403, headers
    for headers in (
        {"Host": "127.0.0.1:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "localhost:1", "Origin": "http://localhost:1"},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 200, headers


def test_metrics_and_log(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, lines = serve(), list[str]()
    monkeypatch.setattr(gate.log, "info", lines.append)
    client.post("/v1/pictures", json={**SMALL, "prompt": "a secret <lora:dog>", "sampler": "ddim"})
    client.post("/v1/pictures", json={**SMALL, "prompt": "a secret <lora:dig>"})
    found = [json.loads(line) for line in lines]
    assert [(own["path"], own["status"]) for own in found] == [("/v1/pictures", 200), ("/v1/pictures", 400)]
    assert "secret" not in str(lines)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert (values["nora_pictures_total"], values["nora_passes_total"], values["nora_pass_rows_mean"]) == (
        "1",
        "2",
        "2.0",
    )
    assert values["nora_resident_subjects"] == values["nora_subject_loads_total"] == "1"
    assert values['nora_requests_total{status="400"}'] == "1" and values["nora_queue_length"] == "0"
