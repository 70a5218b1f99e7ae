"""What goes wrong between a client and a server, as sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...io.untrusted import clean, parse_json
from .address import KEY_VARIABLE

if TYPE_CHECKING:
    import httpx

MAX_SENTENCE = 300
"""Characters of a server's own sentence that are shown."""
MAX_WAIT = 24 * 3600
OTHER = "it is not a nora-diffusion server, or one of another version"


class ServerError(UserError):
    """A request that a server refused (``status``), or could not be asked. ``wait``: seconds until the next try."""

    def __init__(self, message: str, status: int | None = None, wait: int | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


def refusal(url: str, status: int, headers: Mapping[str, str], body: bytes, with_key: bool) -> ServerError:
    """The error of an answer that is not a success."""
    reason, wait = _sentence(body), _wait(headers)
    again = f"try again in {wait} s" if wait else "try again later"
    if 300 <= status < 400:
        place = short(headers.get("location", "")) or "another address"
        text = f"the server at {url} sends requests on to {place}: give that address, if you trust it"
    elif status == 401:
        text = f"the server at {url} does not know the key: ask those who run it for one" if with_key else (
            f"the server at {url} wants a key: give it in a file by --server_key FILE, or in {KEY_VARIABLE}"
        )  # fmt: skip
    elif status == 413:
        text = f"the request is too large for the server at {url}: {reason or 'send a smaller one'}"
    elif status == 429:
        text = f"the server has too many requests ({reason or 'it gives no reason'}): {again}"
    elif status in (502, 503, 504):
        text = f"the server at {url} is not available ({reason or f'status {status}'}): {again}"
    elif reason:
        text = f"the server refuses: {reason}"
    elif status in (404, 405):
        text = f"{url} has no such route: {OTHER}"
    else:
        text = f"the server at {url} answers with status {status} and no reason: {OTHER}, or its log shows why"
    return ServerError(text, status, wait)


def failure(url: str, error: httpx.HTTPError) -> ServerError:
    """The error of a request that got no answer, or not all of it."""
    import httpx

    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        text = str(error).lower()
        if "certificate" in text or "ssl" in text or "tls" in text:
            return ServerError(f"the connection to {url} cannot be made safe: {short(str(error))}; check the address")
        return ServerError(f"no server answers at {url}: start it (nora-diffusion serve), or check the address")
    if isinstance(error, httpx.TimeoutException):
        return ServerError(f"the server at {url} stopped answering: try again, or look at its log")
    if isinstance(error, httpx.ProxyError):
        return ServerError(f"the proxy on the way to {url} refuses: {short(str(error))}; set NO_PROXY to go past it")
    return gone(url)


def gone(url: str) -> ServerError:
    """The error of a connection that ended early."""
    return ServerError(f"the server at {url} ended the connection: it was stopped, or speaks no HTTP; try again later")


def odd(url: str, reason: object) -> ServerError:
    """The error of an answer that is not one of this API."""
    return ServerError(f"the answer of {url} cannot be read ({short(str(reason))}): {OTHER}")


def short(text: str) -> str:
    """Text of a server for a message."""
    text = clean(text).strip()
    return text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]} …"


def message_of(values: Any) -> str:
    """The sentence in the body of a refusal; empty if there is none."""
    error = values.get("error") if isinstance(values, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return short(message) if isinstance(message, str) else ""


def _sentence(body: bytes) -> str:
    with contextlib.suppress(ValueError):
        return message_of(parse_json(body, 1000))
    return ""


def _wait(headers: Mapping[str, str]) -> int | None:
    text = headers.get("retry-after", "")
    return min(int(text), MAX_WAIT) if text.isascii() and text.isdigit() and len(text) < 10 else None
