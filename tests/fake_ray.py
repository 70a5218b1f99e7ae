"""A fake Ray that runs tasks one after another in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Died(Exception):
    """The error that the fake raises for a killed process."""


class FakeRay:
    """``dies``: the numbers of the starts that are killed, from 1 on. Subclasses say in ``get`` what a task does."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=ZeroDivisionError, TaskCancelledError=KeyError)

    def __init__(self, dies: set[int]) -> None:
        self.dies, self.started = dies, list[Any]()

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Any:
        assert options == {"num_cpus": 1, "num_gpus": 0, "max_retries": 0}

        def start(*given: Any) -> int:
            self.started.append(given)
            return len(self.started)

        return lambda run: SimpleNamespace(remote=start)

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return tasks[:1], tasks[1:]
