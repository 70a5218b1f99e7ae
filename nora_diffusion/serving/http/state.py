"""What the handlers of the server share."""

from __future__ import annotations

import logging
import secrets
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...errors import UserError
from ...generation.latent_preview import LatentPreview
from ...generation.settings import Sampling
from ...generation.tags import Tag, parse_tags, write_tags
from ..cluster.front import AnyEngine
from ..request import Request
from ..tickets import Ticket
from .access.keys import Key, Keys
from .access.quotas import Quotas
from .access.rates import Rates
from .answers import Refused
from .catalog import Catalog
from .config import ServeConfig
from .telemetry.metrics import Metrics
from .telemetry.tracing import Tracing

log = logging.getLogger(__name__)

MAX_RANDOM_SEED = 2**32 - 1
"""Random seeds fit what other tools read."""


@dataclass
class State:
    """The engine, its subjects, the keys and the metrics of one server. ``changing``: held while subjects change."""

    config: ServeConfig
    engine: AnyEngine
    catalog: Catalog
    keys: Keys | None = None
    quotas: Quotas = field(default_factory=Quotas)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=Tracing)
    changing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rates = Rates(self.config.rate)

    @cached_property
    def preview(self) -> LatentPreview | None:
        """The map from latents to small pictures, fitted on first use, between two passes; ``None`` if that fails."""
        try:
            return self.engine.ask(lambda pipe: LatentPreview.fit(pipe.vae))
        except Exception as error:  # some VAEs have no scaling factor
            log.warning("this base has no previews: %s", error)
            return None

    def sampling(self, steps: int | None, guidance: float | None, **others: Any) -> Sampling:
        """Sampling settings with the base's defaults. Raises :class:`UserError` above the server's limits."""
        sampling = Sampling.for_base(self.config.source.base, steps, guidance, **others)
        sampling.check(self.config.max_steps, self.config.max_side)
        return sampling

    def owner(self, authorization: str) -> Key | None:
        """The key of a request; ``None`` for a wrong one. The file of keys is read again first if it has changed."""
        assert self.keys is not None
        if self.keys.refresh():
            self.engine.set_weights(self.keys.weights)
        return self.keys.owner(authorization)

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Its subjects may be named by their hashes. Raises :class:`Refused` above a quota."""
        quota = self.keys.quota(request.client) if self.keys is not None else None
        if quota is None:
            return self.engine.submit(self._named(request))
        if wait := self.quotas.take(request.client, quota, request.count):
            raise Refused(
                429, f"the key {request.client!r} may have {quota} pictures a day: wait for tomorrow (UTC)", wait
            )
        try:
            return self.engine.submit(self._named(request))
        except BaseException:
            self.quotas.give_back(request.client, request.count)
            raise

    def settle(self, ticket: Ticket) -> None:
        """When a request has been answered: what was not made does not count."""
        self.quotas.give_back(ticket.request.client, ticket.request.count - ticket.made)

    def _named(self, request: Request) -> Request:
        def name(given: str) -> str:
            return given if given in request.adapters else self.catalog.named(given)

        text, tags = parse_tags(request.prompt)
        prompt = write_tags(text, [replace(tag, name=name(tag.name)) for tag in tags])
        subjects = {name(given): weight for given, weight in request.subjects.items()}
        if len(subjects) < len(request.subjects):
            raise UserError("two subjects of the request are the same adapter: give it once")
        return replace(request, prompt=prompt, subjects=subjects)


def seed_of(seed: int | None, count: int) -> int:
    """The seed; a random one for ``None`` and for A1111's -1."""
    if seed is None or seed == -1:
        return secrets.randbelow(MAX_RANDOM_SEED - count)
    return seed


def tagged(prompt: str, name: str) -> str:
    """A prompt with one more subject at weight 1."""
    return f"{prompt} {Tag(name)}"
