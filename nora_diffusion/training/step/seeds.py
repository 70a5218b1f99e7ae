"""Seeds as a function of a run's seed and of names. Needs no torch, unlike the generators that they seed."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: object) -> int:
    """Derive an independent seed in ``[0, 2^63)``, as in ``derive(seed, "noise", step, micro)``."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
