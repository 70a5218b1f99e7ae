"""The adapter file: one self-describing safetensors file, checked before a model is touched.

Keys are ``<component>.<module path>.nora_<factor>``. No key contains "lora", so that other tools refuse the file
instead of misreading it. The metadata entry ``nora`` is one JSON document, :class:`AdapterInfo`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from ..io.files import real_path, sha256
from ..io.tensor_file import RawTensor, RawTensors, TensorFile, raw_hash, require_finite
from .adapter_info import AdapterInfo, parse_info
from .foreign import DIFFUSERS_FILE, EMBEDDING_FILE, PEFT_FILE, recognize
from .keys import Projection, count_parameters, factors_by_projection, frozen_factors
from .packs import Pack, read_factors, read_subject
from .structure import check_structure

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", RawTensor, "Tensor")

FILE_NAME = "nora_adapter.safetensors"
BASIS_FOLDER = "bases"
IN_FOLDERS = (FILE_NAME, PEFT_FILE, DIFFUSERS_FILE, EMBEDDING_FILE)
"""File names of an adapter in a folder, in the order of preference: ours, PEFT's, diffusers'."""


def locate(path: str | Path) -> Path:
    """Resolve a path to an adapter file: the file itself, or the first of :data:`IN_FOLDERS` in a folder.

    Raises :class:`UserError` if there is none or it is not safetensors.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"{path!r} is not a path: give an adapter's file, its folder or a pack's address (FILE#NAME)")
    try:
        path = Path(path).expanduser()
        file = next((f for name in IN_FOLDERS if (f := path / name).is_file()), path) if path.is_dir() else path
        found = file.is_file()
    except (OSError, ValueError, RuntimeError):
        file, found = Path(path), False
    if not found:
        raise UserError(f"no adapter at {path}: expected a {FILE_NAME} or its folder{_similar(Path(path))}")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a safetensors file: other formats may run code when opened and are not read")
    return file


def _similar(path: Path) -> str:
    """A suggestion for the error message: paths beside ``path`` with a similar name."""
    try:
        others = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
        names = difflib.get_close_matches(path.name, others, 3)
    except (OSError, ValueError):
        return ""
    return f"; did you mean {', '.join(str(path.with_name(name)) for name in names)}?" if names else ""


def require_vacant(folder: Path) -> None:
    """Raise :class:`UserError` if the folder already holds an adapter."""
    if (folder / FILE_NAME).exists():
        raise UserError(f"{folder} already holds an adapter: choose another folder")


def split_address(path: str | Path) -> tuple[Path, str] | None:
    """``(pack, subject)`` of an address like ``pets.nora_pack.safetensors#dog``; ``None`` for any other path."""
    file, separator, subject = str(path).rpartition(".safetensors#")
    return (Path(f"{file}.safetensors"), subject) if separator else None


def given_name(path: str | Path) -> str:
    """Default name of an adapter by its path or hub id: the pack's subject, our file's folder, else the file name."""
    address = split_address(path)
    if address:
        return address[1]
    # Unlike resolve(), abspath keeps the name of a link; "." still gets a name.
    file = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100
    return file.parent.name if file.name == FILE_NAME else file.name.removesuffix(".safetensors")


def inspect_adapter(path: str | Path, hashed: bool = True) -> AdapterInfo:
    """Read the header of an adapter file, of a subject in a pack (``pack.safetensors#name``) or of another tool's file.

    ``hashed=False`` leaves ``sha256`` empty and so avoids reading the whole file: for listing many adapters. Raises
    :class:`UserError` for a damaged file, also if its tensors are not those of its metadata, and for one that
    ``load_adapter`` cannot load.
    """
    with open_adapter(path) as adapter:
        if hashed and not split_address(path):
            adapter.info.sha256 = sha256(Path(adapter.info.path))
        return adapter.info


@dataclass
class OpenAdapter:
    """An adapter whose file is open: its description, and a function that reads the tensors in its own file.

    ``read()`` leaves out a shared basis; it sets ``info.sha256``, from the bytes that it reads. Raises
    :class:`UserError` for NaN and infinity.
    """

    info: AdapterInfo
    read: Callable[[], dict[str, RawTensor]]


@contextlib.contextmanager
def open_adapter(path: str | Path) -> Iterator[OpenAdapter]:
    """Open an adapter file, a subject of a pack or another tool's file, and read its header. Raises as
    :func:`inspect_adapter`.
    """
    address = split_address(path)
    if address:
        with Pack(address[0]) as pack:
            subject = pack.find(address[1])
            yield OpenAdapter(subject.info, lambda: read_factors(subject))
        return
    file = locate(path)
    with TensorFile(file) as reader:
        info = _describe(reader)

        def read() -> dict[str, RawTensor]:
            tensors, info.sha256 = reader.read_all()
            require_finite(tensors, file)
            return tensors

        yield OpenAdapter(info, read)


def layer_ranks(path: str | Path) -> dict[Projection, int]:
    """The rank of each layer at the narrowest point of its chain, in the order of the file.

    Empty for an adapter whose layers all have the same rank setting, and for files of other tools. Raises
    :class:`UserError` as :func:`inspect_adapter`.
    """
    with open_adapter(path) as adapter:
        info = adapter.info
        if not info.is_ours or not any(axes.rank_pattern or axes.inner_rank_pattern for axes in info.axes.values()):
            return {}
        layers = factors_by_projection(adapter.read())
    found = {
        layer: next((value.shape[0] for name in ("A_in", "A") if (value := factors.get(name)) is not None), 0)
        for layer, factors in layers.items()
    }
    return {layer: rank for layer, rank in found.items() if rank}


