"""Checkpoints: safetensors and JSON in ``checkpoints/step-N/``, whole or absent, hashed, never pickled.

A checkpoint is the adapter file (frozen factors too, since a basis is never recomputed), the optimizer's
tensors and ``manifest.json``, written last: the SHA-256 of both, the schedule's state, the run's identity.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...errors import UserError
from ...formats.adapter_file import FILE_NAME
from ...io.files import make_folder, sha256, sync_folder, user_errors, write_atomic
from ...io.run_layout import MANIFEST, checkpoint_steps
from ..step.optimizer_state import restore_state

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
FORMAT_VERSION = 1


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder, the steps done and what its manifest says."""

    path: Path
    step: int
    identity: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    numbers: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    step: int,
    save_adapter: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write ``folder/step-N``: everything into a hidden folder beside it, flushed, then one rename.

    ``save_adapter`` writes the adapter file into a folder; ``tensors`` are those of optimizer and average; ``state`` is
    the rest of the manifest: ``identity``, ``schedule``, ``scaler`` and ``optimizer``. Raises :class:`UserError` if the
    disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    final, temporary = folder / f"step-{step}", folder / f".tmp-step-{step}"
    make_folder(folder)
    with user_errors(final):
        sync_folder(folder.parent)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            save_adapter(temporary)
            (temporary / "README.md").unlink(missing_ok=True)
            write_atomic(temporary / OPTIMIZER, save(dict(tensors)))
            hashes = {name: sha256(temporary / name) for name in (FILE_NAME, OPTIMIZER)}
            manifest = {"format_version": FORMAT_VERSION, "step": step, **state, "sha256": hashes}
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            _put(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _put(temporary: Path, final: Path) -> None:
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Give optimizer and factors their state back; returns all tensors that the checkpoint has beside the adapter."""
    tensors = load_file(checkpoint.path / OPTIMIZER)
    restore_state(optimizer, parameters, tensors, checkpoint.numbers)
    return tensors


def prune(folder: Path, keep: int | None) -> None:
    """Delete the oldest checkpoints beyond ``keep``, once the newest is whole; and what a crash left over."""
    for rest in (*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")):
        shutil.rmtree(rest, ignore_errors=True)
    if keep is not None:
        for old in list(checkpoint_steps(folder).values())[:-keep]:
            gone = old.with_name(f".tmp-{old.name}")  # in one go: half a checkpoint never has a checkpoint's name
            with contextlib.suppress(OSError):
                old.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back what a kill between the two renames of :func:`_put` left under its other name."""
    for old in folder.glob(".old-step-*"):
        final = folder / old.name.removeprefix(".old-")
        with user_errors(folder):
            if final.exists():
                shutil.rmtree(old)
            else:
                old.replace(final)


def find_checkpoint(folder: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; ``None`` if ``latest`` finds none.

    ``latest`` is the newest that is whole; damaged ones are passed over with a warning. Raises :class:`UserError` for a
    path that is no checkpoint, and where nothing is whole.
    """
    if wanted == "latest":
        return _newest(folder)
    return read_checkpoint(_checkpoint_at(folder, wanted))


def _newest(folder: Path) -> Checkpoint | None:
    damaged = None
    for path in reversed(checkpoint_steps(folder).values()):
        try:
            return read_checkpoint(path)
        except DamagedCheckpointError as error:
            log.warning("%s", error)
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    return None


def _checkpoint_at(folder: Path, wanted: str) -> Path:
    path = Path(wanted).expanduser()
    for candidate in (path, folder / path.name):
        if (candidate / MANIFEST).is_file():
            return candidate
    known = ", ".join(p.name for p in checkpoint_steps(folder).values()) or "none"
    raise UserError(f"{wanted} is no checkpoint; those of this run: {known}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and check the files' hashes. Raises :class:`UserError` for a damaged checkpoint."""
    way = f"resume from an earlier one (--resume_from_checkpoint {path.parent}/step-N) or start anew"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, hashes = int(manifest["format_version"]), dict(manifest["sha256"])
        result = Checkpoint(
            path, int(manifest["step"]), manifest["identity"], manifest["schedule"], manifest["scaler"],
            manifest.get("optimizer", {}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"the checkpoint {path} is damaged (its manifest cannot be read): {way}"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(f"the checkpoint {path} has format version {version}, newer than this release: upgrade it")
    for name in (FILE_NAME, OPTIMIZER):
        file = path / name
        if not file.is_file() or sha256(file) != hashes.get(name):
            raise DamagedCheckpointError(f"the checkpoint {path} is damaged ({name} is missing or altered): {way}")
    return result


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Refuse to go on under other settings, data, base or versions; the message shows each difference."""
    before, now = _flat(checkpoint.identity), _flat(identity)
    changes = [
        f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"the checkpoint {checkpoint.path} is of another run ({'; '.join(changes)}): "
            "restore these, or start anew in another --output_dir"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """With one entry for each of the versions, so that a message names those that differ."""
    versions = identity.get("versions") or {}
    rest = {key: value for key, value in identity.items() if key != "versions"}
    return rest | {f"version of {name}": version for name, version in versions.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
