"""Open the frozen base model: the embedded one, a local diffusers folder or a hub id."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, out_of_memory
from ..io.files import is_path, real_path
from .names import DENOISERS

EMBEDDED_BASE_ID = "nora_diffusion/tiny_sd"
EMBEDDED_WEIGHTS = Path(__file__).parents[1] / "tiny_sd" / "weights"
EMBEDDED_GUIDANCE, OTHER_GUIDANCE = 3.5, 7.5
EMBEDDED_STEPS, OTHER_STEPS = 20, 30
_EMBEDDED_NAMES = (None, "", "tiny_sd", EMBEDDED_BASE_ID)


def load_base() -> Any:
    """The embedded base: a plain diffusers ``StableDiffusionPipeline`` for 64x64 images, in fp32 on the CPU."""
    return open_pipeline(None)


def is_embedded(path_or_id: str | Path | None) -> bool:
    """Whether a base's name or path means the embedded base."""
    if path_or_id is None or str(path_or_id) in _EMBEDDED_NAMES:
        return True
    return real_path(path_or_id) == real_path(EMBEDDED_WEIGHTS / "pipeline")


def default_guidance(base: str | Path | None) -> float:
    """The default guidance scale of a base."""
    return EMBEDDED_GUIDANCE if is_embedded(base) else OTHER_GUIDANCE


def default_steps(base: str | Path | None) -> int:
    """The default number of denoising steps of a base."""
    return EMBEDDED_STEPS if is_embedded(base) else OTHER_STEPS


def open_pipeline(
    path_or_id: str | Path | None = None, dtype: Any = None, device: Any = None, revision: str | None = None,
    variant: str | None = None,
) -> Any:  # fmt: skip
    """Load a diffusers text-to-image pipeline from safetensors, without a safety checker.

    ``None`` or ``"tiny_sd"`` opens the embedded base. ``dtype``: a ``torch.dtype`` (default: fp32), ``"fp32"``,
    ``"fp16"``, ``"bf16"`` or ``"auto"``, which depends on the device (see :func:`.precision.resolve_dtype`). Raises
    :class:`UserError` that names what is missing.
    """
    if device is not None:
        check_device(device)
    if isinstance(dtype, str):
        from .precision import resolve_dtype

        dtype = resolve_dtype(dtype, device or "cpu")
    source = check_base(path_or_id)
    pipe = _from_pretrained(source, dtype, revision, variant)
    pipe.set_progress_bar_config(disable=True)
    if device is None:
        return pipe
    with _explained(source):
        return pipe.to(device)


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
        return replace(self, base=str(real_path(folder))) if folder and folder.exists() else self

    def open(self) -> Any:
        """Load the pipeline and move it to its device. Raises :class:`UserError`.

        It is loaded in a thread of its own: OpenMP keeps the workers of a thread until that thread ends, and with more
        workers than cores all of them sleep between operations. A CPU then takes up to twice as long in other threads.
        """
        opened: Future[Any] = Future()

        def load() -> None:
            try:
                device, dtype = self.resolve()
                opened.set_result(open_pipeline(self.base, dtype, device, self.revision, self.variant))
            except BaseException as error:
                opened.set_exception(error)

        thread = threading.Thread(target=load, name="open", daemon=True)
        thread.start()
        pipe = opened.result()
        thread.join()
        return pipe


def best_device() -> str:
    """The first available of ``cuda``, ``mps`` and ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: Any) -> None:
    """Raise :class:`UserError` for a device that torch does not know or that this machine does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"the device {str(device)!r} cannot be used: {first_line(error)}; choose cpu, or leave out --device"
        ) from error


def check_base(path_or_id: str | Path | None) -> str | Path:
    """The folder or hub id of a base, without loading it. Raises :class:`UserError` for a folder without a pipeline."""
    source: str | Path = EMBEDDED_WEIGHTS / "pipeline" if is_embedded(path_or_id) else str(path_or_id)
    local = Path(str(source)).expanduser()
    if local.exists() or is_embedded(path_or_id) or is_path(str(source)):
        check_pipeline_folder(local)
        return local
    return source


