"""Scores of a training's sample images by step, from the judge model of the embedded base."""

from __future__ import annotations

import json
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.captions import without_trigger
from ...errors import UserError
from ...io.files import write_atomic
from ...io.run_layout import step_of
from ...io.yaml_text import read_yaml
from .job import Job, number_in, read_json

FILE = "scores.json"
KINDS = ("subject", "prompt")


class SampleScores:
    """Subject fidelity (CLIP-I against the photos) and prompt fidelity (CLIP-T) of sample images.

    Each image is scored once; the scores are cached in the job's folder. One instance serves all pages.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def _judge(self) -> Any:
        from ...scoring.judges import load_judge

        return load_judge()

    def curves(self, job: Job) -> dict[str, list[tuple[float, float]]]:
        """Mean score of each step's samples: ``{"subject": [(step, score)], "prompt": [...]}``."""
        with self._lock:
            known = self._known(job)
        steps: dict[int, list[dict[str, float]]] = {}
        for sample in job.samples:
            if sample.name in known:
                steps.setdefault(step_of(sample), []).append(known[sample.name])
        return {
            kind: [(step, sum(s[kind] for s in scores) / len(scores)) for step, scores in sorted(steps.items())]
            for kind in KINDS
        }

    def _known(self, job: Job) -> dict[str, dict[str, float]]:
        file = job.folder / FILE
        known: dict[str, dict[str, float]] = {
            name: scores
            for name, scores in read_json(file).items()
            if isinstance(scores, dict) and all(number_in(scores, kind) is not None for kind in KINDS)
        }
        new = [sample for sample in job.samples if sample.name not in known]
        if new:
            known |= self._score(job, new)
            write_atomic(file, json.dumps(known))
        return known

    def _score(self, job: Job, samples: list[Path]) -> dict[str, dict[str, float]]:
        from ...data import Pixels, read_images
        from ...generation.image_settings import read_settings
        from ...scoring.judges import prompt_score, subject_score

        photos = Pixels(read_images(job.folder / "photos"))
        trigger = _trigger(job)
        scores = {}
        for sample in samples:
            try:
                prompt = read_settings(sample).prompt
                with Image.open(sample) as opened:
                    image = opened.convert("RGB")
            except (UserError, OSError, SyntaxError, ValueError):
                continue
            prompt = without_trigger(prompt, trigger)
            scores[sample.name] = {
                "subject": subject_score(self._judge, [image], photos),
                "prompt": prompt_score(self._judge, [image], [prompt]),
            }
        return scores


def _trigger(job: Job) -> str:
    return str(read_yaml(job.folder / "request.yaml", "request").get("trigger") or "")
