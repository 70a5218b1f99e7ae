"""What the Train tab shows of photos and runs, as HTML whose every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...reports.plots import line_chart
from ..jobs.images import Checked
from ..jobs.job import Job
from ..layout.cards import line

WORDS = {
    "waiting": "Waiting for the device …",
    "starting": "Starting: loading the base, preparing the photos …",
    "training": "Training",
    "saving": "Saving the adapter …",
    "stopping": "Stopping: the running step ends and is saved …",
    "done": "Done",
    "stopped": "Stopped",
    "failed": "Failed",
    "killed": "Killed",
}
NO_RUN = '<p class="empty">No training yet. Drop photos or pick an example subject, then press Train.</p>'


def photo_report(photos: Sequence[Checked], faults: Sequence[str] = ()) -> str:
    """How many photos will do, and why others, or their captions (``faults``), will not."""
    if not photos and not faults:
        return ""
    used = [photo for photo in photos if photo.pictures]
    faults = [*(photo.fault for photo in photos if not photo.pictures), *faults]
    own = sum(bool(photo.caption) for photo in used)
    crops = sum(len(photo.pictures) for photo in used)
    said = line(
        f"{len(used)} photo{'' if len(used) == 1 else 's'} will be trained on, shown as the trainer sees them"
        f"{f', in {crops} crops' if crops > len(used) else ''}"
        f"{f'; {own} with a caption of its own' if own else ''}."
    )
    return said + "".join(line(f"Left out: {fault}.", bad=True) for fault in faults)


def findings(warnings: Sequence[str]) -> str:
    """What the checks before a run say."""
    return "".join(line(w) for w in warnings) or line("Everything is in order.")


def label(job: Job) -> str:
    """A run in the list of runs."""
    date = f"{job.id[4:6]}-{job.id[6:8]} {job.id[9:11]}:{job.id[11:13]}" if len(job.id) > 15 else ""
    return f"{job.name} · {date} · {job.status}"


def run_status(job: Job) -> str:
    """Where a run stands: step, time left, how it ended and what can be done."""
    text = WORDS[job.status]
    if job.total and job.status not in ("waiting", "starting"):
        text += f", step {job.step} of {job.total}" if job.status != "done" else f": {job.total} steps"
    if job.losses and job.status == "training":
        text += f", loss {job.losses[-1][1]:.4f}"
    if job.eta is not None:
        text += f", about {duration(job.eta)} left"
    if job.status == "done" and job.adapter is not None:
        text += f". It is in the library as '{job.adapter.name}'."
    if job.message:
        text += f": {job.message}"
    if job.resumable:
        text += f". It can go on from step {job.checkpoint}."
    share = 100 * job.step / job.total if job.total else 0
    return line(text, bad=job.status in ("failed", "killed")) + (
        f'<div class="bar"><span style="width:{min(share, 100):.0f}%"></span></div>' if job.total else ""
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def curves(job: Job, scores: Mapping[str, Sequence[tuple[float, float]]] | None) -> str:
    """Loss and, where there is a judge, how true the samples are."""
    parts = [line_chart("Loss", {"loss": job.losses}, "step", "loss")]
    if scores is not None:
        shown = {"subject fidelity": scores["subject"], "prompt fidelity": scores["prompt"]}
        parts.append(line_chart("Samples, by the small judge", shown, "step", "cosine"))
    elif job.samples:
        parts.append(line("This base brings no judge, so the samples are shown without scores."))
    return f'<div class="plots">{"".join(parts)}</div>'
