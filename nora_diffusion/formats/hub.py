"""Adapters on the Hugging Face Hub: found by their id and downloaded."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, first_line, quoted
from ..io.files import is_path
from .adapter_file import BASIS_FOLDER, IN_FOLDERS, inspect_adapter, split_address
from .foreign import PEFT_CONFIG, PEFT_FILE


def locate(path_or_id: str | Path) -> Path:
    """The path of an adapter, downloaded first for a hub id. Raises :class:`UserError` if the download fails."""
    if not isinstance(path_or_id, str | Path):
        raise UserError(f"{quoted(path_or_id)} is not an adapter: give a file, a folder, a pack address or a hub id")
    path = Path(path_or_id)
    try:
        path = path.expanduser()
        known = path.exists()
    except (OSError, RuntimeError, ValueError):
        known = True  # not a valid path: `inspect_adapter` raises the error
    if known or split_address(path) or is_path(str(path_or_id)) or "/" not in str(path_or_id):
        return path
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(str(path_or_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"{quoted(path_or_id)} is not a local path, and it cannot be downloaded from the hub: {reason}"
        ) from error


def _download(hub_id: str) -> Path:
    """Download an adapter from a hub repository, under any of its usual names, with the shared basis that it needs."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*names: str) -> Path | None:
        for name in names:
            try:
                return Path(hf_hub_download(hub_id, name))
            except LocalEntryNotFoundError:  # no connection
                raise
            except EntryNotFoundError:
                continue
        return None

    file = fetch(*IN_FOLDERS)
    if file is None:
        raise UserError(f"the hub repository {hub_id!r} holds no adapter: it has none of {', '.join(IN_FOLDERS)}")
    if file.name == PEFT_FILE:
        fetch(PEFT_CONFIG)  # has the scale
    info = inspect_adapter(file, hashed=False)
    if info.basis == "shared":
        fetch(f"{BASIS_FOLDER}/{info.basis_sha256}.safetensors")  # if it is missing, `read_tensors` raises the error
    return file
