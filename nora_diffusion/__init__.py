"""Subject-driven image generation with NoRA and MoR adapters on Stable Diffusion models.

Public names are imported on first use, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .versions import check_installed

__version__ = "0.1.0"

check_installed()

_HOMES = {
    "errors": ("UserError",),
    "adapters": (
        "AdapterConfig", "dora", "dylora", "in_blocks", "lora", "lora_mini", "lora_xs", "malora", "melora", "milora",
        "moe_lora", "mor", "mora", "nora", "nora_input",
    ),
    "pipelines.calibration": ("Calibration",),
    "pipelines.base": ("load_base", "open_pipeline"),
    "loaders": (
        "add_adapter", "delete_adapter", "exclusive", "list_adapters", "load_adapter", "prepare_for_compile",
        "save_adapter", "set_adapters", "set_rank",
    ),
    "formats.adapter_file": ("AdapterInfo", "inspect_adapter"),
    "conversion.export": ("export_lora",),
    "loaders.gates": ("router_summary",),
    "loaders.mixed_batch": ("mixed_batch",),
    "generation.apart": ("subjects_apart",),
    "generation.derived": ("image_pipeline",),
    "generation.generate": ("GenerateConfig", "generate"),
    "generation.settings": ("Sampling",),
    "generation.start_image": ("StartImage",),
    "composition.angles": ("overlap", "overlap_files"),
    "composition.mixing": ("mix", "mix_files"),
    "conversion.import_lora": ("import_lora",),
    "formats.pack_writing": ("add_to_pack", "create_pack", "extract_from_pack", "remove_from_pack"),
    "formats.packs": ("list_pack",),
    "training": ("TrainConfig", "train"),
    "training.gates.learn": ("GateConfig", "learn_gates"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .adapters import (
        AdapterConfig,
        dora,
        dylora,
        in_blocks,
        lora,
        lora_mini,
        lora_xs,
        malora,
        melora,
        milora,
        moe_lora,
        mor,
        mora,
        nora,
        nora_input,
    )
    from .composition.angles import overlap, overlap_files
    from .composition.mixing import mix, mix_files
    from .conversion.export import export_lora
    from .conversion.import_lora import import_lora
    from .errors import UserError
    from .formats.adapter_file import inspect_adapter
    from .formats.adapter_info import AdapterInfo
    from .formats.pack_writing import add_to_pack, create_pack, extract_from_pack, remove_from_pack
    from .formats.packs import list_pack
    from .generation.apart import subjects_apart
    from .generation.derived import image_pipeline
    from .generation.generate import GenerateConfig, generate
    from .generation.settings import Sampling
    from .generation.start_image import StartImage
    from .loaders import (
        add_adapter,
        delete_adapter,
        exclusive,
        list_adapters,
        load_adapter,
        prepare_for_compile,
        save_adapter,
        set_adapters,
        set_rank,
    )
    from .loaders.gates import router_summary
    from .loaders.mixed_batch import mixed_batch
    from .pipelines.base import load_base, open_pipeline
    from .pipelines.calibration import Calibration
    from .training import TrainConfig, train
    from .training.gates.learn import GateConfig, learn_gates

__all__ = [
    "AdapterConfig", "AdapterInfo", "Calibration", "GateConfig", "GenerateConfig", "Sampling", "StartImage",
    "TrainConfig", "UserError", "add_adapter", "add_to_pack", "create_pack", "delete_adapter", "dora", "dylora",
    "exclusive", "export_lora", "extract_from_pack", "generate", "image_pipeline", "import_lora", "in_blocks",
    "inspect_adapter", "learn_gates", "list_adapters", "list_pack", "load_adapter", "load_base", "lora", "lora_mini",
    "lora_xs", "malora", "melora", "milora", "mix", "mix_files", "mixed_batch", "moe_lora", "mor", "mora", "nora",
    "nora_input", "open_pipeline", "overlap", "overlap_files", "prepare_for_compile", "remove_from_pack",
    "router_summary", "save_adapter", "set_adapters", "set_rank", "subjects_apart", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
