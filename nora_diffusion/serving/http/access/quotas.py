"""How many pictures a client may have in a day, counted in a file that a restart does not lose."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

from ....errors import UserError
from ....io.files import read_text, write_atomic
from ....io.untrusted import conform, parse_json

log = logging.getLogger(__name__)
DAY = 24 * 3600


class Quotas:
    """The pictures of each client on this day (UTC). ``file``: where they are kept; ``None``: in memory only.

    Pictures count when they are asked for; those that fail are given back, in the file with the next request.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._lock = file, threading.Lock()
        self._day, self._used = 0, Counter[str]()
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            values = conform(parse_json(read_text(file)), dict[str, dict[str, int]], str(file), 10**12)
            for day, used in values.items():
                self._day, self._used = int(day), Counter(used)
        except (UserError, OSError, ValueError) as error:
            log.warning("the pictures of today count from 0: %s is damaged (%s)", file, error)

    def take(self, client: str, quota: int, count: int, now: float | None = None) -> float:
        """Count pictures. The seconds until the next day if there are no more for the client; 0 if it may have them."""
        now = time.time() if now is None else now
        with self._lock:
            if (day := int(now // DAY)) > self._day:
                self._day, self._used = day, Counter()
            if self._used[client] + count > quota:
                return (self._day + 1) * DAY - now
            self._used[client] += count
            self.write()
        return 0.0

    def give_back(self, client: str, count: int) -> None:
        """Pictures that were not made do not count."""
        with self._lock:
            if client in self._used:
                self._used[client] = max(0, self._used[client] - count)

    def write(self) -> None:
        """Keep the counts. A disk that is full must not cost pictures."""
        if self._file is not None and self._day:
            try:
                write_atomic(self._file, json.dumps({str(self._day): self._used}))
            except UserError as error:
                log.error("the pictures of today are counted in memory only: %s", error)
