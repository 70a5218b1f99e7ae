"""Which subjects are where: in the pipeline, in host memory, or only in their files.

A subject that a picture needs is put into a slot of the pipeline: if possible that of the least recently used subject
of its structure, if no picture at work needs that one. It stays in host memory, from where it comes back in about a
millisecond, until its bytes are needed for others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import UserError, out_of_memory
from ..formats.adapter_info import AdapterInfo
from .host import Held, HostCache
from .slots import Slot, Slots
from .subjects import Source


class Residents:
    """The subjects of a pipeline. ``slots``: loaded ones at most; ``host_bytes``: of host memory at most.

    ``before``: called before the pipeline's modules change; it does not change while slots are filled.
    """

    def __init__(self, pipe: Any, slots: int, host_bytes: int, before: Callable[[], None]) -> None:
        self.most, self.host = slots, HostCache(pipe, host_bytes)
        self._slots = Slots(pipe, before)
        self._used: dict[Source, Slot] = {}
        self._free: list[Slot] = []
        self._newest: dict[str, Source] = {}
        self.hits = self.loads = 0

    @property
    def loaded(self) -> Mapping[Source, Slot]:
        """The subjects in the pipeline, the least recently used first; ``list`` of it is safe in any thread."""
        return self._used

    def get(self, source: Source, in_use: Collection[Source]) -> Slot:
        """The slot of a subject, which is loaded if it has none. ``in_use``: subjects that keep their slots.

        Raises :class:`UserError` for a file that cannot be loaded, and if all slots are in use.
        """
        if source in self._used:
            self.hits += 1
            self._used[source] = self._used.pop(source)
            return self._used[source]
        older = self._newest.get(source.path)
        if older is not None and older != source and older not in in_use:
            self.forget([older])
        held = self.host.get(source)
        try:
            slot: Slot | None = self._placed(held, in_use)
        except Exception as error:
            if not out_of_memory(error) or not (self._free or self._used.keys() - set(in_use)):
                raise
            slot = None  # tried again below: here the error holds the memory of the first attempt
        if slot is None:
            self._delete_idle(in_use)
            slot = self._placed(held, in_use)
        self._used[source], self._newest[source.path] = slot, source
        self.loads += 1
        return slot

    def fit(self, sources: Collection[Source], in_use: Collection[Source]) -> bool:
        """Whether subjects can be loaded beside those in use: there are slots, and no new token is in one of theirs."""
        if len({*sources, *in_use}) > self.most:
            return False
        words = [self._used[own].info for own in in_use if own not in sources and self._used[own].info.tokens]
        try:
            return not words or not any(_overlap(self.host.get(own).info, other) for own in sources for other in words)
        except (UserError, OSError):  # told when it is loaded
            return True

    def _placed(self, held: Held, in_use: Collection[Source]) -> Slot:
        """A slot with the subject. Values are exchanged where possible: a new slot takes fifty times as long."""
        idle = [own for own in self._used if own not in in_use]
        if (slot := self._slot_like(held, idle)) is not None:
            self._slots.fill(slot, held)
            self._free.remove(slot)
            return slot
        for own in [own for own in idle if _overlap(self._used[own].info, held.info)]:
            idle.remove(own)
            self._slots.delete(self._used.pop(own))
        while len(self._used) + len(self._free) >= self.most:
            if not self._free and not idle:
                raise UserError(f"all {self.most} loaded subjects are in use: allow more, or send fewer at once")
            self._slots.delete(self._free.pop() if self._free else self._used.pop(idle.pop(0)))
        return self._slots.load(held)

    def _slot_like(self, held: Held, idle: Sequence[Source]) -> Slot | None:
        """A free slot that can take the values, perhaps after the oldest idle subject has left it."""
        found = next((slot for slot in self._free if slot.structure == held.structure), None)
        alike = (own for own in idle if self._used[own].structure == held.structure)
        if found is None and (oldest := next(alike, None)) is not None:
            found = self._used.pop(oldest)
            self._free.append(found)
        return found

    def _delete_idle(self, in_use: Collection[Source]) -> None:
        """Delete all slots that no picture needs."""
        for slot in [*self._free, *(self._used.pop(own) for own in list(self._used) if own not in in_use)]:
            self._slots.delete(slot)
        self._free.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget(self, sources: Iterable[Source]) -> None:
        """Remove subjects from the pipeline and from host memory; nothing of them stays."""
        for source in sources:
            self.host.forget(source)
            self._newest.pop(source.path, None)
            if (slot := self._used.pop(source, None)) is None:
                continue
            if slot.structure is None:
                self._slots.delete(slot)
            else:
                self._slots.clear(slot)
                self._free.append(slot)

    def known(self) -> set[Source]:
        """The subjects of which anything is known here, those in the pipeline or in host memory among them."""
        return {*self._used, *self.host.sources, *self._newest.values()}


def _overlap(one: AdapterInfo, other: AdapterInfo) -> bool:
    """Whether new tokens of two adapters cannot be in one tokenizer."""
    return any(a in b or b in a for a in one.tokens for b in other.tokens)