def _from_pretrained(source: str | Path, dtype: Any, revision: str | None, variant: str | None) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from ..quiet import no_loading_bars

    with _explained(source), no_loading_bars():
        pipe = DiffusionPipeline.from_pretrained(
            source, dtype=dtype or torch.float32, revision=revision, variant=variant,
            use_safetensors=True, safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
        if not any(hasattr(pipe, name) for name in DENOISERS) or not hasattr(pipe, "vae"):
            raise ValueError(f"a {type(pipe).__name__} makes no images from text")
        _check_unread_values(pipe)
        return pipe


PREDICTIONS = ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction")


def _check_unread_values(pipe: Any) -> None:
    """Raise :class:`ValueError` for wrong values of a base that its libraries read with the first image only."""
    prediction = pipe.scheduler.config.get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS:
        raise ValueError(f"the prediction_type of its scheduler is {prediction!r}, and not of {', '.join(PREDICTIONS)}")
    lengths = {n: getattr(part, "model_max_length", 1) for n, part in pipe.components.items() if "tokenizer" in n}
    numbers = {"vae's scaling_factor": pipe.vae.config.get("scaling_factor", 1.0)}
    numbers |= {f"{name}'s model_max_length": length for name, length in lengths.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"the {name} is {value!r}, and not a number above 0")


@contextlib.contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Raise :class:`UserError` if anything in a pipeline is not as it should be.

    diffusers, transformers and torch raise errors of all kinds about wrong values in its files.
    """
    from ..io.tensor_file import check_complete

    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, RecursionError):
            raise
        for file in sorted(source.glob("*/*.safetensors")) if isinstance(source, Path) else ():
            check_complete(file)
        reason = first_line(error).split(" (")[0].rstrip(".:")  # the hub adds a long explanation in brackets
        reason = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
        raise UserError(
            f"cannot load the pipeline {str(source)!r}: {reason}; give a diffusers folder with safetensors weights or "
            "a hub id that this machine can reach"
        ) from error


def check_pipeline_folder(folder: Path) -> None:
    """Raise :class:`UserError` for a folder that is not a complete diffusers pipeline; names what is missing."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the path of the base {folder} is not UTF-8, as safetensors needs: rename it") from error
    if folder.is_file():
        raise UserError(
            f"{folder} is a file: single-file checkpoints are not supported; convert it to a diffusers folder "
            "(StableDiffusionPipeline.from_single_file(...).save_pretrained(...))"
        )
    if not folder.is_dir():
        raise UserError(f"the base {folder} does not exist: give a diffusers pipeline folder or a hub id")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: model_index.json is missing")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index} is not valid JSON: copy the pipeline again") from error
    if not isinstance(entries, dict):
        raise UserError(f"{index} is not a table of pipeline components: copy the pipeline again")
    for name, entry in entries.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        if is_component and name not in ("safety_checker", "feature_extractor"):
            _check_component(folder / name, str(entry[1]))


def _check_component(folder: Path, class_name: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder.parent} is not a complete pipeline: the folder {folder.name}/ is missing")
    if "Tokenizer" in class_name or "Scheduler" in class_name:
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is not a complete pipeline: {folder.name}/config.json is missing")
    if not any(folder.glob("*.safetensors")):
        unsafe = [f.name for pattern in ("*.bin", "*.pt", "*.ckpt", "*.pkl") for f in folder.glob(pattern)]
        found = f"; {unsafe[0]} may run code when opened and is not read" if unsafe else ""
        raise UserError(f"{folder.parent} has no safetensors weights in {folder.name}/{found}: convert it first")


def base_id(pipe: Any) -> str:
    """The name of a pipeline's base, for metadata and messages: its path or hub id."""
    name = str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", ""))
    if name and is_embedded(name):
        return EMBEDDED_BASE_ID
    return name or type(pipe).__name__
