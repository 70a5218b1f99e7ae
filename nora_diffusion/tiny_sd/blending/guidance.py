"""Attend-and-Excite (arXiv 2301.13826): latents that make the prompt's subjects be attended to."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...generation.apart import find_words
from ...generation.regions import AttentionMaps, cross_attentions

STEP, LAST = 20.0, 0.5
"""Step size, falling linearly to its half, over the first half of the steps: as published."""


class Guide:
    """After each step it moves the latents ``z`` down the gradient of ``max_k (1 - max_i a_k(i))``.

    ``a_k(i)``: attention of position ``i`` to the words of subject ``k``, averaged over heads and layers.
    """

    def __init__(self, pipe: Any, subjects: Mapping[str, str]) -> None:
        self.pipe, self.maps = pipe, AttentionMaps()
        self.ids = {name: pipe.tokenizer(text, add_special_tokens=False).input_ids for name, text in subjects.items()}
        self.words: dict[str, Tensor] = {}
        self.states: Tensor | None = None
        self.steps = 0

    def read_words(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by the text encoder; its first call reads the prompts."""
        if not self.words:
            self.words = {name: find_words(args[0], own) for name, own in self.ids.items()}

    def read_states(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by the UNet: keep the states of the prompts, not the negative ones."""
        states = kwargs["encoder_hidden_states"]
        self.states = states[-len(next(iter(self.words.values()))) :]

    @torch.enable_grad()
    def moved(self, latents: Tensor) -> Tensor:
        """The latents of the next step."""
        scheduler, half = self.pipe.scheduler, len(self.pipe.scheduler.timesteps) // 2
        self.steps += 1
        if self.steps >= half:
            return latents
        z = latents.detach().requires_grad_()
        self.maps.clear()
        self.maps.start((z.shape[-2], z.shape[-1]), self.words)
        self.pipe.unet(z, scheduler.timesteps[self.steps], encoder_hidden_states=self.states)
        strongest = [own.flatten(1).amax(1) / self.maps.count for own in self.maps.maps().values()]
        loss = (1 - torch.stack(strongest)).amax(0).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        return latents - STEP * (1 - LAST * self.steps / half) * gradient


@contextmanager
def guided(pipe: Any, subjects: Mapping[str, str]) -> Iterator[None]:
    """Both adapters act everywhere, and the latents are guided."""
    guide, step = Guide(pipe, subjects), pipe.scheduler.step

    @functools.wraps(step)  # pipelines inspect its signature
    def guided_step(*args: Any, **kwargs: Any) -> Any:
        return (guide.moved(step(*args, **kwargs)[0]),)

    with ExitStack() as stack:
        for attention in cross_attentions(pipe.unet).values():
            for undo in guide.maps.watch(attention):
                stack.callback(undo)
        for module, read in ((pipe.text_encoder, guide.read_words), (pipe.unet, guide.read_states)):
            stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        pipe.scheduler.step = guided_step
        stack.callback(vars(pipe.scheduler).pop, "step")
        yield
