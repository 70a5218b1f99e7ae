"""The state of one training job, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...errors import printable
from ...io.files import is_held
from ...io.run_layout import CHECKPOINTS, LOG, MANIFEST, SAMPLES, STATE, checkpoint_steps, images_by_step
from ..messages import without_dashes, without_folders

Status = Literal["waiting", "starting", "training", "saving", "stopping", "done", "stopped", "failed", "killed"]
RUNNING: tuple[Status, ...] = ("waiting", "starting", "training", "saving", "stopping")
STOP_CODES = (130, 143)
CURVE_POINTS = 400
RECENT = 20
MAX_NUMBER = 1e15


class LogRow(NamedTuple):
    """A step of the log; ``seconds`` is the time that it took, if known."""

    step: int
    loss: float
    seconds: float | None


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
    """Read the state of a job from the files of its process. A value of the wrong type or size counts as missing."""
    run = folder / "run"
    rows = _log_rows(run / LOG)
    state, outcome = read_json(run / STATE), read_json(folder / "exit.json")
    status = _status(folder, state, outcome)
    step = rows[-1].step if rows else 0
    total = max(0, int(number_in(state, "total") or 0))
    adapter = text_in(outcome, "adapter")
    return Job(
        id=folder.name,
        name=printable(text_in(read_json(folder / "job.json"), "name")) or folder.name,
        folder=folder,
        status=status,
        message=_message(folder, status, state, outcome),
        step=total if status == "done" else step,
        total=total,
        eta=_eta(rows, total) if status == "training" else None,
        checkpoint=_last_checkpoint(run / CHECKPOINTS),
        adapter=Path(adapter) if adapter else None,
        losses=_thin([(row.step, row.loss) for row in rows]),
        samples=[image for images in images_by_step(run / SAMPLES).values() for image in images],
    )


def _status(folder: Path, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> Status:
    if is_held(folder / "alive.lock"):
        if (folder / "stopping").exists():
            return "stopping"
        process = read_json(folder / "process.json")
        own = "pid" in process and state.get("pid") == process["pid"]
        status = text_in(state, "status") if own else ""  # otherwise an earlier process wrote the state
        if not status:
            return "waiting" if process.get("waiting") else "starting"
        states: dict[str, Status] = {"training": "training", "saving": "saving", "done": "saving"}
        return states.get(status, "starting")
    if not outcome:
        return "killed"
    code = number_in(outcome, "code")
    if code in STOP_CODES:
        return "stopped"
    return "done" if code == 0 else "failed"


def _message(folder: Path, status: Status, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    if status == "killed":
        process = read_json(folder / "process.json")
        if process and process.get("boot") != boot_id():
            return "the machine was restarted during the training"
        return "the system killed it, probably out of memory: choose a smaller batch size or resolution"
    if status == "failed":
        message = text_in(outcome, "message") or _last_error(folder / "output.log") or text_in(state, "message")
        return without_dashes(without_folders(printable(message)))
    return printable(text_in(outcome, "message")) if status == "stopped" else ""


def _last_error(log: Path) -> str:
    """The last error message of the trainer."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _eta(rows: Sequence[LogRow], total: int) -> float | None:
    recent = [row.seconds for row in rows[-RECENT:] if row.seconds is not None]
    return max(0, total - rows[-1].step) * sum(recent) / len(recent) if recent else None


def _last_checkpoint(folder: Path) -> int | None:
    steps = [step for step, path in checkpoint_steps(folder).items() if (path / MANIFEST).is_file()]
    return max(steps, default=None)


def _log_rows(path: Path) -> list[LogRow]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    rows = []
    for row in map(_parse, lines):
        step, loss = number_in(row, "step"), number_in(row, "loss")
        if step is not None and loss is not None:
            rows.append(LogRow(int(step), loss, number_in(row, "seconds")))
    return rows


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``CURVE_POINTS`` points: means over chunks of equal size."""
    size = -(-len(points) // CURVE_POINTS) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parse(text: str) -> dict[str, Any]:
    """A JSON object; empty for anything else, as a line that is still being written."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def number_in(values: Mapping[str, Any], key: str) -> float | None:
    """The number at ``key``; None if there is none, or it is not finite or beyond any step, loss or time."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= MAX_NUMBER else None


def text_in(values: Mapping[str, Any], key: str) -> str:
    """The text at ``key``; empty if there is none."""
    value = values.get(key)
    return value if isinstance(value, str) else ""


def boot_id() -> str:
    """An id that changes when the machine boots; empty on systems without one."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""
