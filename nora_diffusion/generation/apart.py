"""Several subjects in one image without blending: each adapter acts where its subject is.

A layer with the adapters ``k`` computes ``y = W x + sum_k m_k s_k delta_k(x)`` with a mask ``m_k`` over its positions:
over the words of the subject in ``to_k`` and ``to_v`` of cross-attention and in text encoders, over the region of the
subject in all other layers of a UNet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.tuner.row_plan import MaskedPlan
from ..data.captions import has_word
from ..errors import UserError, quoted
from ..loaders.active import active_adapters
from ..loaders.locking import exclusive
from ..loaders.mixed_batch import serving
from ..loaders.tokens import expanded
from ..pipelines.components import Modules, canonical, components, nora_layers, refuse_merged, tokenizer_name
from ..pipelines.names import DENOISERS
from .regions import AttentionMaps, cross_attentions, grid, resized

log = logging.getLogger(__name__)

WARMUP = 0.25
"""Share of the steps until the attention shows where the subjects are; so long their adapters act everywhere."""
Words = dict[str, list[int]]


def find_words(ids: Tensor, words: Sequence[int]) -> Tensor:
    """``[n, T]``: 1 at each occurrence of the token ids ``words`` in the prompts ``ids [n, T]``, else 0."""
    mask = torch.zeros(ids.shape, device=ids.device)
    for start in range(ids.shape[1] - len(words) + 1):
        window = ids[:, start : start + len(words)]
        mask[:, start : start + len(words)] += (window == torch.tensor(words, device=ids.device)).all(1, keepdim=True)
    return mask.clamp(max=1)


def token_ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    """The tokens of words as they stand in a prompt; those of a new token with several vectors are all of them."""
    (full,) = expanded(pipe, [text], tokenizer)
    return list(tokenizer(full, add_special_tokens=False).input_ids)


def words_in(pipe: Any, prompts: Sequence[str], subjects: Mapping[str, str]) -> dict[str, Tensor]:
    """Where the words of each subject stand in the prompts as the denoiser gets them, ``[n, T]`` by adapter."""
    tokenizer = getattr(pipe, "tokenizer", None) or pipe.tokenizer_2
    read = tokenizer(expanded(pipe, prompts, tokenizer), padding="max_length", truncation=True, return_tensors="pt")
    return {name: find_words(read.input_ids, token_ids(pipe, tokenizer, text)) for name, text in subjects.items()}


def unnamed(prompts: Sequence[str], subjects: Mapping[str, str], found: Mapping[str, Tensor]) -> str | None:
    """The first subject that a prompt does not name, in words."""
    for name, mask in found.items():
        for prompt, named in zip(prompts, mask.amax(1).tolist(), strict=True):
            if not named:
                return f"the prompt {quoted(prompt)} does not name the subject of {name!r}: write {subjects[name]!r}"
    return None


class EncoderPlan(MaskedPlan):
    """In a text encoder: each subject's adapter acts on the tokens of its own words."""

    def __init__(self, names: Sequence[str], words: Words) -> None:
        super().__init__(names)
        self._ids, self._words = words, dict[str, Tensor]()

    def begin(self, first: Tensor) -> None:
        """As inherited, for the token ids ``[n, T]``."""
        super().begin(first)
        self._words = {name: find_words(first, own) for name, own in self._ids.items()}

    def mask(self, path: str, name: str, positions: Sequence[int]) -> Tensor | None:
        """As inherited."""
        own = self._words.get(name)
        return None if own is None or tuple(positions) != own.shape[1:] else own.unsqueeze(-1)


