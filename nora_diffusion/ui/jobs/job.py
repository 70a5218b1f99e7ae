"""The state of one training job, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...io.files import is_held
from ...io.run_layout import CHECKPOINTS, LOG, MANIFEST, SAMPLES, STATE, checkpoint_steps, images_by_step
from ..messages import without_dashes, without_folders

Status = Literal["waiting", "starting", "training", "saving", "stopping", "done", "stopped", "failed", "killed"]
RUNNING: tuple[Status, ...] = ("waiting", "starting", "training", "saving", "stopping")
STOP_CODES = (130, 143)
CURVE_POINTS = 400
RECENT = 20


@dataclass(frozen=True)
class Job:
    """The state of a job. ``eta`` is in seconds; ``losses`` are ``(step, loss)``, averaged down for plots."""

    id: str
    name: str
    folder: Path
    status: Status
    message: str = ""
    step: int = 0
    total: int = 0
    eta: float | None = None
    checkpoint: int | None = None
    adapter: Path | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    samples: list[Path] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self.status in RUNNING

    @property
    def resumable(self) -> bool:
        """Whether it can continue from a checkpoint."""
        return self.status in ("stopped", "failed", "killed") and self.checkpoint is not None


def read_job(folder: Path) -> Job:
    """Read the state of a job from the files of its process."""
    run = folder / "run"
    rows = _log_rows(run / LOG)
    state, outcome = read_json(run / STATE), read_json(folder / "exit.json")
    status = _status(folder, state, outcome)
    step = int(rows[-1]["step"]) if rows else 0
    total = int(state.get("total") or 0)
    adapter = Path(outcome["adapter"]) if "adapter" in outcome else None
    return Job(
        id=folder.name,
        name=str(read_json(folder / "job.json").get("name", folder.name)),
        folder=folder,
        status=status,
        message=_message(folder, status, state, outcome),
        step=total if status == "done" else step,
        total=total,
        eta=_eta(rows, total) if status == "training" else None,
        checkpoint=_last_checkpoint(run / CHECKPOINTS),
        adapter=adapter,
        losses=_thin([(int(row["step"]), float(row["loss"])) for row in rows]),
        samples=[image for images in images_by_step(run / SAMPLES).values() for image in images],
    )


def _status(folder: Path, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> Status:
    if is_held(folder / "alive.lock"):
        if (folder / "stopping").exists():
            return "stopping"
        process = read_json(folder / "process.json")
        own = "pid" in process and state.get("pid") == process["pid"]
        status = state.get("status") if own else None  # otherwise an earlier process wrote the state
        if status is None:
            return "waiting" if process.get("waiting") else "starting"
        return status if status in ("starting", "training", "saving") else "saving" if status == "done" else "starting"
    if not outcome:
        return "killed"
    if outcome["code"] in STOP_CODES:
        return "stopped"
    return "done" if outcome["code"] == 0 else "failed"


def _message(folder: Path, status: Status, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    if status == "killed":
        process = read_json(folder / "process.json")
        if process and process.get("boot") != boot_id():
            return "the machine was restarted during the training"
        return "the system killed it, probably out of memory: choose a smaller batch size or resolution"
    if status == "failed":
        message = outcome.get("message") or _last_error(folder / "output.log") or state.get("message") or ""
        return without_dashes(without_folders(str(message)))
    return str(outcome.get("message") or "") if status == "stopped" else ""


def _last_error(log: Path) -> str:
    """The last error message of the trainer."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _eta(rows: Sequence[Mapping[str, Any]], total: int) -> float | None:
    recent = [float(row["seconds"]) for row in rows[-RECENT:] if "seconds" in row]
    return (total - int(rows[-1]["step"])) * sum(recent) / len(recent) if recent else None


def _last_checkpoint(folder: Path) -> int | None:
    steps = [step for step, path in checkpoint_steps(folder).items() if (path / MANIFEST).is_file()]
    return max(steps, default=None)


def _log_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line is being written
        if isinstance(row, dict) and "step" in row and "loss" in row:
            rows.append(row)
    return rows


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``CURVE_POINTS`` points: means over chunks of equal size."""
    size = -(-len(points) // CURVE_POINTS) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def boot_id() -> str:
    """An id that changes when the machine boots; empty on systems without one."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""
