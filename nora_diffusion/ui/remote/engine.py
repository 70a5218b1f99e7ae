"""Images made by a server. Requests of all pages reach it together, so that they share its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import UserError
from ...evaluation.settings import GridConfig
from ...evaluation.sheet import MadeCell, write_grid
from ...formats.adapter_info import AdapterInfo
from ...generation.generate import save_new_image
from ...generation.image_settings import read_settings
from ...generation.tags import Tag, write_tags
from ...io.files import make_folder
from ...io.images import load_image
from ...pipelines.base import BaseSource
from ...reports.webpage import data_uri
from ...serving.client import Event, Made, Queued, Step
from ..backend import PREVIEWS, Backend
from ..request import MAX_SIDE, Request
from ..runs import Run
from .asking import LOOK_SECONDS, body_of, refuse_failed
from .cells import Cells, files_of
from .server import Server


class RemoteEngine(Backend):
    """The base of a server."""

    source = BaseSource()
    is_remote = True

    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def title(self) -> str:
        """The base and the server's host."""
        about = self.server.about
        base = "embedded base model" if about.embedded else about.base
        return f"{base} on the server {urlsplit(self.server.client.url).netloc}"

    @property
    def base_id(self) -> str:
        """The base's name, as it is in the server's images."""
        return self.server.about.base

    @property
    def steps(self) -> int:
        """The base's default number of steps."""
        return self.server.about.steps

    @property
    def guidance(self) -> float:
        """The base's default guidance scale."""
        return self.server.about.guidance

    @property
    def is_embedded(self) -> bool:
        """Whether this is the base that comes with the package."""
        return self.server.about.embedded

    @property
    def max_side(self) -> int:
        """Largest side of an image in pixels."""
        return min(MAX_SIDE, self.server.about.max_side)

    def warm_up(self) -> None:
        """Nothing: the server has its base loaded."""

    def mismatch(self, info: AdapterInfo) -> str | None:
        """None: the server checks its adapters."""
        return None

    def make(self, request: Request, out: Path, run: Run) -> list[Path]:
        """Generate the images, as many together as the server takes. Each is written as soon as it arrives."""
        request.check()
        if request.sampling.hires_scale > 1:
            raise UserError("a server makes no second pass: set its factor to 1")
        if request.start:
            raise UserError("a server does not start from images: remove the image")
        most = self.server.about.max_count
        files: list[Path] = []
        for start in range(0, len(request.images), most):
            together = Together(request, start, most, out, run, files)
            with self.server.client.stream(**together.body) as stream:
                for event in stream.events(LOOK_SECONDS):
                    run.check_stop()
                    if event is not None:
                        together.take(event)
            files = together.files
        return files

    def make_cells(self, config: GridConfig, folder: Path, run: Run) -> list[MadeCell]:
        """Generate a grid into ``folder``, and write its image and report."""
        cells = config.cells()
        files = files_of(cells, make_folder(folder / "cells").parent)
        Cells(self.server.client, run, {files[position]: cell for position, cell in cells}).make()
        made = [MadeCell(position, file, asdict(read_settings(file))) for position, file in files.items()]
        first = read_settings(made[0].file)
        images = [load_image(cell.file) for cell in made]
        write_grid(folder, config, made, images, base=first.base, dtype=first.dtype, versions=first.versions)
        return made


class Together:
    """The images ``start`` to ``start + most`` of a request, and what happens to them. ``before``: earlier files."""

    def __init__(self, request: Request, start: int, most: int, out: Path, run: Run, before: Sequence[Path]) -> None:
        self.request, self.start, self.out, self.run = request, start, out, run
        self.images = request.images[start : start + most]
        self._before, self._made = list(before), dict[int, Path]()
        self._steps: dict[int, int] = {}
        run.report(images=len(request.images), steps=request.sampling.steps, image=start + 1, step=0, preview="")

    @property
    def body(self) -> dict[str, Any]:
        """The request for these images, as the server takes it."""
        prompt, seed = self.images[0]
        sampling = self.request.sampling
        return body_of(
            write_tags(prompt, tags_of(self.request)), seed, sampling,
            count=len(self.images), previews=max(1, sampling.steps // PREVIEWS),
        )  # fmt: skip

    @property
    def files(self) -> list[Path]:
        """The files of all finished images, in the order of their seeds."""
        return [*self._before, *(self._made[index] for index in sorted(self._made))]

    def take(self, event: Event) -> None:
        """Save a picture, or show how far the server is. Raises :class:`.ServerError` for a picture that failed."""
        refuse_failed(event)
        if isinstance(event, Made):
            self._made[event.index] = self._save(event)
            self._steps.pop(event.index, None)
            self.run.report(state="working", files=tuple(self.files), preview="", **self._progress())
        elif isinstance(event, Step):
            self._steps[event.index] = event.step
            preview = {"preview": data_uri(event.preview, "PNG", compress_level=1)} if event.preview else {}
            self.run.report(state="working", **preview, **self._progress())
        elif isinstance(event, Queued) and not self._steps and not self._made and event.index == 0:
            others = "images of other requests" if event.place > 1 else ""
            self.run.report(state="waiting", ahead=max(0, event.place - 1), busy_with=others)

    def _progress(self) -> dict[str, float]:
        """The number of the next image that is finished, its step, and the share of all steps that are done."""
        total, steps = len(self.request.images), self.request.sampling.steps
        done = self.start + len(self._made)
        share = (done + sum(min(step, steps) for step in self._steps.values()) / steps) / total
        return {"image": min(done + 1, total), "step": max(self._steps.values(), default=0), "share": share}

    def _save(self, event: Made) -> Path:
        seed = self.images[event.index][1]
        return save_new_image(event.image, self.out, seed, event.settings)


def tags_of(request: Request) -> list[Tag]:
    """The adapters of a request as tags. Raises :class:`UserError` for block weights, which tags cannot have."""
    for adapter in request.adapters:
        if adapter.weights.settings().get("blocks"):
            raise UserError(
                f"{adapter.name!r} has block weights, which a server cannot use: remove it and add it again"
            )
    return [Tag(adapter.name, adapter.weights.unet, adapter.weights.text) for adapter in request.adapters]