class DenoiserPlan(MaskedPlan):
    """In a UNet: each subject's adapter acts on its own words and in its own region.

    ``given``: the regions by adapter, ``[h, w]``; ``None``: found from the attention.
    """

    def __init__(
        self,
        pipe: Any,
        unet: nn.Module,
        names: Sequence[str],
        subjects: Mapping[str, str],
        given: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(names)
        self.pipe, self._subjects, self.given = pipe, subjects, given
        self.maps = AttentionMaps()
        self._text = {f"{path}.{name}" for path in cross_attentions(unet) for name in ("to_k", "to_v")}
        self._words: dict[str, Tensor] = {}
        self._regions: dict[str, Tensor] = {}
        self._masks: dict[tuple[object, ...], Tensor | None] = {}
        self._latents = (0, 0)
        self._step = 0

    def read_prompts(self, prompts: str | list[str] | None) -> None:
        """Find the words of the subjects. Raises :class:`UserError` for a prompt without them, or that is not text."""
        if prompts is None:
            raise UserError("subjects_apart needs the prompt as text, to find the words of the subjects in it")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._words = words_in(self.pipe, texts, self._subjects)
        problem = unnamed(texts, self._subjects, self._words)
        if problem:
            raise UserError(problem)
        self.specs = self.specs[:1] * len(texts)
        self.maps.clear()
        self._step = 0

    def begin(self, first: Tensor) -> None:
        """As inherited, for the latents ``[n, c, h, w]``."""
        if not self._words:
            raise UserError("inside subjects_apart call the pipeline, not its denoiser")
        super().begin(first)
        self._latents, self._masks = (first.shape[-2], first.shape[-1]), {}
        words = {name: mask.repeat_interleave(self.repeats, 0) for name, mask in self._words.items()}
        self._regions = self._found(len(next(iter(words.values()))))
        self.maps.start(self._latents, words)
        self._step += 1

    def _found(self, images: int) -> dict[str, Tensor]:
        if self.given is not None:
            return {name: region.expand(images, -1, -1) for name, region in self.given.items()}
        return self.maps.regions() if self._step >= WARMUP * self._steps() else {}

    def _steps(self) -> int:
        """The steps of this call: from an image, the first ones are left out."""
        scheduler = self.pipe.scheduler
        return len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)

    def mask(self, path: str, name: str, positions: Sequence[int]) -> Tensor | None:
        """As inherited. Negative rows of guidance have the regions of the positive ones, and no words."""
        key = canonical(path) in self._text, name, tuple(positions)
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def _mask(self, is_text: bool, name: str, positions: tuple[int, ...]) -> Tensor | None:
        rows = len(self.batch)
        if is_text:
            own = self._words.get(name)
            if own is None:
                return None
            own = own.repeat_interleave(self.repeats, 0)
            return torch.cat([own.new_zeros(rows - len(own), own.shape[1]), own]).unsqueeze(-1)
        region = self._regions.get(name)
        size = positions if len(positions) == 2 else grid(self._latents, positions[0]) if positions else None
        if region is None or size is None:
            return None
        own = resized(region, (size[0], size[1]))
        return own.repeat(rows // len(own), 1, 1).reshape(rows, *positions, 1)


@contextmanager
def subjects_apart(
    pipe: Any, subjects: Mapping[str, str], regions: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """``with subjects_apart(pipe, {"dog": "sks dog", "cat": "zwx cat"}): pipe("a sks dog and a zwx cat")``.

    ``subjects``: active adapters with the words of their subjects in the prompt. Each acts on its own words and in its
    own region only; other active adapters act everywhere. Weights stay those of ``set_adapters``. ``regions``: where
    each subject is, ``[h, w]`` with values from 0 to 1 at any resolution (default: found from the cross-attention,
    after a quarter of the steps).

    Raises :class:`UserError` for a base that is not a UNet with cross-attention (SD3, Flux), for an ordinary LoRA or an
    adapter that is not active, and for a prompt that does not name a subject.
    """
    with exclusive(pipe), ExitStack() as stack:
        modules = components(pipe)
        _check(modules, subjects, regions)
        for component, module in modules.items():
            names = [name for name in active_adapters(module) if nora_layers(module, name)]
            if component not in DENOISERS:
                tokenizer = getattr(pipe, tokenizer_name(component))
                words = {name: token_ids(pipe, tokenizer, text) for name, text in subjects.items()}
                stack.enter_context(serving(pipe, component, module, EncoderPlan(names, words)))
                continue
            plan = DenoiserPlan(pipe, module, names, subjects, regions)
            stack.enter_context(serving(pipe, component, module, plan))
            for attention in cross_attentions(module).values():
                for undo in plan.maps.watch(attention) if regions is None else ():
                    stack.callback(undo)
        yield


@contextmanager
def kept_apart(pipe: Any, subjects: Mapping[str, str], prompts: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """:func:`subjects_apart` for these prompts where it is possible; yields the subjects that are kept apart.

    Where it is not possible, all adapters act everywhere, with a warning; also without subjects, which is no problem.
    """
    problem = None
    if subjects:
        problem = why_not(components(pipe), subjects) or unnamed(prompts, subjects, words_in(pipe, prompts, subjects))
    if problem:
        log.warning("the subjects may blend into each other: %s", problem)
    if problem or not subjects:
        yield {}
        return
    with subjects_apart(pipe, subjects):
        yield subjects


def _check(modules: Modules, subjects: Mapping[str, str], regions: Mapping[str, Tensor] | None) -> None:
    refuse_merged(modules)
    problem = why_not(modules, subjects)
    if problem:
        raise UserError(problem)
    for name, words in subjects.items():
        if not isinstance(words, str) or not words.strip():
            raise UserError(f"subjects_apart: the words of {name!r} are {quoted(words)}: give those in the prompt")
    if regions is None:
        return
    if set(regions) != set(subjects):
        raise UserError(f"regions are given for {sorted(regions)}, and the subjects are {sorted(subjects)}")
    for name, region in regions.items():
        if not isinstance(region, Tensor) or region.ndim != 2 or not bool(((region >= 0) & (region <= 1)).all()):
            raise UserError(f"the region of {name!r} must be a tensor [h, w] with values from 0 to 1")


def why_not(modules: Modules, names: Iterable[str]) -> str | None:
    """Why these adapters cannot be kept apart in a pipeline; ``None`` if they can."""
    component = next(name for name in modules if name in DENOISERS)
    model = modules[component]
    if not hasattr(model, "down_blocks") or not cross_attentions(model):
        return (
            f"subjects can be kept apart in UNets with cross-attention only (Stable Diffusion 1, 2 and XL): the "
            f"{type(model).__name__} joins text and image in one sequence"
        )
    for name in names:
        if not any(nora_layers(module, name) for module in modules.values()):
            return f"{name!r} is no adapter of this toolkit in this pipeline, so it acts on the whole image"
    return None


def subjects_in(prompt: str, adapters: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The words by which a prompt names the subject of each adapter; empty unless it names two or more.

    ``adapters``: trigger and class word by adapter name. The words are trigger and class word where they stand together
    ("sks dog"), else the trigger. Adapters that cannot be told apart by their words are left out.
    """
    words = {}
    for name, (trigger, class_word) in adapters.items():
        together = f"{trigger} {class_word}"
        for phrase in (together, trigger) if class_word else (trigger,):
            if trigger and has_word(prompt, phrase):
                words[name] = phrase
                break
    found = {
        name: own for name, own in words.items()
        if not any(has_word(own, other) or has_word(other, own) for key, other in words.items() if key != name)
    }  # fmt: skip
    return found if len(found) > 1 else {}