def _describe(reader: TensorFile) -> AdapterInfo:
    """The description of a file by its header."""
    if "nora" not in reader.metadata:
        info = recognize(reader)
    else:
        reader.require_floats()
        info = parse_info(reader.metadata["nora"], str(reader.path))
        info.path = str(reader.path)
        if info.basis == "shared" and not info.basis_sha256:
            raise UserError(f"{reader.path}: its metadata is damaged (basis_sha256 is missing): copy it again")
        if info.basis == "own":
            check_structure(info, {key: entry.shape for key, entry in reader.entries.items()})
    count_parameters(info, {key: entry.numel for key, entry in reader.entries.items()})
    info.bytes = reader.size
    return info


def read_checked(
    info: AdapterInfo, basis_dir: str | Path | None = None, basis: RawTensors | None = None
) -> dict[str, RawTensor]:
    """All factors of an adapter, including a shared basis: the one reader of every function that uses an adapter.

    The frozen factors are verified against the hash in the metadata, the names and shapes of all tensors against its
    description. ``basis``: the shared basis, if it has been read already. Raises :class:`UserError` for damaged or
    missing tensors, NaN or infinity, and for a file of another tool.
    """
    _ = info.axes  # raises for a file of another tool
    address = split_address(info.path)
    if address:
        tensors = read_subject(*address)
    else:
        with TensorFile(Path(info.path)) as reader:
            reader.require_floats()
            tensors = {key: reader.raw(key) for key in reader.entries}
    require_finite(tensors, info.path)
    return complete(info, tensors, basis_dir, basis)


def complete(
    info: AdapterInfo, own: dict[str, RawTensor], basis_dir: str | Path | None = None, basis: RawTensors | None = None
) -> dict[str, RawTensor]:
    """The tensors of an adapter's file with its shared basis, verified as by :func:`read_checked`."""
    if info.basis == "shared":
        return joined(info, own, _load_basis(info, basis_dir) if basis is None else basis)
    if info.basis_sha256 and raw_hash(frozen_factors(own)) != info.basis_sha256:
        raise UserError(f"{info.path} is damaged (its basis does not match basis_sha256): copy it again")
    return joined(info, own, {})


def joined(info: AdapterInfo, own: Mapping[str, T], basis: Mapping[str, T]) -> dict[str, T]:
    """All tensors of an adapter. Raises :class:`UserError` unless they are exactly those of its description."""
    if basis.keys() & own.keys():
        raise UserError(f"{info.path} and its basis both hold {min(basis.keys() & own.keys())}")
    tensors = {**own, **basis}
    check_structure(info, {key: tuple(value.shape) for key, value in tensors.items()})
    return tensors


def read_tensors(info: AdapterInfo, basis_dir: str | Path | None = None) -> dict[str, Tensor]:
    """:func:`read_checked` as tensors of torch."""
    return {key: value.tensor() for key, value in read_checked(info, basis_dir).items()}


def verify_adapter(info: AdapterInfo) -> None:
    """Read all tensors of an adapter or of another tool's file. Raises :class:`UserError` like :func:`read_checked`."""
    if info.is_ours:
        read_checked(info)
        return
    with TensorFile(Path(info.path)) as reader:
        for key in reader.entries:
            require_finite({key: reader.raw(key)}, info.path)


def basis_folders(adapter_folder: Path, basis_dir: str | Path | None) -> list[Path]:
    """Folders that are searched for a shared basis, in order; it is written to the first."""
    if basis_dir is not None:
        return [Path(basis_dir)]
    folder = Path(os.path.abspath(adapter_folder))  # noqa: PTH100 ("." has no parent, and resolve() follows links)
    return [folder.parent / BASIS_FOLDER, folder / BASIS_FOLDER]


def is_basis_folder(folder: Path) -> bool:
    """Whether this is the folder of shared bases, which a shell pattern like ``shelf/*`` includes."""
    files = list(folder.iterdir()) if folder.name == BASIS_FOLDER and folder.is_dir() else []
    return bool(files) and all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", file.name) for file in files)


def basis_files(info: AdapterInfo, basis_dir: str | Path | None = None) -> list[Path]:
    """Existing files with the name of the adapter's shared basis, searched beside the adapter and behind its link.

    Raises :class:`UserError` if there is none.
    """
    address = split_address(info.path)
    file = address[0] if address else Path(info.path)
    adapter_folders = dict.fromkeys((file.parent, real_path(file).parent))
    folders = dict.fromkeys(found for folder in adapter_folders for found in basis_folders(folder, basis_dir))
    files = [found for folder in folders if (found := folder / f"{info.basis_sha256}.safetensors").is_file()]
    if not files:
        searched = " or ".join(map(str, folders))
        raise UserError(f"{info.path} needs the basis {info.basis_sha256}.safetensors, not found in {searched}")
    return files


def _load_basis(info: AdapterInfo, basis_dir: str | Path | None) -> RawTensors:
    files = basis_files(info, basis_dir)
    for file in files[:-1]:
        with contextlib.suppress(UserError):  # a damaged copy must not hide an intact one
            return read_basis(file)
    return read_basis(files[-1])


def read_basis(file: Path) -> RawTensors:
    """Read a shared basis. Raises :class:`UserError` unless its hash is its file name."""
    with TensorFile(file) as reader:
        reader.require_floats()
        tensors = {key: reader.raw(key) for key in reader.entries}
    if raw_hash(tensors) != file.stem:
        raise UserError(f"{file} is damaged (its hash is not its file name): copy it again")
    require_finite(tensors, file)
    return tensors
