"""A fake Ray that runs tasks one after another in this process."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

from nora_diffusion.training.federated import client


class Died(Exception):
    """The error that the fake raises for a killed process."""


class TaskError(Exception):
    """The error that the fake raises for an error within a task."""


class FakeRay:
    """``dies``: the numbers of the starts that are killed, from 1 on. Subclasses say in ``get`` what a task does."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=TaskError, TaskCancelledError=KeyError)

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


class RayOfClients(FakeRay):
    """Trains a client's round in this process; SIGTERM comes while the task ``stop_at`` is waited for."""

    def __init__(self, dies: set[int] | None = None, stop_at: int = 0) -> None:
        super().__init__(dies or set())
        self.stop_at, self.canceled = stop_at, set[int]()

    def put(self, value: Any) -> Any:
        return value

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        if tasks[0] == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
            return [], tasks
        return tasks[-1:], tasks[:-1]  # the last client is the first to finish

    def cancel(self, task: int, force: bool) -> None:
        self.canceled.add(task)

    def get(self, task: int) -> client.Update:
        if task in self.dies:
            raise Died
        try:
            return client.train_round(*self.started[task - 1])
        except Exception as error:
            raise TaskError(str(error)) from error
