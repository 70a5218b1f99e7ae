"""Peers of the engine behind the same HTTP server: diffusers with one LoRA at a time, and PEFT's mixed batches.

    python benchmarks/serving_peers.py engine|diffusers|hotswap|peft SUBJECTS [--base FOLDER_OR_ID] [--dtype fp32]

Serves until the standard input ends; the first line of the output is the address. `benchmarks/serving.py` uses it.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nora_diffusion import mixed_batch
from nora_diffusion.generation.image_settings import ImageSettings
from nora_diffusion.generation.sampling import describe_image, sample_images
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.engine import Engine, Statistics
from nora_diffusion.serving.http.catalog import Catalog
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import served
from nora_diffusion.serving.http.state import State
from nora_diffusion.serving.request import Request
from nora_diffusion.serving.subjects import Subjects
from nora_diffusion.serving.tickets import Event, Picture, Ticket

Take = Callable[[list[Ticket]], list[Ticket]]


class Peer:
    """What the server needs of an engine: a queue, and a thread that makes its pictures in groups."""

    def __init__(self, pipe: Any, subjects: Subjects) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.subjects = pipe, subjects
        self._queue: list[Ticket] = []
        self._changed = threading.Condition()
        self._groups = self._rows = self.loads = 0
        self.is_open = True
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request) -> Ticket:
        """Queue a request."""
        ticket = Ticket(request)
        with self._changed:
            self._queue.append(ticket)
            self._changed.notify()
        ticket.tell(Event("queued", 0))
        return ticket

    @property
    def statistics(self) -> Statistics:
        """Passes are counted by groups."""
        return Statistics(len(self._queue), 0, self._groups, self._rows, 0, 0, self.loads, 0, 0, self.loads)

    @property
    def resident_paths(self) -> set[str]:
        """Not known."""
        return set()

    def close(self, drain: bool = True) -> None:
        """Nothing is left to do."""

    def take(self, waiting: list[Ticket]) -> list[Ticket]:
        """Those of the waiting requests, the oldest first, that are made together."""
        return waiting[:1]

    def make(self, tickets: Sequence[Ticket]) -> list[Any]:
        """Their images."""
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                group = self.take(self._queue)
                self._queue = [ticket for ticket in self._queue if ticket not in group]
            for ticket, image in zip(group, self.make(group), strict=True):
                ticket.tell(Event("picture", 0, picture=Picture(0, image, self._settings(ticket.request, image))))
            self._groups, self._rows = self._groups + 1, self._rows + 2 * len(group)

    def _settings(self, request: Request, image: Any) -> ImageSettings:
        return describe_image(self.pipe, image, request.text, request.seed, request.sampling, [])

    def file(self, ticket: Ticket) -> Path:
        """The LoRA of a request."""
        return Path(self.subjects.find(ticket.request.tags[0]).path)

    def sample(self, tickets: Sequence[Ticket]) -> list[Any]:
        """The images of requests with equal settings."""
        asked = [ticket.request for ticket in tickets]
        texts, seeds = [request.text for request in asked], [request.seed for request in asked]
        return list(sample_images(self.pipe, texts, seeds, asked[0].sampling))


class OneByOne(Peer):
    """diffusers: `load_lora_weights` and `unload_lora_weights` for each picture of another subject."""

    current: Path | None = None

    def make(self, tickets: Sequence[Ticket]) -> list[Any]:
        file = self.file(tickets[0])
        if file != self.current:
            self.load(file)
            self.current, self.loads = file, self.loads + 1
        return self.sample(tickets)

    def load(self, file: Path) -> None:
        """Replace the LoRA."""
        self.pipe.unload_lora_weights()
        self.pipe.load_lora_weights(file.parent, weight_name=file.name)


class Hotswap(OneByOne):
    """diffusers: `load_lora_weights(..., hotswap=True)`."""

    def load(self, file: Path) -> None:
        self.pipe.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="subject", hotswap=self.current is not None
        )


class Mixed(Peer):
    """PEFT's mixed batches: waiting requests with equal settings share a pipeline call; 64 LoRAs stay loaded."""

    at_once, most = 16, 64

    def __init__(self, pipe: Any, subjects: Subjects) -> None:
        self.loaded: OrderedDict[Path, str] = OrderedDict()
        super().__init__(pipe, subjects)

    def take(self, waiting: list[Ticket]) -> list[Ticket]:
        alike = [ticket for ticket in waiting if ticket.request.sampling == waiting[0].request.sampling]
        return alike[: self.at_once]

    def make(self, tickets: Sequence[Ticket]) -> list[Any]:
        files = [self.file(ticket) for ticket in tickets]
        for file in files:
            self._load(file, files)
        with mixed_batch(self.pipe, [self.loaded[file] for file in files]):
            return self.sample(tickets)

    def _load(self, file: Path, needed: Sequence[Path]) -> None:
        if file in self.loaded:
            self.loaded.move_to_end(file)
            return
        if len(self.loaded) >= self.most:
            oldest = next(own for own in self.loaded if own not in needed)
            self.pipe.delete_adapters(self.loaded.pop(oldest))
        self.loads += 1
        self.loaded[file] = f"subject{self.loads}"
        self.pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=self.loaded[file])


PEERS = {"diffusers": OneByOne, "hotswap": Hotswap, "peft": Mixed}


def main() -> None:
    """Serve one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["engine", *PEERS])
    parser.add_argument("subjects")
    parser.add_argument("--base")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--at_once", type=int, default=16)
    args = parser.parse_args()
    config = ServeConfig(BaseSource(args.base), [args.subjects], port=0, at_once=args.at_once)
    catalog, pipe = Catalog(config.subjects), BaseSource(args.base, dtype=args.dtype).open()
    if args.way == "engine":
        with Engine(pipe, catalog.adapters, at_once=args.at_once) as engine:
            _serve(State(config, engine, catalog))
        return
    peer: Any = PEERS[args.way](pipe, Subjects(catalog.adapters))
    _serve(State(config, peer, catalog))


def _serve(state: State) -> None:
    with served(state) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
