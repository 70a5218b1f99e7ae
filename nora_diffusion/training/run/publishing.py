"""What leaves a finished run: plain LoRAs for other tools and, where asked, an upload to the hub."""

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
    """Write the adapter in every format under ``exports/<format>/``; returns the files.

    Raises :class:`UserError` for the first that fails; the adapter and what was written before stay.
    """
    files: list[Path] = []
    for format in dict.fromkeys(formats):
        place = adapter.parent / EXPORTS / format
        names = {"diffusers": DIFFUSERS_FILE, "kohya": f"{adapter.parent.name}.safetensors"}
        try:
            report = export_lora(adapter, place / names.get(format, ""), cast(Format, format), dtype)
        except UserError as error:
            raise UserError(f"the adapter is saved in {adapter.parent}, but not as {format}: {error}") from error
        log.info("%s: rank %d, max |dW error| %.1e", report.path, report.rank, report.max_error)
        if report.path.is_dir():
            files += sorted(path for path in place.rglob("*") if path.is_file())
        else:
            files += [report.path, *report.embeddings]
    return files


def push(run: Run, folder: RunFolder, wanted: Sequence[Path]) -> None:
    """Upload ``wanted`` to a private repository, listed first. Raises :class:`UserError`; what is on disk stays.

    A repository that exists and is public is refused unless ``hub_private`` is off, and so is a training photo.
    """
    from huggingface_hub import HfApi

    config = run.config
    photos = {photo.sha256: photo.path.name for photo in run.subject.images}
    found = [photos[digest] for path in wanted if (digest := sha256(path)) in photos]
    if found:
        raise UserError(f"the adapter is saved in {folder.path}, but {found[0]} is a training photo: nothing was sent")
    api = HfApi(token=config.hub_token)
    names = [path.relative_to(folder.path).as_posix() for path in wanted]
    place = config.hub_model_id or folder.path.name
    for path, short in zip(wanted, names, strict=True):
        log.info("to be sent to %s: %s, %d bytes", place, short, path.stat().st_size)
    try:
        name = api.create_repo(place, private=config.hub_private, exist_ok=True).repo_id
        if config.hub_private and not api.repo_info(name).private:
            raise UserError(f"the repository {name} is public: send to another, or say --hub_private false")
        api.upload_folder(repo_id=name, folder_path=folder.path, allow_patterns=names, commit_message="NoRA adapter")
    except UserError:
        raise
    except Exception as error:  # of the network's kinds of failure each client library has its own
        raise UserError(
            f"the adapter is saved in {folder.path}, but the upload failed ({first_line(error)}): send the files "
            "that are listed above with `hf upload`"
        ) from error
