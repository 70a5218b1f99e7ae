"""Adapters in a diffusers pipeline: add, load, save, set weights, delete, list."""

from .active import active_adapters, delete_adapter, list_adapters, set_adapters
from .add import add_adapter, trainable_parameters
from .compiling import prepare_for_compile
from .load import LoadedAdapter, check_adapter, load_adapter
from .locking import exclusive
from .rank import set_rank
from .save import save_adapter
from .sharing import pairs_from

__all__ = [
    "LoadedAdapter",
    "active_adapters",
    "add_adapter",
    "check_adapter",
    "delete_adapter",
    "exclusive",
    "list_adapters",
    "load_adapter",
    "pairs_from",
    "prepare_for_compile",
    "save_adapter",
    "set_adapters",
    "set_rank",
    "trainable_parameters",
]
