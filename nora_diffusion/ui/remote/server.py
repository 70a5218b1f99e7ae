"""What the app remembers about its server, so that pages open at once, also while the server is away."""

from __future__ import annotations

import logging
import threading
import time

from ...errors import UserError
from ...serving.client import About, Client, Subject

log = logging.getLogger(__name__)
FRESH_SECONDS = 5.0
"""How long an answer is used again; also how long a server that does not answer is left in peace."""


class Server:
    """A server with its description and subjects, which are asked for again when they are needed and old.

    Raises :class:`.ServerError` if the server cannot be used when the app starts.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        if client.with_key and not client.is_encrypted and not client.on_loopback:
            log.warning("the key is sent to %s without encryption: others on the way can read it", client.url)
        self._lock = threading.Lock()
        self._about, self._subjects = client.about(), client.subjects()
        self._asked = time.monotonic()

    @property
    def about(self) -> About:
        """What the server said last about itself."""
        self._refresh()
        return self._about

    @property
    def subjects(self) -> list[Subject]:
        """The subjects that it named last."""
        self._refresh()
        return self._subjects

    def _refresh(self) -> None:
        """Ask again if it is time, and nobody else does: a server that hangs keeps one page waiting, not all."""
        if time.monotonic() < self._asked + FRESH_SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._ask()
        except UserError as error:
            log.warning("%s; the page shows what it said last", error)
        finally:
            self._lock.release()

    def _ask(self) -> None:
        try:
            self._about, self._subjects = self.client.about(), self.client.subjects()
        finally:
            self._asked = time.monotonic()
