"""Which replica a picture goes to: one order of the replicas for each subject. Needs no Ray."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

BALANCE = 1.25
"""A replica takes at most this times the mean number of pictures while it is chosen for its subject."""
FEW = 4
"""So many pictures are always welcome: they cost little more than one, and waver less than a mean of few."""


def ranked(subject: str, loads: Mapping[str, int]) -> list[str]:
    """The replicas in the order of preference for a subject. ``loads``: the pictures of each.

    Rendezvous hashing (Thaler, Ravishankar 1998): a subject prefers the replica with the highest hash of both names, so
    it stays there while other replicas come and go. With bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): those
    that have more than their share come last, so that a popular subject is loaded by several replicas.
    """
    order = sorted(loads, key=lambda name: hashlib.sha256(f"{name}\0{subject}".encode()).digest(), reverse=True)
    share = max(FEW, math.ceil(BALANCE * (sum(loads.values()) + 1) / max(1, len(loads))))
    return sorted(order, key=lambda name: loads[name] >= share)  # stable
