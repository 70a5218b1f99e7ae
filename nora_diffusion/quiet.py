"""Hide warnings and progress bars of other libraries that a user cannot act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# (logger, part of the text). transformers and diffusers import torchao whenever it is installed.
KNOWN_WARNINGS = (
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),  # we warn ourselves
    ("torchao", "Failed to load"),  # its GPU kernels, on a machine without a GPU
    ("torchao", "Skipping import of cpp extensions"),  # the same kernels, with torch before 2.11
    ("torchao.kernel.intmm", "Detected no triton"),
    ("torch.utils._pytree", "is an Enum subclass"),  # from torchao registering its enums
    ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects"),
    ("diffusers.models.modeling_utils", "should be kept in float32: []"),  # when it upcasts the VAE to decode in fp32
    ("transformers.utils.import_utils", "requires torchvision (not installed)"),  # the fallback does the same here
)


@dataclass(frozen=True)
class HideText(logging.Filter):
    """Drop the log records that contain ``text``."""

    text: str

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def hide_known_warnings() -> None:
    """Drop the records of :data:`KNOWN_WARNINGS`. Imports no library.

    Commands call it before importing torch. The library never does: logging is up to the program that uses it.
    """
    for name, text in KNOWN_WARNINGS:
        logging.getLogger(name).addFilter(HideText(text))


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers for loading components, but not those of downloads."""
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers

    downloads = not are_progress_bars_disabled()
    enabled = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()
