"""Export a finished adapter to plain LoRAs, and upload it to the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ...conversion.export import export_lora
from ...conversion.lora_layouts import Format
from ...errors import UserError, first_line
from ...formats.foreign import DIFFUSERS_FILE
from ...io.files import sha256
from ..planning.rundir import EXPORTS, RunFolder
from .run import Run

log = logging.getLogger(__name__)


def export_all(adapter: Path, formats: Sequence[str], dtype: str | None) -> list[Path]:
    """Write the adapter in each format to ``exports/<format>/``; return the files.

    Raises :class:`UserError` at the first format that fails; the adapter and earlier exports stay on disk.
    """
    files: list[Path] = []
    for format in dict.fromkeys(formats):
        folder = adapter.parent / EXPORTS / format
        names = {"diffusers": DIFFUSERS_FILE, "kohya": f"{adapter.parent.name}.safetensors"}
        try:
            report = export_lora(adapter, folder / names.get(format, ""), cast(Format, format), dtype)
        except UserError as error:
            raise UserError(
                f"the adapter is saved in {adapter.parent}, but the {format} export failed: {error}"
            ) from error
        log.info("%s: rank %d, max |dW error| %.1e", report.path, report.rank, report.max_error)
        if report.path.is_dir():
            files += sorted(path for path in folder.rglob("*") if path.is_file())
        else:
            files += [report.path, *report.embeddings]
    return files


def push(run: Run, folder: RunFolder, files: Sequence[Path]) -> None:
    """Log a list of ``files``, then upload them to a private repository. Raises :class:`UserError`.

    Refuses training photos, and an existing public repository unless ``hub_private`` is off. Files on disk stay.
    """
    from huggingface_hub import HfApi

    config = run.config
    photos = {photo.sha256: photo.path.name for photo in run.subject.images}
    found = [photos[digest] for path in files if (digest := sha256(path)) in photos]
    if found:
        raise UserError(
            f"the adapter is saved in {folder.path}, but {found[0]} is a training photo: nothing was uploaded"
        )
    api = HfApi(token=config.hub_token)
    names = [path.relative_to(folder.path).as_posix() for path in files]
    repository = config.hub_model_id or folder.path.name
    for path, short in zip(files, names, strict=True):
        log.info("to be uploaded to %s: %s, %d bytes", repository, short, path.stat().st_size)
    try:
        name = api.create_repo(repository, private=config.hub_private, exist_ok=True).repo_id
        if config.hub_private and not api.repo_info(name).private:
            raise UserError(
                f"the repository {name} is public: choose another --hub_model_id, or set --hub_private false"
            )
        api.upload_folder(repo_id=name, folder_path=folder.path, allow_patterns=names, commit_message="NoRA adapter")
    except UserError:
        raise
    except Exception as error:  # network errors of client libraries have no common base class
        raise UserError(
            f"the adapter is saved in {folder.path}, but the upload failed ({first_line(error)}): upload the "
            "files listed above with `hf upload`"
        ) from error
