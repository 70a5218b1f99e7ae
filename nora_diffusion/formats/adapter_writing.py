"""What an adapter file holds before it is written, and writing adapter files and shared bases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..adapters import AdapterConfig
from ..errors import UserError
from ..io.files import write_atomic
from ..io.tensors import Tensors, file_bytes, named_hash
from .adapter_file import FILE_NAME, basis_folders, read_basis
from .adapter_info import AdapterInfo, dump_info
from .keys import frozen_factors


@dataclass(frozen=True)
class Part:
    """One component of an adapter: its config, and the factors of each layer by path and name."""

    config: AdapterConfig
    layers: dict[str, Tensors]


Contents = dict[str, Part]
"""The parts of an adapter by component."""
Finish = Callable[[Contents], Contents]
"""Turns what was trained into what is saved."""


def write_basis(folder: Path, basis: Tensors) -> str:
    """Write ``folder/<sha256>.safetensors`` unless an intact one exists; return the hash."""
    digest = named_hash(basis)
    target = folder / f"{digest}.safetensors"
    try:
        read_basis(target)
    except UserError:
        write_atomic(target, file_bytes(target, basis, {"format": "nora_basis"}))
    return digest


def write_adapter(
    folder: Path, tensors: Tensors, info: AdapterInfo, basis_dir: str | Path | None = None, new: bool = False
) -> Path:
    """Write ``folder/nora_adapter.safetensors``, and a shared basis to a file of its own if it does not exist yet.

    ``new``: raise :class:`UserError` instead of replacing an adapter, even one written at the same moment.
    """
    basis = frozen_factors(tensors)
    info.basis_sha256 = named_hash(basis) if basis else ""
    if info.basis == "shared":
        tensors = {key: value for key, value in tensors.items() if key not in basis}
    # A single metadata entry: safetensors writes several in random order, and equal adapters must give equal files.
    file = folder / FILE_NAME
    content = file_bytes(file, tensors, {"nora": dump_info(info)})
    if info.basis == "shared":
        write_basis(basis_folders(folder, basis_dir)[0], basis)
    return write_atomic(file, content, new)
