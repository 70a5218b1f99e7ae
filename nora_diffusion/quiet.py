"""What other libraries say while they are loaded and a user of this one cannot act on: kept from the screen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# By the logger that says it. transformers and diffusers look at torchao wherever it is installed, used or not.
REMARKS = {
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",  # said in our own words
    "torchao": "Failed to load",  # its GPU kernels, on a machine without the GPU
    "torchao.kernel.intmm": "Detected no triton",
    "torch.utils._pytree": "is an Enum subclass",  # how torchao registers its enums
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "diffusers.models.modeling_utils": "should be kept in float32: []",  # of the VAE that it decodes with in fp32
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # the fallback does the same here
}


@dataclass(frozen=True)
class Without(logging.Filter):
    """Passes every record but those that hold a text."""

    text: str

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def hush() -> None:
    """Drop :data:`REMARKS`, and nothing else of these loggers. Imports nothing.

    Before torch is imported, and in commands only: a program that uses this package has its own log.
    """
    for name, text in REMARKS.items():
        logging.getLogger(name).addFilter(Without(text))


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Open a model without the bars that diffusers and transformers draw for each part; downloads keep theirs."""
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers

    downloads = not are_progress_bars_disabled()
    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
