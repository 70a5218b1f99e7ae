"""The adapter file: one self-describing safetensors, read and checked before any model is touched.

Keys are ``<component>.<module path>.nora_<factor>``; no key contains "lora", so that loaders of other tools refuse
the file instead of misreading it. The metadata entry ``nora`` is one JSON document, :class:`AdapterInfo`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .adapters import AdapterConfig
from .errors import UserError
from .files import sha256, write_atomic

FORMAT = "nora_adapter"
FORMAT_VERSION = 1
FILE_NAME = "nora_adapter.safetensors"
MAX_HEADER = 10 * 2**20
MAX_TENSORS = 20_000
FROZEN = ("A_out", "B_out")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = {"F32", "F16", "BF16", "F64"}

BasisKind = Literal["own", "shared"]
Tensors = dict[str, Tensor]


@dataclass
class AdapterInfo:
    """What an adapter file says of itself."""

    components: dict[str, dict[str, Any]]
    base: str = ""
    base_fingerprint: dict[str, dict[str, float]] = field(default_factory=dict)
    basis: BasisKind = "own"
    basis_sha256: str = ""
    conv_shapes: dict[str, list[int]] = field(default_factory=dict)
    trigger: str = ""
    class_word: str = ""
    instance_prompt: str = ""
    prompts: list[str] = field(default_factory=list)
    step: int = 0
    seed: int | None = None
    license: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    # Filled in on reading:
    path: str = ""
    sha256: str = ""
    bytes: int = 0
    trained_numbers: int = 0
    stored_numbers: int = 0

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """The config of each component, rebuilt."""
        return {name: _config(values) for name, values in self.components.items()}

    @property
    def method(self) -> str:
        """The preset's name: ``nora``, ``mor`` ..."""
        return str(next(iter(self.components.values()))["method"])

    @property
    def r(self) -> int:
        """The outer rank."""
        return int(next(iter(self.components.values()))["r"])

    @property
    def inner_r(self) -> int:
        """The inner rank (1 where the method has none)."""
        return int(next(iter(self.components.values()))["inner_r"])


READ_ONLY = ("path", "sha256", "bytes", "trained_numbers", "stored_numbers")
DESCRIPTIVE = ("trigger", "class_word", "instance_prompt", "prompts", "step", "seed", "license", "extra")
"""What a caller of ``save_adapter`` may say about the adapter; the rest is measured."""


def _config(values: dict[str, Any]) -> AdapterConfig:
    known = {f.name for f in fields(AdapterConfig)} - {"start", "peft_type"}
    return AdapterConfig(**{k: v for k, v in values.items() if k in known})


def locate(path: str | Path) -> Path:
    """The adapter file that a path means: the file itself, or ``nora_adapter.safetensors`` in a folder."""
    path = Path(path).expanduser()
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no adapter at {path}: expected a {FILE_NAME} or a folder that holds one")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no safetensors file: other formats may run code when opened and are not read")
    return file


def inspect_adapter(path: str | Path, hashed: bool = True) -> AdapterInfo:
    """Read only the header of an adapter file. Raises :class:`UserError` for anything that is not a sound one.

    ``hashed=False`` leaves ``sha256`` empty, which otherwise reads the whole file: for lists of many adapters.
    """
    file = locate(path)
    metadata, shapes = _header(file)
    if "nora" not in metadata:
        hint = " (it looks like an ordinary LoRA: use pipe.load_lora_weights)" if _looks_like_lora(shapes) else ""
        raise UserError(f"{file} is no adapter of this toolkit{hint}")
    info = _parse(file, metadata["nora"])
    info.path, info.sha256, info.bytes = str(file), sha256(file) if hashed else "", file.stat().st_size
    sizes = {key: _numel(shape) for key, shape in shapes.items()}
    info.stored_numbers = sum(sizes.values())
    info.trained_numbers = sum(n for key, n in sizes.items() if not key.endswith(tuple(f"nora_{f}" for f in FROZEN)))
    return info


