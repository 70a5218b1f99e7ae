"""The app's one pipeline and image generation. Only the holder of the device may use it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..generation.apart import kept_apart, subjects_in
from ..generation.generate import save_new_image
from ..generation.latent_preview import LatentPreview
from ..generation.library import NamedAdapter
from ..generation.retrieval.retriever import Retriever
from ..generation.sampling import check_lengths, describe_image, sample_images, steps_in_all
from ..generation.settings import Sampling
from ..loaders import LoadedAdapter, delete_adapter, load_adapter
from ..loaders.mixed_batch import mixed_batch
from ..pipelines.base import BaseSource, base_id, best_device, default_guidance, default_steps, is_embedded
from ..pipelines.components import canonical, components, devices, projections
from ..pipelines.fingerprints import fingerprint, same_weights
from ..pipelines.sizes import native_side
from .backend import PREVIEWS, Backend
from .entries import Stamp, stamp_of
from .messages import short_name
from .request import MAX_SCALE, MAX_SIDE, MAX_STEPS, ActiveAdapter, Request
from .runs import Run, Skipped, free_memory
from .weights import set_weights

log = logging.getLogger(__name__)

LEARN_SECONDS = 1.0
"""So long the device may be held to read what adapters are about."""


class Engine(Backend):
    """Loads the base on first use, and keeps only the adapters of the last request in it."""

    def __init__(self, source: BaseSource) -> None:
        self.source = source
        self._loaded: dict[str, tuple[Stamp, LoadedAdapter]] = {}
        self._loading = threading.Lock()
        self._pipe: Any = None
        self._fingerprints: dict[str, dict[str, float]] = {}
        self._retriever: Retriever | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded on first use."""
        with self._loading:
            if self._pipe is None:
                pipe = self.source.open()
                self._fingerprints = _fingerprints(pipe)
                self._pipe = pipe
            return self._pipe

    def warm_up(self) -> None:
        """Load the base."""
        _ = self.pipe

    @property
    def device(self) -> str:
        """The device for images and trainings."""
        return self.source.device or best_device()

    @property
    def offloaded(self) -> bool:
        """Whether the base uses no accelerator memory."""
        return self._pipe is None or all(device.type == "cpu" for device in devices(self._pipe))

    def offload(self) -> None:
        """Move the base to the CPU until the next :meth:`use`, so that a training has the accelerator to itself."""
        if not self.offloaded:
            self._move_to_cpu()

    def _move_to_device(self) -> None:
        """Move the base to its device, or leave all of it on the CPU: a pipeline on two devices cannot generate."""
        pipe = self.pipe
        try:
            pipe.to(self.device)
        except Exception:
            self._move_to_cpu()
            raise

    def _move_to_cpu(self) -> None:
        self._pipe.to("cpu", silence_dtype_warnings=True)  # it warns about fp16 on the CPU, but nothing runs there
        free_memory()

    @property
    def base_id(self) -> str:
        """The base's name as written into images, without the folders of this machine."""
        return short_name(base_id(self.pipe))

    @property
    def title(self) -> str:
        """The base, as the page names it."""
        return "embedded base model" if self.is_embedded else short_name(str(self.source.base))

    @property
    def steps(self) -> int:
        """The base's default number of steps."""
        return default_steps(self.source.base)

    @property
    def guidance(self) -> float:
        """The base's default guidance scale."""
        return default_guidance(self.source.base)

    @property
    def is_embedded(self) -> bool:
        """Whether this is the base that comes with the package."""
        return is_embedded(self.source.base)

    @cached_property
    def side(self) -> int:
        """The base's default image size in pixels."""
        return native_side(self.pipe)

    @property
    def max_side(self) -> int:
        """Largest side of an image in pixels."""
        return min(MAX_SIDE, MAX_SCALE * self.side)

    def check_size(self, sampling: Sampling, together: int = 1) -> None:
        """Raise :class:`UserError` for images that are too large for the base or for the machine's free memory.

        ``together``: number of images in one call of the pipeline.
        """
        from ..training.step.memory import available

        sampling.check(MAX_STEPS, self.max_side)
        width, height = (
            round((side or self.side) * sampling.hires_scale) for side in (sampling.width, sampling.height)
        )
        if max(width, height) > self.max_side:
            raise UserError(
                f"the second pass would make images of {width}x{height}, and {self.max_side} is the largest side for "
                "this base: choose a smaller factor"
            )
        need = together * width * height * _decoding_bytes(self.pipe.vae)
        free = available(torch.device(self.device))
        if need > free:
            raise UserError(
                f"{together} image{'s' if together > 1 else ''} of {width}x{height} at once need about "
                f"{need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: choose "
                f"{'fewer images' if together > 1 else 'a smaller size'}"
            )

    @cached_property
    def preview(self) -> LatentPreview:
        """The linear map from latents to RGB."""
        return LatentPreview.fit(self.pipe.vae)

    def preview_uri(self, latents: Any, ratio: float = 1.0) -> str:
        """A preview of latents as a data URI; empty if that fails, which must not cost the image."""
        try:
            return self.preview.data_uri(latents, ratio)
        except Exception:
            log.debug("no preview", exc_info=True)  # some VAEs have no scaling factor
            return ""

    def mismatch(self, info: AdapterInfo) -> str | None:
        """Why an adapter does not belong to this base, or None. Compares fingerprints from the header only."""
        _ = self.pipe
        for component, stored in info.base_fingerprint.items():
            own = self._fingerprints.get(component)
            if own is None or not set(stored) <= set(own):
                return f"made for {short_name(info.base)}, which has a different architecture"
            if not same_weights(own, stored):
                return f"made for {short_name(info.base)}, which has different weights"
        return None

    def use(self, adapters: Sequence[ActiveAdapter]) -> list[dict[str, Any]]:
        """Load and activate exactly these adapters, and delete all others. Returns their settings for image files."""
        self._move_to_device()
        active = {adapter.name: adapter for adapter in adapters}
        for name, (stamp, loaded) in list(self._loaded.items()):
            if name not in active or stamp != _stamp(active[name].path):
                delete_adapter(self.pipe, loaded.name)
                del self._loaded[name]
        for name, adapter in active.items():
            if name not in self._loaded:
                stamp = _stamp(adapter.path)
                self._loaded[name] = (stamp, load_adapter(self.pipe, adapter.path, _peft_name(name)))
        set_weights(self.pipe, {_peft_name(name): adapter.weights for name, adapter in active.items()})
        return [_adapter_settings(adapter, self._loaded[name][1]) for name, adapter in active.items()]

    def suggest(self, adapters: Sequence[NamedAdapter], prompt: str, k: int) -> list[tuple[NamedAdapter, float]] | None:
        """The adapters that suit a prompt, with their scores; ``None`` after a time in which not all were read."""
        pipe = self.pipe
        if self._retriever is None:
            self._retriever = Retriever(pipe)
        if self._retriever.learn(adapters, LEARN_SECONDS):
            return None
        return self._retriever.suggest(adapters, prompt, k)

    def make(self, request: Request, out: Path, run: Run) -> list[Path]:
        """Generate the images one by one. Each is written to ``out``, with its settings, before the next one starts."""
        request.check()
        self.check_size(request.sampling)
        settings = self.use(request.adapters)
        check_lengths(self.pipe, [*(prompt for prompt, _ in request.images), request.sampling.negative_prompt])
        files: list[Path] = []
        run.report(images=len(request.images), steps=steps_in_all(request.sampling, request.start))
        for number, (prompt, seed) in enumerate(request.images, 1):
            run.report(image=number, step=0, preview="")
            subjects = self._subjects(prompt, request) if request.subjects_apart else {}
            try:
                run.check()
                with kept_apart(self.pipe, subjects, [prompt]) as apart:
                    image = self.generate(request, prompt, seed, run)
            except Skipped:
                continue
            adapters = [values | _words(values["name"], apart) for values in settings]
            files.append(self._save(out, image, prompt, seed, request, adapters))
            run.report(files=tuple(files), preview="")
        return files

    def _subjects(self, prompt: str, request: Request) -> dict[str, str]:
        """The words of the subjects that a prompt names, by the names of their adapters in the pipeline."""
        infos = {_peft_name(adapter.name): self._loaded[adapter.name][1].info for adapter in request.adapters}
        return subjects_in(prompt, {name: (info.trigger, info.class_word) for name, info in infos.items()})

    def make_batch(self, request: Request, rows: Sequence[Sequence[ActiveAdapter]], out: Path, run: Run) -> list[Path]:
        """Generate all images in one batch, each row with its own adapters; ``request.adapters`` are all of them."""
        request.check()
        self.check_size(request.sampling, together=len(rows))
        settings = {values["name"]: values for values in self.use(request.adapters)}
        prompts, seeds = zip(*request.images, strict=True)
        check_lengths(self.pipe, [*prompts, request.sampling.negative_prompt])
        run.report(images=1, steps=request.sampling.steps, image=1)

        def on_step(step: int, latents: Any) -> None:
            run.check()
            run.report(step=step)

        specs = [[(_peft_name(adapter.name), adapter.weights.unet) for adapter in row] for row in rows]
        with mixed_batch(self.pipe, specs):
            images = sample_images(self.pipe, prompts, seeds, request.sampling, on_step, run.check_stop)
        files = []
        for image, (prompt, seed), row in zip(images, request.images, rows, strict=True):
            adapters = [{**settings[adapter.name], "weight": adapter.weights.unet} for adapter in row]
            files.append(self._save(out, image, prompt, seed, request, adapters))
        run.report(files=tuple(files))
        return files

    def _save(
        self, out: Path, image: Any, prompt: str, seed: int, request: Request, adapters: list[dict[str, Any]]
    ) -> Path:
        settings = describe_image(self.pipe, image, prompt, seed, request.sampling, adapters, request.start)
        return save_new_image(image, out, seed, replace(settings, base=self.base_id))

    def generate(self, request: Request, prompt: str, seed: int, run: Run) -> Any:
        """Generate one image with the active adapters."""
        steps = steps_in_all(request.sampling, request.start)
        every = max(1, steps // PREVIEWS)

        ratio = (request.sampling.width or self.side) / (request.sampling.height or self.side)

        def on_step(step: int, latents: Any) -> None:
            run.check()
            show = step % every == 0 and step < steps
            run.report(step=step, **({"preview": self.preview_uri(latents[0], ratio)} if show else {}))

        return sample_images(self.pipe, [prompt], [seed], request.sampling, on_step, run.check_stop, request.start)[0]


def _fingerprints(pipe: Any) -> dict[str, dict[str, float]]:
    """Fingerprints of all projections, by component and path. Computed once, before any adapter is loaded."""
    return {
        name: {canonical(path): fingerprint(layer, path) for path, layer in projections(module).items()}
        for name, module in components(pipe).items()
    }


def _decoding_bytes(vae: Any) -> int:
    """Estimated peak bytes of a pixel while the VAE decodes it, which needs more than the denoiser.

    At full resolution a convolution's input, its normalized copy and its output are alive, with the channels of the
    block before the last.
    """
    channels = getattr(vae.config, "block_out_channels", (128,))
    return int(3 * channels[min(1, len(channels) - 1)] * vae.dtype.itemsize)


def _adapter_settings(adapter: ActiveAdapter, loaded: LoadedAdapter) -> dict[str, Any]:
    weights = adapter.weights
    return {
        "name": adapter.name, "weight": weights.unet, "sha256": loaded.info.sha256, "path": adapter.path.name,
        "trigger": loaded.trigger, **weights.settings(),
    }  # fmt: skip


def _peft_name(name: str) -> str:
    """A name that PEFT accepts, for adapters whose folders may have any name."""
    return f"app_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _words(name: str, apart: Mapping[str, str]) -> dict[str, str]:
    return {"words": apart[_peft_name(name)]} if _peft_name(name) in apart else {}


def _stamp(path: Path) -> Stamp:
    stamp = stamp_of(path)
    if stamp is None:
        raise UserError(f"the adapter {path.name} is gone: refresh the library")
    return stamp
