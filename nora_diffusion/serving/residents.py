"""Which subjects are where: in the pipeline, in host memory, or only in their files.

A subject that a picture needs is put into a slot of the pipeline. The least recently used slot makes room: its subject
stays in host memory, from where it comes back in about a millisecond, until its bytes are needed for others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from ..errors import UserError, out_of_memory
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
        self._used: OrderedDict[Source, Slot] = OrderedDict()
        self._free: list[Slot] = []
        self._newest: dict[str, Source] = {}
        self.hits = self.loads = 0

    @property
    def loaded(self) -> Mapping[Source, Slot]:
        """The subjects in the pipeline, the least recently used first."""
        return self._used

    def get(self, source: Source, in_use: Collection[Source]) -> Slot:
        """The slot of a subject, which is loaded if it has none. ``in_use``: subjects that keep their slots.

        Raises :class:`UserError` for a file that cannot be loaded, and if all slots are in use.
        """
        if source in self._used:
            self.hits += 1
            self._used.move_to_end(source)
            return self._used[source]
        older = self._newest.get(source.path)
        if older is not None and older != source and older not in in_use:
            self.forget([older])
        self._newest[source.path] = source
        held = self.host.get(source)
        try:
            slot = self._placed(source, held, in_use)
        except Exception as error:
            if not out_of_memory(error) or self._oldest(in_use) is None:
                raise
            while self._oldest(in_use) is not None:  # whatever no picture needs makes room
                self._evict(self._oldest(in_use))
            self._delete_free()
            slot = self._placed(source, held, in_use)
        self._used[source] = slot
        self.loads += 1
        return slot

    def _placed(self, source: Source, held: Held | None, in_use: Collection[Source]) -> Slot:
        if (slot := self._take_free(held)) is not None:
            return self._filled(slot, held)
        while len(self._used) + len(self._free) >= self.most:
            if self._free:
                self._slots.delete(self._free.pop())
                continue
            self._evict(self._oldest(in_use, held))
            if (slot := self._take_free(held)) is not None:
                return self._filled(slot, held)
        return self._slots.load(source, held)

    def _filled(self, slot: Slot, held: Held | None) -> Slot:
        assert held is not None
        self._slots.fill(slot, held)
        return slot

    def _take_free(self, held: Held | None) -> Slot | None:
        slot = next((own for own in self._free if held is not None and own.structure == held.structure), None)
        if slot is not None:
            self._free.remove(slot)
        return slot

    def _oldest(self, in_use: Collection[Source], held: Held | None = None) -> Source | None:
        """The subject whose slot is taken next: the oldest one of the same structure, or the oldest."""
        idle = [source for source in self._used if source not in in_use]
        alike = (own for own in idle if held is not None and self._used[own].structure == held.structure)
        return next(alike, next(iter(idle), None))

    def _evict(self, source: Source | None) -> None:
        if source is None:
            raise UserError(f"all {self.most} loaded subjects are in use: allow more, or send fewer at once")
        slot = self._used.pop(source)
        if slot.structure is None:
            self._slots.delete(slot)
        else:
            self._free.append(slot)

    def _delete_free(self) -> None:
        for slot in self._free:
            self._slots.delete(slot)
        self._free.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget(self, sources: Iterable[Source]) -> None:
        """Remove subjects from the pipeline and from host memory; nothing of them stays."""
        for source in sources:
            self.host.forget(source)
            self._newest.pop(source.path, None)
            if source in self._used:
                self._slots.clear(self._used[source])
                self._evict(source)

    def known(self) -> set[Source]:
        """The subjects in the pipeline or in host memory."""
        return {*self._used, *self.host.sources}
