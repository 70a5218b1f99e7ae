"""How often a client may ask."""

from __future__ import annotations

import time


class Rates:
    """A token bucket for each client: ``rate`` requests a minute on average, a sixth of a minute's at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, client: str, rate: float | None = None, now: float | None = None) -> float:
        """Count a request. The seconds that the client has to wait first; 0 if the request may be answered.

        ``rate``: the client's own, if it has one.
        """
        now = time.monotonic() if now is None else now
        rate = self._rate if rate is None else rate
        per_second, most = rate / 60, max(1.0, rate / 6)
        left, since = self._buckets.get(client, (most, now))
        left = min(most, left + (now - since) * per_second)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / per_second
