"""The adapter file: one self-describing safetensors, read and checked before any model is touched.

Keys are ``<component>.<module path>.nora_<factor>``; no key contains "lora", so that loaders of other tools refuse
the file instead of misreading it. The metadata entry ``nora`` is one JSON document, :class:`AdapterInfo`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path

from safetensors.torch import save

from ..errors import UserError
from ..io.files import sha256, write_atomic
from ..io.tensor_file import TensorFile, Tensors, all_finite, named_hash
from .adapter_info import DESCRIPTIVE, AdapterInfo, BasisKind, dump_info, parse_info
from .foreign import recognize
from .keys import count_parameters, is_frozen
from .packs import inspect_subject, read_subject

FILE_NAME = "nora_adapter.safetensors"
IN_FOLDERS = (
    FILE_NAME, "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors",
)  # fmt: skip
"""What the file in a folder is called by us, PEFT and diffusers."""

__all__ = [
    "DESCRIPTIVE", "FILE_NAME", "AdapterInfo", "BasisKind", "Tensors", "inspect_adapter", "locate",
    "read_tensors", "write_adapter",
]  # fmt: skip


def locate(path: str | Path) -> Path:
    """The adapter file that a path means: the file itself, or ``nora_adapter.safetensors`` in a folder."""
    if not isinstance(path, str | Path):
        raise UserError(f"{path!r} is no path of an adapter: give a file, a folder or a pack's address")
    try:
        path = Path(path).expanduser()
        file = next((f for name in IN_FOLDERS if (f := path / name).is_file()), path) if path.is_dir() else path
        found = file.is_file()
    except (OSError, ValueError, RuntimeError):
        file, found = Path(path), False
    if not found:
        raise UserError(f"no adapter at {path}: expected a {FILE_NAME} or a folder that holds one{_near(Path(path))}")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a safetensors file: other formats may run code when opened and are not read")
    return file


def _near(path: Path) -> str:
    try:
        names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 3)
    except (OSError, ValueError):
        return ""
    return f"; there is {', '.join(str(path.with_name(name)) for name in names)}" if names else ""


def require_vacant(folder: Path) -> None:
    """Raise :class:`UserError` where a new adapter would replace one."""
    if (folder / FILE_NAME).exists():
        raise UserError(f"{folder} holds an adapter already: choose another folder")


def split_address(path: str | Path) -> tuple[Path, str] | None:
    """``(pack, subject)`` of an address like ``pets.nora_pack.safetensors#dog``; ``None`` for any other path."""
    file, mark, subject = str(path).rpartition(".safetensors#")
    return (Path(f"{file}.safetensors"), subject) if mark else None


def given_name(path: str | Path) -> str:
    """What an adapter is called by its path or hub id: the subject of a pack, the folder of our file, else itself."""
    address = split_address(path)
    if address:
        return address[1]
    # "." gets a name, and a link keeps its own, which resolve() would lose.
    place = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100
    return place.parent.name if place.name == FILE_NAME else place.name.removesuffix(".safetensors")


def inspect_adapter(path: str | Path, hashed: bool = True) -> AdapterInfo:
    """Read only the header of an adapter file, of a subject in a pack (``pack.safetensors#name``) or of a foreign file.

    ``hashed=False`` leaves ``sha256`` empty, which otherwise reads the whole file: for lists of many adapters. Raises
    :class:`UserError` for anything that is neither a sound adapter nor a file that ``load_adapter`` can hand on.
    """
    address = split_address(path)
    if address:
        return inspect_subject(*address)
    file = locate(path)
    with TensorFile(file) as reader:
        if "nora" not in reader.metadata:
            info = recognize(reader)
        else:
            reader.require_floats()
            info = parse_info(reader.metadata["nora"], str(file))
            if info.basis == "shared" and not info.basis_sha256:
                raise UserError(f"{file}: its metadata is damaged (no basis_sha256): copy it again")
        count_parameters(info, {key: entry.numel for key, entry in reader.entries.items()})
    info.path, info.sha256, info.bytes = str(file), sha256(file) if hashed else "", file.stat().st_size
    return info


