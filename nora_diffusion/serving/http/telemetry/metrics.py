"""Counters and histograms of a server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from ...histogram import Histogram

MAX_LABELS = 100
"""Subjects that are counted by name; the others are counted together, so that the metrics stay small."""
OTHERS = "(others)"


class Metrics:
    """What has happened since the server started. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests, self._subjects, self._errors = Counter[str](), Counter[str](), Counter[str]()
        self._pictures = 0
        self._waits, self._steps, self._durations = Histogram(), Histogram(), Histogram()

    def answered(self, status: int) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[str(status)] += 1

    def waited(self, seconds: float) -> None:
        """A picture started after so long in the queue."""
        with self._lock:
            self._waits = self._waits.with_value(seconds)

    def stepped(self, seconds: float) -> None:
        """A picture made a step."""
        with self._lock:
            self._steps = self._steps.with_value(seconds)

    def finished(self, seconds: float, subjects: Sequence[str]) -> None:
        """A picture of these subjects was finished, so long after its request came."""
        with self._lock:
            self._pictures += 1
            self._durations = self._durations.with_value(seconds)
            for name in subjects:
                known = name in self._subjects or len(self._subjects) < MAX_LABELS
                self._subjects[name if known else OTHERS] += 1

    def failed(self, reason: str) -> None:
        """A picture failed."""
        with self._lock:
            self._errors[reason] += 1

    def lines(self) -> Iterator[str]:
        """All of them."""
        with self._lock:
            yield from number("pictures_total", "counter", "Pictures that were finished.", self._pictures)
            yield from _labeled("picture_errors_total", "Pictures that failed.", "reason", self._errors)
            yield from _labeled("requests_total", "Answered requests.", "status", self._requests)
            yield from _labeled("subject_pictures_total", "Pictures of a subject.", "subject", self._subjects)
            yield from distribution("wait_seconds", "From a request to the start of a picture.", self._waits)
            yield from distribution("step_seconds", "A step of a picture, which shares its passes.", self._steps)
            yield from distribution("picture_seconds", "From a request to a finished picture.", self._durations)


def number(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    """The lines of a single number."""
    yield from _family(name, kind, text, ("", str(value)))


def distribution(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    """The lines of a histogram: each bucket counts the values of those before it as well."""
    yield from _heading(name, "histogram", text)
    below = 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        yield f'nora_{name}_bucket{{le="{bound}"}} {below}'
    yield f"nora_{name}_sum {histogram.sum}"
    yield f"nora_{name}_count {below}"


def _heading(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP nora_{name} {text}"
    yield f"# TYPE nora_{name} {kind}"


def _family(name: str, kind: str, text: str, *rows: Sequence[str]) -> Iterator[str]:
    yield from _heading(name, kind, text)
    for labels, value in rows:
        yield f"nora_{name}{labels} {value}"


def _labeled(name: str, text: str, label: str, counts: Counter[str]) -> Iterator[str]:
    rows = [(f'{{{label}="{_escaped(value)}"}}', str(count)) for value, count in sorted(counts.items())]
    yield from _family(name, "counter", text, *rows)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
