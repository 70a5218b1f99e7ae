"""``--auto``: adapters for prompts that name none. No torch before a prompt is asked about."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.captions import has_word, word_pattern
from ...errors import UserError
from ...formats.adapter_info import AdapterInfo
from ..library import NamedAdapter
from ..tags import Tag
from .settings import Auto

if TYPE_CHECKING:
    from .retriever import Retriever

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was chosen for a prompt: the prompt with triggers, the adapters with their weights, and their scores."""

    prompt: str
    active: dict[NamedAdapter, Tag]
    scores: tuple[float, ...] = ()

    def __str__(self) -> str:
        if not self.active:
            return f"no adapter of the library suits {self.prompt!r}: it is generated without one"
        found = zip(self.active.items(), self.scores, strict=True)
        chosen = ", ".join(
            f"{adapter.name} (score {score:.2f}, weight {tag.unet:.3g})" for (adapter, tag), score in found
        )
        return f"chosen for {self.prompt!r}: {chosen}"


def chooser(pipe: Any, auto: Auto, library: Sequence[NamedAdapter]) -> Callable[[str], Choice]:
    """A function that chooses among the adapters of a library. What cannot be used is logged and left out."""
    from .retriever import Retriever
    from .usable import usable

    fitting, notes = usable(pipe, library)
    for note in notes:
        log.warning(note)
    retriever = Retriever(pipe)
    return lambda prompt: choose(retriever, auto, fitting, prompt)


def choose(retriever: Retriever, auto: Auto, adapters: Sequence[NamedAdapter], prompt: str) -> Choice:
    """The adapters for a prompt. Raises :class:`UserError` if the mode is not possible with them."""
    found = retriever.suggest(adapters, prompt, 1 if auto.mode == "selection" else auto.k)
    weight = 1 / len(found) if found else 1.0
    active = {adapter: Tag(adapter.name, weight, weight) for adapter, _ in found}
    for adapter in active:
        if auto.mode == "fusion" and len(found) > 1 and _has_router(adapter.info):
            raise UserError(
                f"fusion is a mean of weights, and {adapter.name}, one of the chosen adapters, has a router and so no "
                "weight of its own: use --auto_mode mixture"
            )
    infos = [adapter.info for adapter in active if adapter.info]
    return Choice(with_triggers(prompt, infos), active, tuple(score for _, score in found))


def with_triggers(prompt: str, infos: Sequence[AdapterInfo]) -> str:
    """The prompt with each adapter's trigger before its class word, where the prompt has that word without the trigger.

    An adapter has learned its subject under the trigger and shows less of it without. Other prompts stay as they are.
    """
    for info in infos:
        trigger, word = info.trigger.strip(), info.class_word.strip()
        if not trigger or not word or "," in trigger + word or not has_word(prompt, word):
            continue
        if not re.search(rf"{word_pattern(trigger)}\s+{word_pattern(word)}", prompt, re.IGNORECASE):
            before, named, after = re.split(f"({word_pattern(word)})", prompt, maxsplit=1, flags=re.IGNORECASE)
            prompt = f"{before}{trigger} {named}{after}"
    return prompt


def _has_router(info: AdapterInfo | None) -> bool:
    return info is not None and info.is_ours and any(axes.router != "none" for axes in info.axes.values())
