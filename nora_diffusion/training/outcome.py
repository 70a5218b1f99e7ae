"""The end of a run: the adapter, its model card and, where asked, the upload to the hub."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ..errors import UserError
from ..loaders import save_adapter
from .averaging import shown
from .model_card import training_section
from .rundir import RunFolder
from .setup import Run


def write_adapter_and_card(run: Run, folder: RunFolder, final_loss: float, seconds: float) -> Path:
    """Write ``nora_adapter.safetensors`` and ``README.md`` whole, then upload them if the config says so."""
    samples = sorted(folder.samples.glob(f"step-{run.total_steps:06d}-*.png")) if folder.samples.is_dir() else []
    card = training_section(run, final_loss, seconds, [path.relative_to(folder.path) for path in samples])
    # An earlier step that was chosen is in place already, averaged as it was measured.
    last = run.kept_step in (None, run.total_steps)
    with shown(run.parameters, run.optimizer, run.average) if last else nullcontext():
        path = save_adapter(
            run.pipe,
            folder.path,
            run.adapter,
            dtype=run.config.save_dtype,
            info={**run.info, "step": run.kept_step or run.total_steps},
            card=card,
        )
    if run.config.push_to_hub:
        push(run, folder, samples)
    return path


def push(run: Run, folder: RunFolder, samples: list[Path]) -> None:
    """Upload adapter, card and last samples. Raises :class:`UserError`; what is on disk stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=run.config.hub_token)
    try:
        name = api.create_repo(run.config.hub_model_id or folder.path.name, exist_ok=True).repo_id
        wanted = [folder.adapter.name, "README.md", *(str(path.relative_to(folder.path)) for path in samples)]
        api.upload_folder(repo_id=name, folder_path=folder.path, allow_patterns=wanted, commit_message="NoRA adapter")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the adapter is saved in {folder.path}, but the upload failed: {first}") from error
