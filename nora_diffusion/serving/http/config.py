"""The settings of the server, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import UserError
from ...generation.settings import MAX_SIDE, MAX_STEPS, check_range
from ...pipelines.base import BaseSource, check_base
from ...web.listening import is_loopback
from ..cluster.scale import parse_scale

EngineKind = Literal["local", "ray"]


@dataclass
class ServeConfig:
    """Settings of ``nora-diffusion serve``.

    ``subjects``: folders, packs and files of adapters. ``uploads``: folder of uploaded ones (``None``: no uploads).
    ``keys``: file of API keys. ``at_once``, ``resident``, ``host_memory`` (MiB), ``waiting``: limits of the engine.
    ``rate``: requests a minute of a key. ``max_side``, ``max_steps``: limits of a picture. ``timeout``: seconds of a
    request that names none. ``drain``: seconds that requests at work may take after a stop.
    ``client_timeout``: seconds that a client may take to send a request. ``connections``: open at once.
    ``log_prompts``: prompts are in the log. ``trace``: OpenTelemetry's traces. ``engine``: in this process, or
    ``replicas`` of it (:mod:`..cluster.scale`) in the Ray cluster at ``address`` (``None``: one on this machine).
    """

    source: BaseSource = field(default_factory=BaseSource)
    subjects: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 8000
    uploads: str | None = None
    keys: str | None = None
    at_once: int = 16
    resident: int = 64
    host_memory: int = 1024
    waiting: int = 256
    rate: float = 120.0
    max_side: int = 1024
    max_steps: int = 150
    timeout: float = 600.0
    drain: float = 60.0
    client_timeout: float = 20.0
    connections: int = 1024
    log_prompts: bool = False
    trace: bool = False
    engine: EngineKind = "local"
    replicas: str = "1"
    address: str | None = None

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting that is invalid or not safe. Imports torch last."""
        check_range("port", self.port, 0, 65535)
        check_range("at_once", self.at_once, 1, 1024)
        check_range("resident", self.resident, 1, 100_000)
        check_range("host_memory", self.host_memory, 0, 2**24)
        check_range("waiting", self.waiting, 1, 100_000)
        check_range("rate", self.rate, 0.1, 1e6)
        check_range("max_side", self.max_side, 8, MAX_SIDE)
        check_range("max_steps", self.max_steps, 1, MAX_STEPS)
        check_range("timeout", self.timeout, 0.001, 24 * 3600)
        check_range("client_timeout", self.client_timeout, 0.05, 3600)
        check_range("connections", self.connections, 1, 100_000)
        check_range("drain", self.drain, 0, 24 * 3600)
        if self.keys is None and not self.on_loopback:
            raise UserError(
                f"--host {self.host} opens the server to other machines: add --keys FILE (a key is made by "
                "--new_key NAME), or omit --host to serve this machine only"
            )
        self._check_engine()

    def _check_engine(self) -> None:
        if self.engine == "ray":
            parse_scale(self.replicas)
            check_base(self.source.base)  # this machine need not have the device
            return
        if self.replicas != "1" or self.address is not None:
            raise UserError("--replicas and --address are for --engine ray: add it, or leave them out")
        self.source.check()

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def base_name(self) -> str:
        """The name of the base for clients: a hub id, or the name of a folder without its path."""
        base = self.source.base or "tiny_sd"
        return Path(base).expanduser().resolve().name if Path(base).expanduser().exists() else base