def read_tensors(info: AdapterInfo, basis_dir: str | Path | None = None) -> Tensors:
    """All factors of an adapter, a shared basis joined in and checked by its hash. Refuses NaN and infinity."""
    _ = info.configs  # refuses what is no adapter of ours
    address = split_address(info.path)
    if address:
        tensors = read_subject(*address)
    else:
        with TensorFile(Path(info.path)) as reader:
            reader.require_floats()
            tensors = {key: reader.tensor(key) for key in reader.entries}
    if info.basis == "shared":
        basis = _load_basis(info, basis_dir)
        if basis.keys() & tensors.keys():
            raise UserError(f"{info.path} holds {min(basis.keys() & tensors.keys())}, which is in its basis as well")
        tensors.update(basis)
    require_finite(tensors, info.path)
    return tensors


def require_finite(tensors: Tensors, path: str) -> None:
    """Refuse NaN and infinity."""
    broken = next((key for key, value in tensors.items() if not all_finite(value)), None)
    if broken:
        raise UserError(f"{path}: {broken} holds NaN or infinity: the adapter is broken")


def basis_places(adapter_folder: Path, basis_dir: str | Path | None) -> list[Path]:
    """Where a shared basis is looked for, in order; the first is also where it is written."""
    if basis_dir is not None:
        return [Path(basis_dir)]
    folder = Path(os.path.abspath(adapter_folder))  # noqa: PTH100 (as "." has no parent, and a link stays one)
    return [folder.parent / "bases", folder / "bases"]


def basis_files(info: AdapterInfo, basis_dir: str | Path | None = None) -> list[Path]:
    """The files that may be the shared basis of an adapter; one that is reached by a link is looked for behind it too.

    Raises :class:`UserError` where there is none.
    """
    address = split_address(info.path)
    file = address[0] if address else Path(info.path)
    folders = dict.fromkeys((file.parent, file.resolve().parent))
    places = dict.fromkeys(place for folder in folders for place in basis_places(folder, basis_dir))
    files = [found for place in places if (found := place / f"{info.basis_sha256}.safetensors").is_file()]
    if not files:
        looked = " or ".join(map(str, places))
        raise UserError(f"{info.path} needs the basis {info.basis_sha256}.safetensors, not found in {looked}")
    return files


def _load_basis(info: AdapterInfo, basis_dir: str | Path | None) -> Tensors:
    files = basis_files(info, basis_dir)
    for file in files[:-1]:
        with contextlib.suppress(UserError):  # a damaged copy must not hide a sound one
            return read_basis(file)
    return read_basis(files[-1])


def read_basis(file: Path) -> Tensors:
    """A shared basis, refused unless it hashes to its name."""
    with TensorFile(file) as reader:
        reader.require_floats()
        tensors = {key: reader.tensor(key) for key in reader.entries}
    if named_hash(tensors) != file.stem:
        raise UserError(f"{file} does not hash to its name: it is damaged, copy it again")
    return tensors


def write_basis(folder: Path, basis: Tensors) -> str:
    """Write ``folder/<sha256>.safetensors`` unless a sound one is there; returns the hash."""
    digest = named_hash(basis)
    target = folder / f"{digest}.safetensors"
    try:
        read_basis(target)
    except UserError:
        write_atomic(target, save({k: v.contiguous() for k, v in basis.items()}, {"format": "nora_basis"}))
    return digest


def write_adapter(folder: Path, tensors: Tensors, info: AdapterInfo, basis_dir: str | Path | None = None) -> Path:
    """Write ``folder/nora_adapter.safetensors``; a shared basis goes to a file of its own, once."""
    basis = {key: value for key, value in tensors.items() if is_frozen(key)}
    if info.basis == "shared":
        info.basis_sha256 = write_basis(basis_places(folder, basis_dir)[0], basis)
        tensors = {key: value for key, value in tensors.items() if key not in basis}
    else:
        info.basis_sha256 = named_hash(basis) if basis else ""
    # One entry only: safetensors writes several in no fixed order, and equal adapters shall be equal files.
    return write_atomic(
        folder / FILE_NAME, save({k: v.contiguous() for k, v in tensors.items()}, {"nora": dump_info(info)})
    )
