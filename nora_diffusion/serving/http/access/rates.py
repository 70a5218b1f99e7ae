"""How often a client may ask."""

from __future__ import annotations

import time


class Rates:
    """A token bucket for each client: ``rate`` requests a minute on average, a sixth of a minute's at once."""

    def __init__(self, rate: float) -> None:
        self._per_second, self._most = rate / 60, max(1.0, rate / 6)
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, client: str, now: float | None = None) -> float:
        """Count a request. The seconds that the client has to wait first; 0 if the request may be answered."""
        now = time.monotonic() if now is None else now
        left, since = self._buckets.get(client, (self._most, now))
        left = min(self._most, left + (now - since) * self._per_second)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / self._per_second
