"""The client: one server, asked over HTTP or HTTPS."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ... import __version__
from ...errors import UserError
from ...io.untrusted import parse_json
from ...web.listening import is_loopback
from .address import check_address
from .events import Failed, Made
from .failures import ServerError, failure, odd, refusal
from .stream import Stream
from .values import About, Subject, read

if TYPE_CHECKING:
    import httpx

MAX_ANSWER = 16 * 2**20
"""Bytes of the largest answer that is not a picture: a list of 20,000 subjects."""
MAX_VALUES = 400_000
CONNECT_SECONDS, ANSWER_SECONDS, SILENCE_SECONDS = 10.0, 15.0, 75.0
"""Largest waits: for a connection, for an answer, and for bytes of a stream, of which there are some every 15 s."""


class Client:
    """Asks a server for pictures. May be used by several threads.

    ``url``: ``http://HOST:PORT`` or ``https://HOST``. ``key``: an API key; it is sent to this address only, as
    redirects are refused, and is in no message. Raises :class:`UserError` for an invalid address.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        httpx = _httpx()
        self.url, self.with_key = check_address(url), key is not None
        self.on_loopback = is_loopback(urlsplit(self.url).hostname or "")
        self.is_encrypted = self.url.startswith("https:")
        headers = {"Accept-Encoding": "identity", "User-Agent": f"nora-diffusion/{__version__}"}
        self._settings: dict[str, Any] = {
            "base_url": f"{self.url}/", "headers": headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            "follow_redirects": False, "verify": httpx.create_ssl_context(),
            "trust_env": not self.on_loopback,  # no proxy leads to this machine
        }  # fmt: skip
        try:
            self._http = httpx.Client(timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS), **self._settings)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"the address {self.url} cannot be used: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept. Streams have their own."""
        self._http.close()

    def about(self) -> About:
        """What the server is. Raises :class:`ServerError`."""
        try:
            return read(About, self._get("v1/server"))
        except ServerError:
            raise
        except ValueError as error:
            raise odd(self.url, error) from None

    def subjects(self) -> list[Subject]:
        """The subjects that a request may name, by tags in its prompt. Raises :class:`ServerError`."""
        values = self._get("v1/subjects")
        try:
            return [read(Subject, value) for value in values["subjects"]]
        except (KeyError, TypeError, ValueError) as error:
            raise odd(self.url, error) from None

    def stream(self, **values: Any) -> Stream:
        """Ask for pictures: the events of ``POST /v1/pictures``, whose fields ``values`` are. Does not wait.

        For example ``prompt``, ``negative_prompt``, ``seed``, ``steps``, ``guidance``, ``width``, ``height`` and
        ``count``.
        """
        httpx = _httpx()
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        body = {**values, "stream": True, "format": "png"}
        return Stream(lambda: httpx.AsyncClient(timeout=timeout, **self._settings), self.url, body)

    def pictures(self, **values: Any) -> list[Made]:
        """Ask for pictures as :meth:`stream` does, and wait for all of them. Raises :class:`ServerError`."""
        made = []
        with self.stream(**values) as stream:
            for event in stream:
                if isinstance(event, Failed):
                    raise ServerError(event.message, event.status)
                made += [event] if isinstance(event, Made) else []
        return sorted(made, key=lambda own: own.index)

    def _get(self, path: str) -> Any:
        import httpx

        try:
            with self._http.stream("GET", path, headers={"Accept": "application/json"}) as answer:
                body = self._body(answer)
        except httpx.HTTPError as error:
            raise failure(self.url, error) from None
        if answer.status_code != 200:
            raise refusal(self.url, answer.status_code, answer.headers, body, self.with_key)
        try:
            return parse_json(body, MAX_VALUES)
        except ValueError as error:
            raise odd(self.url, error) from None

    def _body(self, answer: httpx.Response) -> bytes:
        """The body, within limits of size and time."""
        body, end = bytearray(), time.monotonic() + ANSWER_SECONDS
        for chunk in answer.iter_raw():
            body += chunk
            if len(body) > MAX_ANSWER:
                raise odd(self.url, "it is too large")
            if time.monotonic() > end:
                raise odd(self.url, "it takes too long")
        return bytes(body)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise UserError("a client of a server needs httpx: pip install 'nora-diffusion[app]'") from error
    return httpx
