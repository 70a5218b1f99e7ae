"""How long a hook on a model lives: as long as the deltas that need it."""

from __future__ import annotations

import weakref
from collections.abc import Callable


class Lease:
    """Shared by all deltas that need a hook; when the last of them is gone, ``end`` removes the hook.

    Adapters are removed by this package, by PEFT and by diffusers, in several ways, some of which only drop modules.
    ``end`` must not hold a delta. A copy or pickle of a model has a lease that ends nothing: its hook stays.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        weakref.finalize(self, end).atexit = False
