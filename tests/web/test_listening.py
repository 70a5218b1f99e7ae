"""What the app and the server share."""

from __future__ import annotations

import asynchronous
import pytest
from starlette.types import Message

from nora_diffusion import UserError
from nora_diffusion.web.bodies import replayed
from nora_diffusion.web.listening import bind, is_loopback


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("example", False)],
)
def test_only_loopback_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_busy_port_and_a_host_that_is_none_are_refused() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is busy"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="is busy or not allowed"):
        bind("a" * 80 + ".example", 0)


def test_a_body_that_was_read_is_sent_once_more() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def both() -> list[str]:
        again = replayed(b"x", receive)
        return [(await again())["type"], (await again())["type"]]

    assert asynchronous.run(both()) == ["http.request", "http.disconnect"]
