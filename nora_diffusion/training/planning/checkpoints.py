"""Checkpoints in ``checkpoints/step-N/``: safetensors and JSON, written atomically, hashed, never pickled.

A checkpoint holds the adapter file (with its frozen factors, since a basis is never recomputed), the optimizer tensors
and ``manifest.json``. The manifest is written last and has the SHA-256 of both files, the state of the learning rate
schedule and the run's identity. Since format 2 it also has a SHA-256 of its own values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping
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
FORMAT_VERSION = 2
OWN_HASH = "manifest_sha256"
"""Key of the manifest's own hash, since format 2."""


class DamagedCheckpointError(UserError):
    """A checkpoint whose files do not match its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder, its step and the content of its manifest.

    ``previous``: step of the checkpoint before it; 0 for the first. ``together``: names of the subjects that trained in
    the same passes and wrote their checkpoints after the same step.
    """

    path: Path
    step: int
    identity: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    previous: int = 0
    together: list[str] = field(default_factory=list)


def write_checkpoint(
    folder: Path,
    step: int,
    save_adapter: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write ``folder/step-N`` atomically: write and flush a hidden folder next to it, then rename that.

    ``save_adapter`` writes the adapter file into a folder. ``tensors``: those of optimizer and EMA. ``state``: the rest
    of the manifest (``identity``, ``schedule``, ``scaler``, ``optimizer``, ``previous``, ``together``). Raises
    :class:`UserError` if the disk is full or the folder cannot be written; earlier checkpoints are not changed.
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
            manifest[OWN_HASH] = _hash(json.loads(json.dumps(manifest)))  # of the values as they will be read
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            _move_into_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _move_into_place(temporary: Path, final: Path) -> None:
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Restore the optimizer state; return all tensors of the checkpoint that are not in the adapter file."""
    tensors = load_file(checkpoint.path / OPTIMIZER)
    restore_state(optimizer, parameters, tensors, checkpoint.optimizer)
    return tensors


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints, and temporary folders that a crash left behind."""
    for leftover in (*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep is not None:
        for old in list(checkpoint_steps(folder).values())[:-keep]:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that half a checkpoint never has the name of one."""
    hidden = checkpoint.with_name(f".tmp-{checkpoint.name}")
    with contextlib.suppress(OSError):
        checkpoint.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(folder: Path) -> None:
    """Restore a checkpoint if the process was killed between the two renames of :func:`_move_into_place`."""
    for old in folder.glob(".old-step-*"):
        final = folder / old.name.removeprefix(".old-")
        with user_errors(folder):
            if final.exists():
                shutil.rmtree(old)
            else:
                old.replace(final)


def find_checkpoint(folder: Path, wanted: str) -> Checkpoint | None:
    """Find the checkpoint for ``--resume_from_checkpoint``; ``None`` if ``latest`` finds no checkpoint.

    ``latest`` is the newest intact checkpoint; damaged ones are skipped with a warning. Raises :class:`UserError` if
    the path is not a checkpoint, or if all checkpoints are damaged.
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
    raise UserError(f"{wanted} is not a checkpoint; the checkpoints of this run: {known}")


def steps_to_resume(folders: Mapping[str, Path], finished: Collection[str]) -> dict[str, int]:
    """The step from which each subject continues exactly as before, if several trained together; 0: from the start.

    The rounding of a batch depends on its rows, so no subject may repeat steps without the others. All continue from
    the newest step at which all that trained together then have an intact checkpoint, or have ``finished``. If they
    were killed while they wrote their first checkpoints, all start over. A subject that is not in the result has no
    such checkpoint: it failed earlier, or is new. ``folders``: the checkpoint folder of each subject by name.
    """
    unfinished = {name: checkpoint_steps(folder) for name, folder in folders.items() if name not in finished}
    for step in sorted({step for steps in unfinished.values() for step in steps}, reverse=True):
        found = {name: _intact(steps[step]) for name, steps in unfinished.items() if step in steps}
        intact = [checkpoint for checkpoint in found.values() if checkpoint]
        needed = {*found} | {name for checkpoint in intact for name in checkpoint.together if name in unfinished}
        if intact and all(found.get(name) for name in needed):
            return dict.fromkeys(found, step)
        if intact and all(checkpoint.together and checkpoint.previous == 0 for checkpoint in intact):
            return dict.fromkeys(found, 0)
    return {}


def _intact(path: Path) -> Checkpoint | None:
    try:
        return read_checkpoint(path)
    except DamagedCheckpointError as error:
        log.warning("%s", error)
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and verify all hashes. Raises :class:`UserError` for a damaged checkpoint."""
    remedy = f"resume from an earlier one (--resume_from_checkpoint {path.parent}/step-N) or start a new run"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, hashes, own = int(manifest["format_version"]), dict(manifest["sha256"]), manifest.pop(OWN_HASH, None)
        result = Checkpoint(
            path, int(manifest["step"]), manifest["identity"], manifest["schedule"], manifest["scaler"],
            manifest.get("optimizer", {}), manifest.get("previous", 0), manifest.get("together", []),
        )  # fmt: skip
        is_changed = (version > 1 or own is not None) and own != _hash(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"the checkpoint {path} is damaged (its manifest cannot be read): {remedy}"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {path} has format version {version}, newer than this release reads: upgrade nora-diffusion"
        )
    if is_changed:
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged ({MANIFEST} was changed): {remedy}")
    if re.fullmatch(r"step-\d+", path.name) and path.name != f"step-{result.step}":
        raise DamagedCheckpointError(
            f"the checkpoint {path} is not that of its folder's name ({MANIFEST} has step {result.step}): {remedy}"
        )
    for name in (FILE_NAME, OPTIMIZER):
        file = path / name
        if not file.is_file() or sha256(file) != hashes.get(name):
            raise DamagedCheckpointError(f"the checkpoint {path} is damaged ({name} is missing or changed): {remedy}")
    return result


def _hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the values of a manifest, which does not depend on the order of keys or on white space."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if settings, data, base or versions differ from the checkpoint; name each."""
    before, now = _flat(checkpoint.identity), _flat(identity)
    changes = [
        f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"the checkpoint {checkpoint.path} belongs to a different run ({'; '.join(changes)}): "
            "restore these values, or start a new run in another --output_dir"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Give each package version an entry of its own, so that a message lists only those that differ."""
    versions = identity.get("versions") or {}
    rest = {key: value for key, value in identity.items() if key != "versions"}
    return rest | {f"version of {name}": version for name, version in versions.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
