"""Subject-driven image generation with NoRA and MoR adapters on Stable Diffusion models.

The public names are loaded when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "errors": ("UserError",),
    "adapters": ("AdapterConfig", "lora", "lora_xs", "mor", "nora"),
    "base": ("load_base", "open_pipeline"),
    "loaders": (
        "add_adapter", "delete_adapter", "list_adapters", "load_adapter", "save_adapter", "set_adapters",
    ),
    "adapter_file": ("AdapterInfo", "inspect_adapter"),
    "export": ("export_lora",),
    "training": ("TrainConfig", "train"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .adapter_file import AdapterInfo, inspect_adapter
    from .adapters import AdapterConfig, lora, lora_xs, mor, nora
    from .base import load_base, open_pipeline
    from .errors import UserError
    from .export import export_lora
    from .loaders import add_adapter, delete_adapter, list_adapters, load_adapter, save_adapter, set_adapters
    from .training import TrainConfig, train

__all__ = [
    "AdapterConfig", "AdapterInfo", "TrainConfig", "UserError", "add_adapter", "delete_adapter", "export_lora",
    "inspect_adapter", "list_adapters", "load_adapter", "load_base", "lora", "lora_xs", "mor", "nora",
    "open_pipeline", "save_adapter", "set_adapters", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
