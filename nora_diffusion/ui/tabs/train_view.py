"""HTML of the Train tab: photo report, findings, run status, curves. Every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...reports.plots import line_chart
from ..jobs.images import CheckedImage
from ..jobs.job import Job
from ..layout.cards import line

STATUS_TEXTS = {
    "waiting": "Waiting for the device …",
    "starting": "Starting: loading the base model, preparing the photos …",
    "training": "Training",
    "saving": "Saving the adapter …",
    "stopping": "Stopping: finishing the current step and saving …",
    "done": "Done",
    "stopped": "Stopped",
    "failed": "Failed",
    "killed": "Killed",
}
NO_RUN = '<p class="empty">No training runs yet. Drop photos or choose an example subject, then press Train.</p>'


def photo_report(photos: Sequence[CheckedImage], errors: Sequence[str] = ()) -> str:
    """How many photos are used, and why other photos or captions (``errors``) are left out."""
    if not photos and not errors:
        return ""
    used = [photo for photo in photos if photo.crops]
    errors = [*(photo.error for photo in photos if not photo.crops), *errors]
    captioned = sum(bool(photo.caption) for photo in used)
    crops = sum(len(photo.crops) for photo in used)
    summary = line(
        f"{len(used)} photo{'' if len(used) == 1 else 's'} will be used, cropped as shown"
        f"{f' ({crops} crops)' if crops > len(used) else ''}"
        f"{f'; captions: {captioned}' if captioned else ''}."
    )
    return summary + "".join(line(f"Left out: {error}.", bad=True) for error in errors)


def findings(warnings: Sequence[str]) -> str:
    """The warnings of the preflight checks, as HTML."""
    return "".join(line(w) for w in warnings) or line("No problems found.")


def label(job: Job) -> str:
    """A run in the list of runs."""
    date = f"{job.id[4:6]}-{job.id[6:8]} {job.id[9:11]}:{job.id[11:13]}" if len(job.id) > 15 else ""
    return f"{job.name} · {date} · {job.status}"


def run_status(job: Job) -> str:
    """Step, time left, or how the run ended and what to do next."""
    text = STATUS_TEXTS[job.status]
    if job.total and job.status not in ("waiting", "starting"):
        text += f", step {job.step} of {job.total}" if job.status != "done" else f": {job.total} steps"
    if job.losses and job.status == "training":
        text += f", loss {job.losses[-1][1]:.4f}"
    if job.eta is not None:
        text += f", about {duration(job.eta)} left"
    if job.status == "done" and job.adapter is not None:
        text += f". Saved to the library as '{job.adapter.name}'."
    if job.message:
        text += f": {job.message}"
    if job.resumable:
        text += f". It can be resumed from step {job.checkpoint}."
    share = 100 * job.step / job.total if job.total else 0
    return line(text, bad=job.status in ("failed", "killed")) + (
        f'<div class="bar"><span style="width:{min(share, 100):.0f}%"></span></div>' if job.total else ""
    )


def duration(seconds: float) -> str:
    """Seconds as text, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def curves(job: Job, scores: Mapping[str, Sequence[tuple[float, float]]] | None) -> str:
    """Loss curve, and score curves of the samples if there are ``scores``."""
    charts = [line_chart("Loss", {"loss": job.losses}, "step", "loss")]
    if scores is not None:
        series = {"subject fidelity": scores["subject"], "prompt fidelity": scores["prompt"]}
        charts.append(line_chart("Scores of the samples", series, "step", "cosine similarity"))
    elif job.samples:
        charts.append(line("The samples have no scores: only the embedded base model comes with a judge model."))
    return f'<div class="plots">{"".join(charts)}</div>'
