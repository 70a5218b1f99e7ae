"""The order in which pictures start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nora_diffusion.serving.waiting import FairQueue, Full


def taken(queue: FairQueue[str]) -> Iterator[str]:
    while (item := queue.take()) is not None:
        yield item


def test_a_client_with_many_pictures_does_not_keep_others_waiting() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.put([f"many {i}" for i in range(5)], "many", 1.0)
    queue.put(["few 0", "few 1"], "few", 1.0)
    assert [*taken(queue)] == ["many 0", "few 0", "many 1", "few 1", "many 2", "many 3", "many 4"]


def test_weights_and_costs_divide_the_engine() -> None:
    queue: FairQueue[str] = FairQueue(100, {"double": 2.0})
    queue.put(["double"] * 20, "double", 1.0)
    queue.put(["single"] * 20, "single", 1.0)
    queue.put(["dear"] * 20, "dear", 4.0)
    first = [queue.take() for _ in range(26)]
    shares = [first.count(name) for name in ("double", "single", "dear")]
    assert all(abs(found - fair) <= 1 for found, fair in zip(shares, (16, 8, 2), strict=True)), shares


def test_a_client_that_comes_late_has_no_claim_on_the_past() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.put(["early"] * 6, "early", 1.0)
    assert [queue.take() for _ in range(3)] == ["early"] * 3
    queue.put(["late"] * 3, "late", 1.0)
    assert [*taken(queue)].index("early") <= 1


def test_priorities_order_a_clients_own_pictures_only() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.put(["low"], "one", 1.0)
    queue.put(["high"], "one", 1.0, priority=5)
    queue.put(["other"], "two", 1.0)
    assert [*taken(queue)] == ["high", "other", "low"]


def test_the_first_one_may_stay() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.put(["a", "b"], "one", 3.0)
    queue.put(["c"], "two", 1.0)
    assert queue.first() == "a" == queue.first() and [*queue] == ["a", "b", "c"]
    assert queue.start("a") and not queue.start("a")
    assert [*taken(queue)] == ["c", "b"] and queue.first() is None


def test_a_request_enters_a_full_queue_as_a_whole_or_not_at_all() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.put(["a"], "one", 1.0)
    with pytest.raises(Full):
        queue.put(["b", "c"], "one", 1.0)
    assert [*queue] == ["a"] and queue.remove("a") and not queue.remove("a") and queue.take() is None


def test_places_are_those_of_the_order() -> None:
    queue: FairQueue[str] = FairQueue(100, {"double": 2.0})
    names = [f"{client} {i}" for client in ("single", "double", "dear") for i in range(4)]
    for name in names:
        client = name.split()[0]
        queue.put([name], client, 3.0 if client == "dear" else 1.0, priority=int(name[-1]) % 2)
    for _ in range(2):  # at the start, and when some have been taken
        places = dict(zip(names, queue.places(names), strict=True))
        first = [queue.take() for _ in range(3)]
        assert [places[name] for name in first if name] == [1, 2, 3]
    places = dict(zip(names, queue.places(names), strict=True))
    assert [*taken(queue)] == sorted((name for name in names if places[name]), key=places.__getitem__)
    assert queue.places(["nobody"]) == [0]
