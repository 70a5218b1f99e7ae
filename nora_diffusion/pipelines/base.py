"""Opening the frozen model: the embedded base, a local diffusers folder or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..io.files import is_path

EMBEDDED_BASE_ID = "nora_diffusion/tiny_sd"
EMBEDDED_WEIGHTS = Path(__file__).parents[1] / "tiny_sd" / "weights"
EMBEDDED_GUIDANCE, OTHER_GUIDANCE = 3.5, 7.5
EMBEDDED_STEPS, OTHER_STEPS = 20, 30
_EMBEDDED_NAMES = (None, "", "tiny_sd", EMBEDDED_BASE_ID)


def load_base() -> Any:
    """The embedded base: a plain diffusers ``StableDiffusionPipeline`` for 64x64 pictures, in fp32 on the CPU."""
    return open_pipeline(None)


def is_embedded(path_or_id: str | Path | None) -> bool:
    """Whether the name means the embedded base."""
    if path_or_id is None or str(path_or_id) in _EMBEDDED_NAMES:
        return True
    return Path(path_or_id).resolve() == (EMBEDDED_WEIGHTS / "pipeline").resolve()


def default_guidance(base: str | Path | None) -> float:
    """The guidance scale that suits a base."""
    return EMBEDDED_GUIDANCE if is_embedded(base) else OTHER_GUIDANCE


def default_steps(base: str | Path | None) -> int:
    """The denoising steps that suit a base."""
    return EMBEDDED_STEPS if is_embedded(base) else OTHER_STEPS


def open_pipeline(
    path_or_id: str | Path | None = None, dtype: Any = None, device: Any = None, revision: str | None = None,
    variant: str | None = None,
) -> Any:  # fmt: skip
    """Load a diffusers text-to-image pipeline from safetensors, without a safety checker.

    ``None`` or ``"tiny_sd"`` is the embedded base. ``dtype`` is one of torch (default: fp32) or ``"auto"``, ``"fp32"``,
    ``"fp16"``, ``"bf16"``; ``"auto"`` is what suits the device (:func:`.precision.resolve_dtype`). Raises
    :class:`UserError` that names what is missing.
    """
    if device is not None:
        check_device(device)
    if isinstance(dtype, str):
        from .precision import resolve_dtype

        dtype = resolve_dtype(dtype, device or "cpu")
    pipe = _from_pretrained(check_base(path_or_id), dtype, revision, variant)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


@dataclass(frozen=True)
class BaseSource:
    """Which base to open, and how.

    ``base``: pipeline folder or hub id (``None``: the embedded base). ``device``: a torch device (``None``: the best
    one available). ``dtype``, ``variant`` and ``revision``: see :func:`open_pipeline`.
    """

    base: str | None = None
    device: str | None = None
    dtype: str = "auto"
    variant: str | None = None
    revision: str | None = None

    def resolve(self) -> tuple[str, Any]:
        """The device and the torch dtype to run in. Raises :class:`UserError` if this machine cannot do it."""
        from .precision import resolve_dtype

        device = self.device or best_device()
        check_device(device)
        return device, resolve_dtype(self.dtype, device)

    def check(self) -> None:
        """Raises :class:`UserError` for a base, device or dtype that cannot be used. Loads nothing."""
        check_base(self.base)
        self.resolve()

    def absolute(self) -> BaseSource:
        """The same with an absolute path if the base is a folder."""
        folder = Path(self.base).expanduser() if self.base else None
        return replace(self, base=str(folder.resolve())) if folder and folder.exists() else self

    def open(self) -> Any:
        """Load the pipeline and move it to its device. Raises :class:`UserError`."""
        device, dtype = self.resolve()
        return open_pipeline(self.base, dtype, device, self.revision, self.variant)


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``, the first that there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: Any) -> None:
    """Raises :class:`UserError` for a device that torch does not know or does not have here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"the device {str(device)!r} will not do here: {first_line(error)}; choose cpu, or leave --device out"
        ) from error


def check_base(path_or_id: str | Path | None) -> str | Path:
    """The folder or hub id of a base. Raises :class:`UserError` for a folder that is no pipeline; loads nothing."""
    source: str | Path = EMBEDDED_WEIGHTS / "pipeline" if is_embedded(path_or_id) else str(path_or_id)
    local = Path(str(source)).expanduser()
    if local.exists() or is_embedded(path_or_id) or is_path(str(source)):
        check_pipeline_folder(local)
        return local
    return source


def _from_pretrained(source: str | Path, dtype: Any, revision: str | None, variant: str | None) -> Any:
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    from ..io.tensor_file import check_complete
    from ..quiet import no_loading_bars

    try:
        with no_loading_bars():
            return DiffusionPipeline.from_pretrained(
                source, dtype=dtype or torch.float32, revision=revision, variant=variant,
                use_safetensors=True, safety_checker=None, requires_safety_checker=False,
            )  # fmt: skip
    except (OSError, ValueError, SafetensorError) as error:
        for file in sorted(source.glob("*/*.safetensors")) if isinstance(source, Path) else ():
            check_complete(file)
        reason = first_line(error).split(" (")[0].rstrip(".")  # the hub explains at length in brackets
        raise UserError(
            f"cannot load the pipeline {str(source)!r}: {reason}; give a diffusers folder with safetensors weights or "
            "a hub id that this machine can reach"
        ) from error


def check_pipeline_folder(folder: Path) -> None:
    """Refuse a folder that is no diffusers pipeline, saying what is missing, before anything is loaded."""
    if folder.is_file():
        raise UserError(
            f"{folder} is a file: single-file checkpoints are not read; convert it to a diffusers folder "
            "(StableDiffusionPipeline.from_single_file(...).save_pretrained(...))"
        )
    if not folder.is_dir():
        raise UserError(f"the base {folder} does not exist: give a diffusers pipeline folder or a hub id")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers pipeline: model_index.json is missing")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON: copy the pipeline again") from error
    if not isinstance(parts, dict):
        raise UserError(f"{index} is no table of a pipeline's parts: copy the pipeline again")
    for name, kind in parts.items():
        is_part = isinstance(kind, list) and len(kind) == 2 and kind[0] is not None
        if is_part and name not in ("safety_checker", "feature_extractor"):
            _check_part(folder / name, str(kind[1]))


def _check_part(part: Path, class_name: str) -> None:
    if not part.is_dir():
        raise UserError(f"{part.parent} is no complete pipeline: the folder {part.name}/ is missing")
    if "Tokenizer" in class_name or "Scheduler" in class_name:
        return
    if not (part / "config.json").is_file():
        raise UserError(f"{part.parent} is no complete pipeline: {part.name}/config.json is missing")
    if not any(part.glob("*.safetensors")):
        unsafe = [f.name for pattern in ("*.bin", "*.pt", "*.ckpt", "*.pkl") for f in part.glob(pattern)]
        found = f"; {unsafe[0]} may run code when opened and is not read" if unsafe else ""
        raise UserError(f"{part.parent} has no safetensors weights in {part.name}/{found}: convert it first")


def base_id(pipe: Any) -> str:
    """The name of a pipeline's base for metadata and messages."""
    name = str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", ""))
    if name and is_embedded(name):
        return EMBEDDED_BASE_ID
    return name or type(pipe).__name__
