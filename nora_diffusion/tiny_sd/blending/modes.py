"""Ways to apply two adapters to one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...generation.apart import subjects_apart
from ...loaders import set_adapters
from ...pipelines.components import components, nora_layers
from . import gates
from .guidance import guided
from .pairs import Pair

Subjects = Mapping[str, str]
"""The words of the left and of the right subject, by adapter."""
Mode = Callable[[Any, Subjects, Pair], AbstractContextManager[None]]
LOW = 0.6
"""Weight of both adapters in ``lower``."""


def plain(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Both adapters act everywhere."""
    return nullcontext()


@contextmanager
def lower(pipe: Any, subjects: Subjects, pair: Pair) -> Iterator[None]:
    """Both act everywhere, at a lower weight."""
    set_adapters(pipe, list(subjects), LOW)
    try:
        yield
    finally:
        set_adapters(pipe, list(subjects))


@contextmanager
def disjoint(pipe: Any, subjects: Subjects, pair: Pair) -> Iterator[None]:
    """Both act everywhere, in orthogonal subspaces of the core: NoRA adapters with one basis.

    Of each core ``C = B_in A_in`` the leading ``r / 4`` singular directions are kept; on either side those of the two
    cores are replaced by the nearest orthonormal set (Löwdin), moved by the same amount for both.
    """
    before: list[tuple[Tensor, Tensor]] = []
    one, two = subjects
    unet = components(pipe)["unet"]
    for layer in nora_layers(unet, one).values():
        cores: list[Any] = [layer.nora_delta[name].core for name in (one, two)]
        before += [(p.data, p.data.clone()) for core in cores for p in (core.A_in, core.B_in)]
        _make_disjoint(*cores)
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


@torch.no_grad()
def _make_disjoint(*cores: Any) -> None:
    found = []
    for core in cores:
        u, s, vh = torch.linalg.svd((core.B_in @ core.A_in).float())
        kept = len(s) // 4
        found.append((u[:, :kept], s[:kept], vh[:kept].T))
    left, right = (_orthonormal([own[side] for own in found]) for side in (0, 2))
    for core, u, v, (_, s, _) in zip(cores, left, right, found, strict=True):
        core.A_in.zero_()[: len(s)] = s.sqrt().unsqueeze(1) * v.T
        core.B_in.zero_()[:, : len(s)] = u * s.sqrt()


def _orthonormal(bases: list[Tensor]) -> tuple[Tensor, ...]:
    u, _, vh = torch.linalg.svd(torch.cat(bases, 1), full_matrices=False)
    return (u @ vh).split([basis.shape[1] for basis in bases], 1)


def attend(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Both act everywhere, and Attend-and-Excite guides the latents."""
    return guided(pipe, subjects)


def gated(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Learned gates decide how much each adapter counts at a position (MoLE), learned from prompts alone."""
    return gates.gated(pipe, subjects, pair)


def gated_true(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """The same, learned from true images of both subjects."""
    return gates.gated(pipe, subjects, pair, true_images=True)


def words(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Each acts on its own words in the cross-attention, and everywhere in all other layers."""
    return subjects_apart(pipe, subjects, dict.fromkeys(subjects, torch.ones(1, 1)))


def given(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Each acts on its own words, and in its half of the image: regions that a user gives."""
    left = ((torch.arange(64) < 35) * 1.0).expand(64, -1)
    return subjects_apart(pipe, subjects, dict(zip(subjects, (left, 1 - left), strict=True)))


def apart(pipe: Any, subjects: Subjects, pair: Pair) -> AbstractContextManager[None]:
    """Each acts on its own words, and in the region that the cross-attention shows: the default of ``generate``."""
    return subjects_apart(pipe, subjects)


MODES: dict[str, Mode] = {
    "plain": plain, "lower": lower, "disjoint": disjoint, "words": words, "attend": attend,
    "gated": gated, "gated-true": gated_true, "given": given, "apart": apart,
}  # fmt: skip