def _looks_like_lora(shapes: Mapping[str, Any]) -> bool:
    return any("lora" in key for key in shapes)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _header(file: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    with file.open("rb") as raw:
        start = raw.read(64)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        raise UserError(f"{file} holds a web page or a Git LFS pointer, not weights: download the file itself")
    if len(start) < 8 or int.from_bytes(start[:8], "little") > MAX_HEADER:
        raise UserError(f"{file} is empty, truncated or no safetensors file: copy it again")
    try:
        with safe_open(file, "pt") as reader:
            keys = list(reader.keys())
            if len(keys) > MAX_TENSORS:
                raise UserError(f"{file} holds {len(keys)} tensors, more than the {MAX_TENSORS} allowed")
            slices = {key: reader.get_slice(key) for key in keys}
            odd = [key for key, part in slices.items() if part.get_dtype() not in FLOATS]
            if odd:
                raise UserError(f"{file}: {odd[0]} has the type {slices[odd[0]].get_dtype()}, not a float type")
            return reader.metadata() or {}, {key: tuple(part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated ({error}): copy it again") from error


def _parse(file: Path, text: str) -> AdapterInfo:
    try:
        values = json.loads(text)
        version = int(values.get("format_version", 0))
        known = {f.name for f in fields(AdapterInfo)}
        if version <= FORMAT_VERSION and values["components"]:
            info = AdapterInfo(**{k: v for k, v in values.items() if k in known})
            _ = info.configs
            return info
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: its metadata is damaged ({error}): copy it again") from error
    raise UserError(f"{file} has format version {version}, this release reads up to {FORMAT_VERSION}: upgrade")


def read_tensors(info: AdapterInfo, basis_dir: str | Path | None = None) -> Tensors:
    """All factors of an adapter, a shared basis joined in and checked by its hash. Refuses NaN and infinity."""
    tensors = _load(Path(info.path))
    if info.basis == "shared":
        tensors.update(_load_basis(info, basis_dir))
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{info.path}: {broken[0]} holds NaN or infinity: the adapter is broken")
    return tensors


def _load(file: Path) -> Tensors:
    with safe_open(file, "pt") as reader:
        return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118


def basis_hash(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and bytes of a basis, whatever file it lies in."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def basis_places(adapter_folder: Path, basis_dir: str | Path | None) -> list[Path]:
    """Where a shared basis is looked for, in order; the first is also where it is written."""
    if basis_dir is not None:
        return [Path(basis_dir)]
    return [adapter_folder.parent / "bases", adapter_folder / "bases"]


def _load_basis(info: AdapterInfo, basis_dir: str | Path | None) -> Tensors:
    places = basis_places(Path(info.path).parent, basis_dir)
    file = next((f for p in places if (f := p / f"{info.basis_sha256}.safetensors").is_file()), None)
    if file is None:
        looked = " or ".join(map(str, places))
        raise UserError(f"{info.path} needs the basis {info.basis_sha256}.safetensors, not found in {looked}")
    _header(file)
    tensors = _load(file)
    if basis_hash(tensors) != info.basis_sha256:
        raise UserError(f"{file} does not hash to its name: it is damaged, copy it again")
    return tensors


def write_adapter(folder: Path, tensors: Tensors, info: AdapterInfo, basis_dir: str | Path | None = None) -> Path:
    """Write ``folder/nora_adapter.safetensors``; a shared basis goes to a file of its own, once."""
    if info.basis == "shared":
        basis = {k: v for k, v in tensors.items() if k.endswith(tuple(f".nora_{f}" for f in FROZEN))}
        info.basis_sha256 = basis_hash(basis)
        target = basis_places(folder, basis_dir)[0] / f"{info.basis_sha256}.safetensors"
        if not target.is_file():
            write_atomic(target, save(basis, {"format": "nora_basis"}))
        tensors = {k: v for k, v in tensors.items() if k not in basis}
    values = {k: v for k, v in asdict(info).items() if k not in READ_ONLY and v not in ("", [], {}, None)}
    # One entry only: safetensors writes several in no fixed order, and equal adapters shall be equal files.
    metadata = {"nora": json.dumps({"format": FORMAT, **values}, separators=(",", ":"))}
    return write_atomic(folder / FILE_NAME, save({k: v.contiguous() for k, v in tensors.items()}, metadata))
