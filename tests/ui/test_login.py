"""The password of a shared app: guesses are limited by address and altogether, and never lock out the owner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nora_diffusion.ui.security import login
from nora_diffusion.ui.security.login import MANY_TRIES, TRIES, WINDOW, Attempts, Password

from .conftest import Server, start, visit, visitor


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(login, "time", clock)
    return clock


def guess(attempts: Attempts, address: str, times: int = 1) -> int:
    """Wrong passwords from one address. Returns how many of them are checked."""
    return sum(attempts.start(address) == 0 for _ in range(times))


@pytest.mark.usefixtures("clock")
def test_an_address_has_eight_guesses() -> None:
    attempts = Attempts()
    assert guess(attempts, "10.0.0.1", 50) == TRIES
    assert 0 < attempts.start("10.0.0.1") <= WINDOW
    assert attempts.start("10.0.0.2") == 0  # no one else is locked out


def test_the_wait_ends_even_if_the_attacker_goes_on(clock: Clock) -> None:
    attempts = Attempts()
    guess(attempts, "10.0.0.1", TRIES)
    for _ in range(59):
        clock.now += 1.0
        assert guess(attempts, "10.0.0.1", 10) == 0  # refused tries do not extend the wait
    clock.now += 1.1
    assert attempts.start("10.0.0.1") == 0


@pytest.mark.usefixtures("clock")
def test_the_right_password_resets_the_count() -> None:
    attempts = Attempts()
    for _ in range(3):
        assert guess(attempts, "10.0.0.1", TRIES - 1) == TRIES - 1
        attempts.succeed("10.0.0.1")


@pytest.mark.usefixtures("clock")
def test_many_addresses_together_are_limited_and_the_owner_is_not() -> None:
    attempts = Attempts()
    checked = [guess(attempts, f"10.0.{n // 250}.{n % 250}", TRIES) for n in range(1000)]
    assert sum(checked[:5]) == MANY_TRIES and set(checked[5:]) == {1}  # one for each address instead of eight
    assert attempts.start("192.168.0.7") == 0


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("testclient", "testclient", True),
    ],
)
def test_addresses_of_one_customer_count_together(one: str, other: str, same: bool) -> None:
    attempts = Attempts()
    guess(attempts, one, TRIES)
    assert (attempts.start(other) > 0) is same


def test_old_guesses_are_forgotten(clock: Clock) -> None:
    attempts = Attempts()
    for number in range(100):
        guess(attempts, f"10.0.0.{number}")
    clock.now += WINDOW + 1
    guess(attempts, "10.0.0.1")
    assert len(attempts._wrong) == 1


@pytest.mark.parametrize(
    ("user", "password", "right"),
    [
        ("nora", "secret", True), ("nora", "", False), ("", "secret", False), ("nora", "secret ", False),
        ("NORA", "secret", False), ("nora", "s\ud800", False), ("nora", "secret\0", False),
        ("nora", "x" * 10**6, False),
    ],
    ids=ascii,
)  # fmt: skip
def test_the_password_is_compared_as_bytes(user: str, password: str, right: bool) -> None:
    assert Password("nora", "secret")(user, password) is right


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("shared"), "--auth", "nora:secret", "--base", str(base))
    yield running
    running.stop()


def log_in(server: Server, password: str, address: str = "127.0.0.1", **headers: str) -> httpx.Response:
    """Log in from one of the addresses of the loopback network."""
    with httpx.Client(
        base_url=server.url, transport=httpx.HTTPTransport(local_address=address), headers=headers
    ) as http:
        return http.post("/login", data={"username": "nora", "password": password})


def test_wrong_passwords_lock_out_their_address_only(shared: Server) -> None:
    answers = [log_in(shared, f"wrong {n}", "127.0.0.2").status_code for n in range(TRIES + 2)]
    assert answers == [400] * TRIES + [429] * 2
    refused = log_in(shared, "secret", "127.0.0.2")
    assert refused.status_code == 429 and "try again in" in refused.text
    assert 0 < int(refused.headers["retry-after"]) <= WINDOW
    assert log_in(shared, "secret", "127.0.0.3").status_code == 200


def test_a_client_cannot_choose_its_address(shared: Server) -> None:
    names = ("x-forwarded-for", "forwarded", "x-real-ip", "cf-connecting-ip", "x-client-ip")
    answers = []
    for number in range(TRIES + 4):
        value = f"10.0.0.{number}"
        headers = {name: f"for={value}" if name == "forwarded" else value for name in names}
        answers.append(log_in(shared, "wrong", "127.0.0.4", **headers).status_code)
    assert answers == [400] * TRIES + [429] * 4


def test_without_a_password_nothing_is_shown(shared: Server) -> None:
    with shared.client() as http:
        for path in ("/config", "/gradio_api/file=/etc/passwd", "/gradio_api/queue/data?session_hash=x"):
            assert http.get(path).status_code == 401, path
        assert "Generate" not in http.get("/").text
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"):
            assert http.post(path, json={"data": []}).status_code in (400, 401, 422), path
        for path in ("/gradio_api/token", "/gradio_api/user", "/gradio_api/app_id"):
            assert http.get(path).status_code == 404, path


def test_a_token_cannot_be_chosen_before_logging_in(shared: Server) -> None:
    """Session fixation: a cookie that someone else set is worth nothing after the owner logs in."""
    with shared.client() as http:
        http.cookies.set("access-token", "chosen")
        answer = http.post("/login", data={"username": "nora", "password": "secret"})
        assert answer.status_code == 200
        cookies = answer.headers.get_list("set-cookie")
        assert cookies and all("chosen" not in c and "httponly" in c.lower() for c in cookies)
        names = [cookie.partition("=")[0] for cookie in cookies]
    with shared.client() as other:
        for name in names:
            other.cookies.set(name, "chosen")
        assert other.get("/config").status_code == 401


def test_the_login_page_works_under_the_headers(shared: Server, browser: Any) -> None:
    with visitor(browser) as page:
        page.goto(shared.url)
        page.get_by_text("wait a minute").wait_for()
        page.get_by_label("username").fill("nora")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#generate")
        visit(page, shared.url)
