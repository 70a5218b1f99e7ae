"""The replicas as a deployment of Ray Serve: all that the server asks of Ray."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from ...errors import UserError, first_line, last_line
from ...pipelines.base import check_base
from ..request import Request
from ..tickets import Event
from .front import Lost
from .replica import Replica, ReplicaSettings, Report
from .routing import BALANCE
from .scale import Scale

log = logging.getLogger(__name__)
T = TypeVar("T")

NAME = "nora-diffusion"
"""The application in the cluster."""
ROUTER = f"{__package__}.router.SubjectRouter"
SECONDS = 1.0
"""In which a replica says what it does."""
UTILIZATION = 0.75
"""Replicas are added if those that run have more than this part of their pictures at once."""


@contextmanager
def deployed(settings: ReplicaSettings, scale: Scale, address: str | None, drain: float) -> Iterator[Deployment]:
    """The running replicas. Raises :class:`UserError` without Ray or a cluster, and if they do not start.

    ``address``: of a cluster (``None``: one on this machine, which ends with the block). ``drain``: seconds in which a
    replica that is stopped may finish its pictures.
    """
    with _cluster(address) as (ray, serve):
        deployment = Deployment(ray, serve, settings, scale, drain)
        if address is None:
            deployment.check_resources()
        try:
            deployment.renew()
            yield deployment
        finally:
            deployment.close()


class Deployment:
    """The replicas of one application."""

    def __init__(self, ray: Any, serve: Any, settings: ReplicaSettings, scale: Scale, drain: float) -> None:
        self._ray, self._serve, self._settings, self._scale, self._drain = ray, serve, settings, scale, drain
        self._handle: Any = None
        self._closed = False

    @property
    def _resources(self) -> dict[str, float]:
        """What a replica needs: a core, and a GPU if the cluster has any and the device is not another."""
        wanted = (self._settings.source.device or "cuda").startswith("cuda")
        gpus = 1 if wanted and self._ray.cluster_resources().get("GPU") else 0
        return {"num_cpus": 1, "num_gpus": gpus}

    def check_resources(self) -> None:
        """Raises :class:`UserError` if the replicas cannot all run, which Ray would wait for."""
        have = self._ray.cluster_resources()
        for name, key in (("core", "num_cpus"), ("GPU", "num_gpus")):
            need = self._resources[key] * self._scale.most
            if need > (found := have.get("CPU" if name == "core" else name, 0)):
                raise UserError(
                    f"{self._scale.most} replicas need a {name} each and this machine has {found:g}: use fewer "
                    "--replicas, or the --address of a cluster"
                )

    def renew(self) -> None:
        """Start the replicas, or replace them one after the other. Raises :class:`UserError` if that fails."""
        check_base(self._settings.source.base)
        self._settings = replace(self._settings, version=time.time_ns())
        try:
            handle = self._serve.run(self._application(), name=NAME, route_prefix=None)
        except RuntimeError as error:
            raise UserError(f"the replicas did not start: {self._problem() or last_line(error)}") from error
        self._handle = self._handle or handle  # the first one, which pictures at work use, finds the new replicas too

    def _problem(self) -> str:
        """Why Ray could not start a replica: the last line of what it says, which is that of a traceback."""
        application = self._serve.status().applications.get(NAME)
        messages = [own.message for own in application.deployments.values()] if application else []
        last = next((message.strip().splitlines()[-1] for message in messages if message.strip()), "")
        return last.removeprefix(f"{UserError.__module__}.UserError: ")

    def _application(self) -> Any:
        at_once, scale = self._settings.at_once, self._scale
        if scale.least == scale.most:
            number: dict[str, Any] = {"num_replicas": scale.least}
        else:
            target = max(1.0, at_once * UTILIZATION)
            number = {
                "autoscaling_config": {
                    "min_replicas": scale.least, "max_replicas": scale.most, "target_ongoing_requests": target,
                    "upscale_delay_s": 5.0, "look_back_period_s": 15.0,
                }
            }  # fmt: skip
        deployment = self._serve.deployment(
            Replica, name="Replica", max_ongoing_requests=slots(at_once), ray_actor_options=self._resources,
            request_router_config={"request_router_class": ROUTER}, logging_config={"enable_access_log": False},
            health_check_period_s=5.0, graceful_shutdown_wait_loop_s=0.5, graceful_shutdown_timeout_s=self._drain,
            max_constructor_retry_count=2, **number,
        )  # fmt: skip
        return deployment.bind(self._settings)

    async def make(self, request: Request, lasting: Sequence[str]) -> AsyncGenerator[Event, None]:
        """The events of a picture, from the replica that its first subject prefers. Raises :class:`.front.Lost`."""
        subject = next(iter(request.adapters.values()), "")
        handle = self._handle.options(method_name="make", stream=True, multiplexed_model_id=subject)
        call = handle.remote(request, lasting)
        try:
            with self._deaths():
                async for event in call:
                    yield event
        finally:
            with contextlib.suppress(concurrent.futures.CancelledError):
                call.cancel()

    def ask(self, function: Callable[[Any], T]) -> T:
        """The answer of one replica. Raises :class:`.front.Lost`, and what the function raises."""
        with self._deaths():
            return self._handle.options(method_name="ask").remote(function).result()

    async def forget(self, paths: Sequence[str]) -> None:
        """Let these subjects, and those of requests that have ended, leave memory everywhere."""
        with self._silence():
            await self._handle.broadcast("forget", paths).results_async(return_exceptions=True)

    def reports(self) -> list[Report]:
        """What the replicas do. One that does not answer, as all its slots are taken, is left out."""
        with self._silence():
            found = self._handle.broadcast("report").results(timeout_s=SECONDS, return_exceptions=True)
            return [report for report in found if isinstance(report, Report)]
        return []

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Log that the replicas do not answer."""
        try:
            yield
        except (TimeoutError, self._serve.exceptions.RayServeException) as error:
            log.warning("the replicas do not answer: %s", first_line(error))

    @contextmanager
    def _deaths(self) -> Iterator[None]:
        """Turn Ray's errors into :class:`.front.Lost`, and those of a replica's code into what it raised."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.RayError, self._serve.exceptions.RayServeException) as error:
            raise Lost from error

    def close(self) -> None:
        """End all replicas."""
        if not self._closed:
            self._closed = True
            if self._handle is not None:
                self._handle.shutdown()
            self._serve.delete(NAME)


def slots(at_once: int) -> int:
    """The calls that a replica takes: the share of pictures that routing allows, and a few besides pictures."""
    return math.ceil(BALANCE * at_once) + 4


@contextmanager
def _cluster(address: str | None) -> Iterator[tuple[Any, Any]]:
    """Ray and Ray Serve, connected to the cluster at ``address`` or to one on this machine that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a late call of its threads would start another cluster
    try:
        import ray
        from ray import serve
        from ray.serve import exceptions  # noqa: F401
    except ImportError as error:
        raise UserError("--engine ray needs Ray Serve: pip install 'nora-diffusion[serve,ray]'") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    local = {} if address else {"include_dashboard": False}
    own = not ray.is_initialized()
    try:
        if own:
            with _own_signals():
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    except Exception as error:
        if own:
            ray.shutdown()
        place = f"at --address {address}" if address else "on this machine"
        raise UserError(f"no Ray cluster {place}: {first_line(error)}; start one with `ray start --head`") from error
    try:
        yield ray, serve
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this program's handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
