"""One picture at work: diffusers' own pipeline in a thread of its own, whose models are the engine's."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.deltas.tokens import LearnedEmbedding
from ..generation.sampling import describe_image, sample_images
from ..generation.settings import Sampling
from ..loaders.tokens import extended_tokenizer
from ..pipelines.components import components, tokenizer_name
from ..pipelines.names import DENOISERS
from .merging import Arguments
from .rendezvous import Locked, Rendezvous, Shared, SharedAutoencoder
from .request import Request
from .rows import Spec
from .subjects import Source, Subjects
from .tickets import Event, Picture, Ticket
from .waiting import FairQueue


@dataclass(eq=False)
class Work:
    """A picture to make: number ``index`` of a request.

    ``sources``: the files of its subjects. ``words``: by text encoder, the first ids of its subjects' new tokens in its
    own tokenizers. ``place``: its place in the queue as its sender knows it (-1: not told).
    """

    ticket: Ticket
    index: int
    sources: tuple[Source, ...] = ()
    spec: Spec = field(default_factory=Spec)
    described: list[dict[str, Any]] = field(default_factory=list)
    words: dict[str, dict[str, int]] = field(default_factory=dict)
    place: int = -1

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of the request."""
        return self.ticket.request.sampling

    @property
    def cost(self) -> float:
        """Its share of the engine, in denoised rows."""
        return float(self.sampling.steps * (1 if self.sampling.guidance <= 1 else 2))

    def fail(self, error: BaseException) -> None:
        """Tell the sender."""
        self.ticket.tell(Event("error", self.index, error=error))

    def make(self, pipe: Any) -> None:
        """Make the picture with a pipeline of its own (:class:`Copies`), and tell the sender."""
        request, seed = self.ticket.request, self.ticket.request.seed + self.index
        self.ticket.began[self.index] = time.monotonic()

        def on_step(step: int, latents: Any) -> None:
            steps = len(pipe.scheduler.timesteps)  # PNDM makes one more than it was asked for
            self.ticket.tell(Event("step", self.index, step, steps, latents))

        try:
            (image,) = sample_images(pipe, [request.text], [seed], self.sampling, on_step)
            settings = describe_image(pipe, image, request.text, seed, self.sampling, self.described)
            self.ticket.tell(Event("picture", self.index, picture=Picture(self.index, image, settings)))
        except Exception as error:  # told to the sender, whatever it is: other pictures go on
            self.fail(error)


def works_of(request: Request, subjects: Subjects) -> list[Work]:
    """The pictures of a request, which share a ticket. Raises :class:`UserError` if it is not possible."""
    sources, ticket = subjects.sources(request), Ticket(request)
    return [Work(ticket, index, sources) for index in range(request.count)]


def enqueue(queue: FairQueue[Work], works: Sequence[Work]) -> None:
    """Queue the pictures of a request. Raises :class:`.waiting.Full` without room."""
    request = works[0].ticket.request
    queue.put(works, request.client, works[0].cost, request.priority)
    tell_places(queue, works)


def tell_places(queue: FairQueue[Work], works: Sequence[Work]) -> None:
    """Tell the senders of waiting pictures their places, where these have changed; one call at a time."""
    for work, place in zip(works, queue.places(works), strict=True):
        if place != work.place:
            work.place = place
            work.ticket.tell(Event("queued", work.index, place=place))


class Copies:
    """Makes a copy of the pipeline for each picture, with a scheduler of its own, whose models the engine computes.

    The models' dtypes and devices are looked up once, which takes the longer the more adapters are loaded.
    """

    def __init__(self, pipe: Any, meeting: Rendezvous) -> None:
        self._pipe, self._meeting, self._tokenizing = pipe, meeting, threading.RLock()
        self._models = {**components(pipe), "vae": pipe.vae}
        self._places = {name: (model.dtype, model.device) for name, model in self._models.items()}
        if _is_upcast(pipe):
            nn.Module.to(pipe.vae, torch.float32)
        self._kind = _placed(type(pipe), pipe.device, pipe.dtype)

    def of(self, work: Work) -> Any:
        """The pipeline of a picture."""

        def call(model: str, arguments: Arguments) -> Any:
            return self._meeting.call(work, model, arguments)

        own = copy.copy(self._pipe)
        own.__class__ = self._kind
        models: dict[str, Any] = {"scheduler": copy.deepcopy(self._pipe.scheduler)}
        for name, model in self._models.items():
            kind = SharedAutoencoder if name == "vae" else Shared
            models[name] = kind(model, name, *self._places[name], call)
        for encoder in [name for name in components(self._pipe) if name not in DENOISERS]:
            models[tokenizer_name(encoder)] = Locked(self._tokenizer(encoder, work), self._tokenizing)
        vars(own).update(models)  # not setattr, which would write them to the pipeline's config
        own.set_progress_bar_config(disable=True)
        return own

    def _tokenizer(self, encoder: str, work: Work) -> Any:
        """A tokenizer with the new tokens of the picture's own subjects, whose ids no other subject changes."""
        tokenizer, table = getattr(self._pipe, tokenizer_name(encoder)), self._models[encoder].get_input_embeddings()
        if not isinstance(table, LearnedEmbedding):
            return tokenizer
        tokenizer, _ = table.before
        counts = {
            word: len(vectors) for name, *_ in work.spec.adapters for word, vectors in table.vectors(name).items()
        }
        if not counts:
            return tokenizer
        with self._tokenizing:
            extended = extended_tokenizer(tokenizer, counts)
        work.words[encoder] = {word: extended.convert_tokens_to_ids(word) for word in counts}
        return extended


def _is_upcast(pipe: Any) -> bool:
    """Whether the pipeline casts its autoencoder for each picture, as SDXL's, which overflows in fp16.

    It is cast once instead. Pictures still see fp16, and so give it latents in fp32.
    """
    return hasattr(pipe, "upcast_vae") and pipe.vae.dtype == torch.float16 and bool(pipe.vae.config.force_upcast)


def _placed(kind: Any, device: Any, dtype: Any) -> type:
    """The class of a copy: it cannot ask its models where they are, because :class:`Shared` is not a module."""
    return type(kind.__name__, (kind,), {"device": device, "_execution_device": device, "dtype": dtype})


def start(work: Work, pipe: Any, meeting: Rendezvous, ended: Callable[[Work], None]) -> None:
    """Make a picture in a thread. ``ended``: called in it at the end, before the engine stops waiting for it."""
    meeting.enter(work)

    def run() -> None:
        try:
            work.make(pipe)
        finally:
            ended(work)
            meeting.leave(work)

    threading.Thread(target=run, name="picture", daemon=True).start()
