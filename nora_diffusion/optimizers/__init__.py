"""Optimizers for low-rank pairs ``dW = s B A``, in plain torch; usable without the rest of the package.

>>> pairs, others = pairs_of(model.named_parameters(), scale=alpha / r)
>>> optimizer = LoRAPro([*pairs, *others], lr=1e-3)
"""

from .lora_pro import LoRAPro
from .lora_rite import LoRARite
from .pairs import Pair, pairs_of

__all__ = ["LoRAPro", "LoRARite", "Pair", "pairs_of"]
