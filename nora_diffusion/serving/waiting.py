"""The pictures that wait for their start, in a fair order of clients."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


class Full(Exception):
    """The queue has no room. ``waiting``: how many items wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} pictures are waiting")
        self.waiting = waiting


@dataclass(order=True)
class _Entry(Generic[T]):
    rank: int
    number: int
    item: T = field(compare=False)
    cost: float = field(compare=False)


@dataclass
class _Client(Generic[T]):
    weight: float
    entries: list[_Entry[T]] = field(default_factory=list)
    end: float = 0.0


class FairQueue(Generic[T]):
    """A bounded queue in the order of start-time fair queueing (Goyal, Vin, Cheng 1996).

    The next item of a client starts at the virtual time ``S = max(v, F)``, and then ``v = S`` and ``F = S + c / w`` for
    its cost ``c`` and the client's weight ``w``. The client with the lowest ``S`` is next, so that clients that wait
    share the engine by their weights, however much each of them sends. Among a client's own items a higher priority
    goes first, then the older one.
    """

    def __init__(self, most: int, weights: Mapping[str, float] | None = None) -> None:
        self.most, self._weights = most, dict(weights or {})
        self._lock = threading.Lock()
        self._clients: dict[str, _Client[T]] = {}
        self._now = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return sum(len(client.entries) for client in self._clients.values())

    def put(self, items: Sequence[T], client: str, cost: float, priority: int = 0) -> None:
        """Add all items, or none; ``cost``: of each. Raises :class:`Full`."""
        with self._lock:
            if (waiting := self._count()) + len(items) > self.most:
                raise Full(waiting)
            own = self._clients.setdefault(client, _Client(self._weights.get(client, 1.0)))
            for item in items:
                heapq.heappush(own.entries, _Entry(-priority, next(self._numbers), item, cost))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Other weights from now on, also for what waits."""
        with self._lock:
            self._weights = dict(weights)
            for name, client in self._clients.items():
                client.weight = self._weights.get(name, 1.0)

    def take(self) -> T | None:
        """The next item, which leaves the queue; ``None`` if there is none."""
        with self._lock:
            if (client := self._next()) is None:
                return None
            entry = client.entries[0]
            self._start(client, entry)
            return entry.item

    def first(self) -> T | None:
        """The next item, which stays; ``None`` if there is none."""
        with self._lock:
            return None if (client := self._next()) is None else client.entries[0].item

    def start(self, item: T) -> bool:
        """Take an item that was the first one a moment ago; whether it was there."""
        with self._lock:
            if (found := self._find(item)) is None:
                return False
            self._start(*found)
            return True

    def _next(self) -> _Client[T] | None:
        waiting = [client for client in self._clients.values() if client.entries]
        return min(waiting, key=lambda own: (max(self._now, own.end), own.entries[0].number), default=None)

    def _start(self, client: _Client[T], entry: _Entry[T]) -> None:
        _drop(client, entry)
        self._now = max(self._now, client.end)
        client.end = self._now + entry.cost / client.weight
        self._forget()

    def _find(self, item: T) -> tuple[_Client[T], _Entry[T]] | None:
        pairs = ((client, entry) for client in self._clients.values() for entry in client.entries)
        return next(((client, entry) for client, entry in pairs if entry.item is item), None)

    def places(self, items: Sequence[T]) -> list[int]:
        """The place of each item in the present order, 1 for the next one; 0 for an item that does not wait."""
        with self._lock:
            order = sorted(found for client in self._clients.values() for found in self._starts(client))
        numbers = {id(entry.item): place for place, (*_, entry) in enumerate(order, 1)}
        return [numbers.get(id(item), 0) for item in items]

    def _starts(self, client: _Client[T]) -> Iterator[tuple[float, int, _Entry[T]]]:
        """When the items of a client start, if nothing else comes; and their numbers, which decide between equals."""
        start = max(self._now, client.end)
        for entry in sorted(client.entries):
            yield start, entry.number, entry
            start += entry.cost / client.weight

    def _forget(self) -> None:
        """Forget clients whose next item would start now anyhow."""
        self._clients = {
            name: client for name, client in self._clients.items() if client.entries or client.end > self._now
        }

    def remove(self, item: T) -> bool:
        """Remove an item; whether it was there."""
        with self._lock:
            if (found := self._find(item)) is None:
                return False
            _drop(*found)
            return True

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter([entry.item for client in self._clients.values() for entry in client.entries])


def _drop(client: _Client[T], entry: _Entry[T]) -> None:
    client.entries = [own for own in client.entries if own is not entry]
    heapq.heapify(client.entries)
