"""Keys, rates, hosts and origins, the metrics and the log."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nora_diffusion import UserError
from nora_diffusion.cli import main
from nora_diffusion.serving.http.access import quotas
from nora_diffusion.serving.http.access.keys import Keys, new_key, read_keys
from nora_diffusion.serving.http.access.quotas import Quotas
from nora_diffusion.serving.http.access.rates import Rates
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.waiting import FairQueue

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
    assert [rates.wait("a", now=0.0) for _ in range(11)] == [0] * 10 + [1.0]
    assert rates.wait("a", now=1.0) == 0 and rates.wait("a", now=1.0) == 1.0 and rates.wait("b", now=1.0) == 0
    assert [rates.wait("c", 6, 0.0), rates.wait("c", 6, 0.0)] == [0, 10.0]  # a rate of its own


def test_the_file_of_keys_has_hashes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert main(["serve", "--keys", str(file), "--new_key", "alice"]) == 0
    token = capsys.readouterr().out.strip()
    assert token not in file.read_text() and Keys(read_keys(file)).owner(f"Bearer {token}") == read_keys(file)[0]
    assert file.stat().st_mode & 0o077 == 0
    assert main(["serve", "--keys", str(tmp_path / "none")]) == 2 and "by --new_key NAME" in capsys.readouterr().err
    for words in (
        ["--new_key", "bob"],
        ["--keys", str(file), "--new_key", "alice"],
        ["--keys", str(file), "--new_key", "a b"],
    ):
        assert main(["serve", *words]) == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("alice 123", "line 2: it is not a name, a SHA-256"),
        (f"a,b {'0' * 64}", "line 2: it is not a name"),
        (f"bob {'0' * 64}", "line 2: there is a key 'bob' already"),
        (f"alice {'0' * 64} weight=heavy", "'weight=heavy' is not a number"),
        (f"alice {'0' * 64} weight=nan", "weight=nan is out of range"),
        (f"alice {'0' * 64} quota=1.5", "'quota=1.5' is not a number"),
        (f"alice {'0' * 64} quota=-1", "quota=-1 is out of range"),
        (f"alice {'0' * 64} rate=0", "rate=0.0 is out of range"),
        (f"alice {'0' * 64} weight=1 weight=2", "'weight=2' is unknown or repeated"),
        (f"alice {'0' * 64} color=1", "'color=1' is unknown or repeated"),
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else "",
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob {'1' * 64} weight=2 rate=60 quota=10\n{line}\n")
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_keys(file)


def test_new_keys_with_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\nbob {'1' * 64}  weight=3")
    limits = ["--weight", "0.5", "--rate", "30", "--quota", "1000000000"]
    assert main(["serve", "--keys", str(file), "--new_key", "alice", *limits]) == 0
    assert file.read_text().startswith(f"# of the team\nbob {'1' * 64}  weight=3\nalice ")  # no other line changes
    bob, alice = read_keys(file)
    assert (bob.weight, bob.rate, bob.quota) == (3, None, None)
    assert (alice.weight, alice.rate, alice.quota) == (0.5, 30, 10**9)
    for wrong in (["--quota", "-1"], ["--weight", "0"], ["--rate", "nan"]):
        assert main(["serve", "--keys", str(file), "--new_key", "carol", *wrong]) == 2
    assert len(read_keys(file)) == 2
    assert main(["serve", "--keys", str(file), "--weight", "2"]) == 2 and "add --new_key" in capsys.readouterr().err


def test_the_file_of_keys_is_read_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    one = bearer(new_key(file, "one"))
    client, weights = serve(keys=Keys.of(file)), list[dict[str, float]]()
    monkeypatch.setattr(client.state.engine, "set_weights", weights.append)

    def status(headers: dict[str, str]) -> int:
        return int(client.get("/v1/models", headers=headers).status_code)

    assert status(one) == 200 and weights == []
    two = bearer(new_key(file, "two", weight=2.0))
    assert status(two) == 200 and weights == [{"one": 1.0, "two": 2.0}]
    good = file.read_text()
    for damage in (good + "three 12\n", "", "\n# nothing\n"):
        file.write_text(damage)
        assert status(one) == status(two) == 200
    assert len([own for own in caplog.records if own.levelname == "ERROR"]) == 3  # once each
    assert "line 3: it is not a name" in caplog.text
    file.unlink()
    assert status(one) == 200
    file.write_text(good.splitlines()[1] + "\n")
    assert status(one) == 401 and status(two) == 200 and weights[-1] == {"two": 2.0}


def test_weights_reach_what_waits() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for name in ("one", "two"):
        queue.put([name] * 20, name, 1.0)
    queue.set_weights({"two": 3.0})
    first = [queue.take() for _ in range(20)]
    assert first.count("two") == 15


def test_a_key_has_a_quota(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 20_000 * 86_400.0 + 86_000
    monkeypatch.setattr(quotas, "time", SimpleNamespace(time=lambda: now))
    token, free = bearer(new_key(tmp_path / "keys", "one", quota=4)), bearer(new_key(tmp_path / "keys", "two"))
    client = serve(keys=Keys.of(tmp_path / "keys"))
    client.state.quotas = Quotas(tmp_path / "keys.used")

    def ask(count: int = 1, headers: dict[str, str] = token, **more: Any) -> Any:
        return client.post("/v1/pictures", json={**SMALL, "count": count, **more}, headers=headers)

    assert ask(3).status_code == 200
    refused = ask(2)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "400"
    assert "may have 4 pictures a day" in refused.json()["detail"]
    for _ in range(2):  # what was not made does not count
        assert ask(1, prompt="a <lora:dig>").status_code == 400
        assert ask(1, steps=150, timeout=0.001).status_code == 504
    client.state.quotas.write()
    client.state.quotas = Quotas(tmp_path / "keys.used")  # a restart
    assert ask(2).status_code == 429
    assert client.post("/sdapi/v1/txt2img", json=SMALL, headers=token).status_code == 200
    assert client.post("/v1/images/generations", json={"prompt": "a car"}, headers=token).status_code == 429
    assert ask(5, headers=free).status_code == 200
    now += 400
    assert ask(4).status_code == 200 and ask(1).status_code == 429


@pytest.mark.parametrize("text", ["", "{", '{"20000": {"one": "many"}}', '{"today": {}}', "[1]"])
def test_damaged_counts_start_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "used").write_text(text)
    counts = Quotas(tmp_path / "used")
    assert "count from 0" in caplog.text and counts.take("one", 1, 1) == 0 < counts.take("one", 1, 1)
    assert Quotas(tmp_path / "used").take("one", 1, 1) > 0


def test_counts_go_on_without_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    counts = Quotas(tmp_path / "file" / "used")
    assert counts.take("one", 1, 1) == 0 < counts.take("one", 1, 1) and "in memory only" in caplog.text


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
