"""Files of other tools: recognised by their keys, explained, and handed to the library that can load them."""

from __future__ import annotations

from .adapter_info import AdapterInfo
from .errors import UserError
from .tensor_file import TensorFile


def recognise(reader: TensorFile) -> AdapterInfo:
    """What a file without our metadata is. Raises :class:`UserError` for one that nothing here can load."""
    hint = (
        " (it looks like an ordinary LoRA: use pipe.load_lora_weights)"
        if any("lora" in k for k in reader.entries)
        else ""
    )
    raise UserError(f"{reader.path} is no adapter of this toolkit{hint}")
