"""What makes the pictures of a server: an engine in this process, or replicas of it in a Ray cluster."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...errors import UserError
from ..cluster.front import AnyEngine, Front
from ..engine import Engine
from ..subjects import Subjects
from .catalog import Catalog
from .config import ServeConfig
from .state import State

log = logging.getLogger(__name__)


@contextmanager
def running(config: ServeConfig, catalog: Catalog) -> Iterator[AnyEngine]:
    """The engine that a server uses. Raises :class:`UserError` if it cannot be started."""
    if config.engine == "local":
        with Engine(
            config.source.open(), catalog.adapters, at_once=config.at_once, resident=config.resident,
            host_memory=config.host_memory << 20, waiting=config.waiting,
        ) as engine:  # fmt: skip
            yield engine
        return
    from ..cluster.deployment import deployed
    from ..cluster.replica import ReplicaSettings
    from ..cluster.scale import parse_scale

    settings = ReplicaSettings(config.source, config.at_once, config.resident, config.host_memory << 20)
    scale = parse_scale(config.replicas)
    at_work = scale.most * config.at_once
    with (
        deployed(settings, scale, config.address, config.drain) as replicas,
        Front(replicas, catalog.adapters, at_work=at_work, waiting=config.waiting) as front,
    ):
        yield front


def portable(config: ServeConfig) -> ServeConfig:
    """The same with absolute paths, which mean the same in every process."""
    source, uploads = config.source, config.uploads
    if source.base and Path(source.base).expanduser().exists():
        source = replace(source, base=_absolute(source.base))
    subjects = [_absolute(path) for path in config.subjects]
    return replace(config, source=source, subjects=subjects, uploads=_absolute(uploads) if uploads else None)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())  # links stay: they may lead elsewhere at the next renewal


@contextmanager
def renewed_on_hangup(state: State) -> Iterator[None]:
    """Within the block SIGHUP replaces the replicas, if there are any."""
    number = getattr(signal, "SIGHUP", None)  # Windows has none
    is_main = threading.current_thread() is threading.main_thread()
    if number is None or not is_main or state.config.engine == "local":
        yield
        return
    before = signal.signal(number, lambda *_: threading.Thread(target=renew, args=(state,)).start())
    try:
        yield
    finally:
        signal.signal(number, before)


def renew(state: State) -> None:
    """Replace the replicas by those of the base as it is now, and read the subjects again. Logs what is wrong."""
    front, paths = state.engine, state.config.subjects
    assert isinstance(front, Front)
    log.warning("the replicas are replaced one after the other")
    try:
        Catalog(paths)  # a damaged one is refused now
        front.renew()
        with state.changing:
            catalog = Catalog(paths, state.catalog.uploads)
            front.subjects, state.catalog.subjects = Subjects(catalog.adapters), catalog.subjects
    except UserError as error:
        log.error("the replicas were not replaced: %s", error)
        return
    vars(state).pop("preview", None)  # of the old base
    log.warning("all replicas were replaced")
