"""The one pipeline of a running app, and making pictures with it. Only whoever holds the device may use it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.adapter_file import AdapterInfo
from ..generation.generate import next_file
from ..generation.image_settings import save_image
from ..generation.sampling import describe_image, sample_images
from ..loaders import LoadedAdapter, delete_adapter, load_adapter
from ..loaders.mixed_batch import mixed_batch
from ..pipelines.base import BaseSource, base_id, best_device, default_guidance, is_embedded
from ..pipelines.components import (
    canonical,
    components,
    denoiser,
    devices,
    fingerprint,
    projections,
    same_weights,
)
from .entries import Stamp, stamp_of
from .messages import short_name
from .preview import LatentPreview
from .request import Request, Wanted
from .runs import Run, Skipped, free_memory
from .weights import set_weights

log = logging.getLogger(__name__)
PREVIEWS = 6
"""How many previews a picture has at most."""


class Engine:
    """Loads the base when first needed and keeps only the adapters of the last request in it."""

    def __init__(self, source: BaseSource) -> None:
        self.source = source
        self._loaded: dict[str, tuple[Stamp, LoadedAdapter]] = {}
        self._loading = threading.Lock()
        self._pipe: Any = None
        self._fingerprints: dict[str, dict[str, float]] = {}

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded when first asked for."""
        with self._loading:
            if self._pipe is None:
                pipe = self.source.open()
                self._fingerprints = _fingerprints(pipe)
                self._pipe = pipe
            return self._pipe

    @property
    def home(self) -> str:
        """Where pictures are made, and subjects learned while the base rests."""
        return self.source.device or best_device()

    @property
    def rests(self) -> bool:
        """Whether it takes nothing of an accelerator."""
        return self._pipe is None or all(place.type == "cpu" for place in devices(self._pipe))

    def rest(self) -> None:
        """Leave the accelerator, which a training needs for itself, until the next :meth:`use`."""
        if not self.rests:
            self._leave()

    def _come_home(self) -> None:
        """Bring the base to where pictures are made; what is there already is not touched.

        All of it or nothing: a pipeline in two places fails at every picture.
        """
        pipe = self.pipe
        try:
            pipe.to(self.home)
        except Exception:
            self._leave()
            raise

    def _leave(self) -> None:
        self._pipe.to("cpu", silence_dtype_warnings=True)  # in half precision too it computes nothing there
        free_memory()

    @property
    def base_id(self) -> str:
        """The base's name, as pictures tell it: without the folders of this machine."""
        return short_name(base_id(self.pipe))

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the base."""
        return default_guidance(self.source.base)

    @property
    def is_embedded(self) -> bool:
        """Whether this is the base that comes with the package."""
        return is_embedded(self.source.base)

    @cached_property
    def side(self) -> int:
        """The side of a picture of the base's own size, in pixels."""
        pipe = self.pipe
        size = denoiser(pipe).config.sample_size
        return int((size if isinstance(size, int) else size[0]) * getattr(pipe, "vae_scale_factor", 8))

    @cached_property
    def preview(self) -> LatentPreview:
        """The linear map that shows latents."""
        return LatentPreview.fit(self.pipe.vae)

    def look(self, latents: Any) -> str:
        """Latents as a rough picture; empty where that fails, which is no reason to lose the real one."""
        try:
            return self.preview.data_uri(latents)
        except Exception:
            log.debug("no preview", exc_info=True)  # Flux packs its latents, a VAE may have no such scaling
            return ""

    def misfit(self, info: AdapterInfo) -> str | None:
        """Why an adapter does not belong to this base, or None; reads nothing but its header."""
        _ = self.pipe
        for part, stored in info.base_fingerprint.items():
            ours = self._fingerprints.get(part)
            if ours is None or not set(stored) <= set(ours):
                return f"made for {short_name(info.base)}, which is built differently"
            if not same_weights(ours, stored):
                return f"made for {short_name(info.base)}, whose weights differ from this one's"
        return None

    def use(self, adapters: Sequence[Wanted]) -> list[dict[str, Any]]:
        """Make exactly these adapters live, others leave no trace; returns what pictures say of them."""
        self._come_home()
        wanted = {adapter.name: adapter for adapter in adapters}
        for name, (stamp, loaded) in list(self._loaded.items()):
            if name not in wanted or stamp != _stamp(wanted[name].path):
                delete_adapter(self.pipe, loaded.name)
                del self._loaded[name]
        for name, adapter in wanted.items():
            if name not in self._loaded:
                stamp = _stamp(adapter.path)
                self._loaded[name] = (stamp, load_adapter(self.pipe, adapter.path, _peft_name(name)))
        set_weights(self.pipe, {_peft_name(name): adapter.weights for name, adapter in wanted.items()})
        return [_described(adapter, self._loaded[name][1]) for name, adapter in wanted.items()]

    def make(self, request: Request, out: Path, run: Run) -> list[Path]:
        """Make the pictures one by one and write each into ``out`` with its settings, before the next one starts."""
        request.check()
        described = self.use(request.adapters)
        files: list[Path] = []
        run.report(pictures=len(request.pictures), steps=request.sampling.steps)
        for number, (prompt, seed) in enumerate(request.pictures, 1):
            run.report(picture=number, step=0, preview="")
            try:
                run.check()
                image = self.picture(request, prompt, seed, run)
            except Skipped:
                continue
            files.append(self._save(out, image, prompt, seed, request, described))
            run.report(files=tuple(files), preview="")
        return files

    def make_batch(self, request: Request, rows: Sequence[Sequence[Wanted]], out: Path, run: Run) -> list[Path]:
        """All pictures in one pass, each with the adapters of its own row; ``request.adapters`` are all of them."""
        request.check()
        described = {values["name"]: values for values in self.use(request.adapters)}
        prompts, seeds = zip(*request.pictures, strict=True)
        run.report(pictures=1, steps=request.sampling.steps, picture=1)

        def watch(step: int, latents: Any) -> None:
            run.check()
            run.report(step=step)

        specs = [[(_peft_name(adapter.name), adapter.weights.unet) for adapter in row] for row in rows]
        with mixed_batch(self.pipe, specs):
            images = sample_images(self.pipe, prompts, seeds, request.sampling, watch)
        files = []
        for image, (prompt, seed), row in zip(images, request.pictures, rows, strict=True):
            adapters = [{**described[adapter.name], "weight": adapter.weights.unet} for adapter in row]
            files.append(self._save(out, image, prompt, seed, request, adapters))
        run.report(files=tuple(files))
        return files

    def _save(
        self, out: Path, image: Any, prompt: str, seed: int, request: Request, adapters: list[dict[str, Any]]
    ) -> Path:
        settings = describe_image(self.pipe, image, prompt, seed, request.sampling, adapters)
        return save_image(image, next_file(out, seed), replace(settings, base=self.base_id))

    def picture(self, request: Request, prompt: str, seed: int, run: Run | None = None) -> Any:
        """One picture with the adapters that are live."""
        steps = request.sampling.steps
        every = max(1, steps // PREVIEWS)

        def watch(step: int, latents: Any) -> None:
            if run is None:
                return
            run.check()
            show = step % every == 0 and step < steps
            run.report(step=step, **({"preview": self.look(latents[0])} if show else {}))

        return sample_images(self.pipe, [prompt], [seed], request.sampling, watch)[0]


def _fingerprints(pipe: Any) -> dict[str, dict[str, float]]:
    """Of every projection, read once while no adapter is in: lists of adapters are compared with them."""
    return {
        part: {canonical(path): fingerprint(layer, path) for path, layer in projections(module).items()}
        for part, module in components(pipe).items()
    }


def _described(wanted: Wanted, loaded: LoadedAdapter) -> dict[str, Any]:
    weights = wanted.weights
    return {
        "name": wanted.name, "weight": weights.unet, "sha256": loaded.info.sha256, "path": wanted.path.name,
        "trigger": loaded.trigger, **weights.beyond_one_number(),
    }  # fmt: skip


def _peft_name(name: str) -> str:
    """PEFT takes letters, digits and few signs in a name; folders may be called anything."""
    return f"app_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _stamp(path: Path) -> Stamp:
    stamp = stamp_of(path)
    if stamp is None:
        raise UserError(f"the adapter {path.name} is gone: refresh the library")
    return stamp
