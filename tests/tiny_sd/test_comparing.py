"""Comparing methods: finished lessons are not repeated, and the tables report the lessons."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.tiny_sd import comparing
from nora_diffusion.tiny_sd.comparing import Task, all_tasks, at_best_rate, compare, table_at_best_rate, table_by_rate
from nora_diffusion.tiny_sd.measures import probe, teaching
from nora_diffusion.tiny_sd.measures.teaching import (
    METHODS,
    TAUGHT_SUBJECTS,
    Lesson,
    Probes,
    fit_probes,
    new_scenes,
    teach,
)

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"


class Teacher:
    """Replaces minutes of training: records its calls and interrupts at call ``fails_at``."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, weights: Path, probes: object, subject: str, method: str, **settings: Any) -> Lesson:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((subject, method, settings))
        share = len(self.calls) / 100
        return Lesson(subject, method, 1.0, [Image.new("RGB", (64, 64))] * 10, share, share, share, 0.5, 0.25, 7, 2**20)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    (folder / UNET).parent.mkdir(parents=True)
    (folder / UNET).write_bytes(b"some weights")
    return folder


def run(weights: Path, out: Path, teacher: Teacher, tasks: list[Task]) -> list[dict[str, Any]]:
    return compare(weights, tasks, out, teacher, lambda: None)  # type: ignore[arg-type, return-value]


def test_tasks_are_all_combinations_without_duplicates() -> None:
    tasks = all_tasks(["base", "nora", "lora"], [1e-4, 1e-3], [0, 1, 1], ["tiger", "tractor"])
    assert len(tasks) == len(set(tasks)) == 2 * 2 * (1 + 2 + 2)
    assert {task.rate for task in tasks if task.method == "base"} == {None}
    assert {task.seed for task in tasks[: len(tasks) // 2]} == {0}


def test_an_interrupted_comparison_continues(weights: Path, tmp_path: Path) -> None:
    tasks, out = all_tasks(["base", "nora"], [1e-4, 1e-3], [0, 1], ["tiger"]), tmp_path / "out"
    first, second = Teacher(fails_at=4), Teacher()
    with pytest.raises(KeyboardInterrupt):
        run(weights, out, first, tasks)
    assert len((out / "lessons.jsonl").read_text().splitlines()) == 4
    rows = run(weights, out, second, tasks)
    assert (len(first.calls), len(second.calls)) == (4, 2)
    assert [(r["method"], r["rate"], r["seed"]) for r in rows] == [(t.method, t.rate, t.seed) for t in tasks]
    assert second.calls[-1] == ("tiger", "nora", {"seed": 1, "learning_rate": 1e-3})
    assert len(list((out / "pictures").glob("*.png"))) == len(tasks)


def test_lessons_depend_on_weights_and_steps(weights: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "out", Teacher()
    for steps in (None, 2, None):
        run(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger", steps)])
    assert len(teacher.calls) == 2
    (weights / UNET).write_bytes(b"better weights")
    run(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger")])
    assert len(teacher.calls) == 3


def test_a_damaged_list_of_lessons_and_a_missing_base_are_errors(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "lessons.jsonl").write_text('{"key": 1}\n[3]\n')
    with pytest.raises(UserError, match=r"lessons.jsonl is not a list of lessons"):
        run(weights, tmp_path, Teacher(), [])
    with pytest.raises(UserError, match="holds no base"):
        run(tmp_path, tmp_path / "out", Teacher(), [])


def row(method: str, rate: float | None, seed: int, subject: str, both: float) -> dict[str, Any]:
    return {
        "method": method, "rate": rate, "seed": seed, "subject": subject, "subject_right": both,
        "background_right": 1.0, "both_right": both, "subject_score": 0.5, "prompt_score": 0.25,
        "trained_numbers": 1234, "bytes": 2**20, "seconds": 60.0,
    }  # fmt: skip


def test_the_table_shows_mean_over_subjects_and_deviation_between_seeds() -> None:
    values = {(0, "a"): 0.2, (0, "b"): 0.6, (1, "a"): 0.4, (1, "b"): 0.8}
    rows = [row("base", None, 0, "a", 0.1), *(row("nora", 1e-3, *key, both) for key, both in values.items())]
    base, nora = table_by_rate(rows).splitlines()[2:]
    deviation = statistics.stdev([0.4, 0.6])
    assert base == "| base |  | 0.100 | 1.000 | 0.100 | 0.500 | 0.250 |  |  |  |"
    assert f"| nora | 0.001 | 0.500 ± {deviation:.3f} | 1.000 ± 0.000 |" in nora
    assert nora.endswith("| 1,234 | 1.05 MB | 60 |")


def test_a_subjects_rate_is_chosen_on_the_other_subjects() -> None:
    table = {("a", 1e-4): 0.9, ("a", 1e-3): 0.1, ("b", 1e-4): 0.2, ("b", 1e-3): 0.3, ("c", 1e-4): 0.5, ("c", 1e-3): 0.7}
    rows = [row("lora", rate, 0, subject, both) for (subject, rate), both in table.items()]
    chosen = {r["subject"]: r["rate"] for r in at_best_rate(rows, "lora")}
    assert chosen == {"a": 1e-3, "b": 1e-4, "c": 1e-4}  # a's own 0.9 does not count for a


def test_methods_are_compared_lesson_by_lesson() -> None:
    subjects = ("a", "b", "c")
    rows = [row("nora", 1e-3, s, name, 0.5 + 0.1 * i) for s in (0, 1) for i, name in enumerate(subjects)]
    rows += [row("lora", 1e-3, s, name, 0.4 + 0.1 * i) for s in (0, 1) for i, name in enumerate(subjects)]
    nora, lora = table_at_best_rate(rows).splitlines()[2:]
    assert nora == "| nora | 0.600 | 1.000 | 0.600 |  |"
    assert lora == "| lora | 0.500 | 1.000 | 0.500 | -0.100 [-0.100, -0.100] |"


def pixels(network: object, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    return torch.from_numpy(images[:, 4::8, 4::8].reshape(len(images), -1)).float() / 255


@pytest.mark.slow
def test_lessons_of_equal_size_on_the_embedded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "load_network", lambda: None)  # the network is an optional extra: use pixels as features
    monkeypatch.setattr(probe, "features", pixels)
    for module in (teaching, comparing):
        monkeypatch.setattr(module, "new_scenes", lambda slug: new_scenes(slug)[:2])
    probes: Probes = fit_probes(fitted=100, tested=10, each=4)
    tasks = [Task(method, 1e-3, 0, TAUGHT_SUBJECTS[1], 1) for method in ("nora", "lora_r2")]
    nora, lora = compare(EMBEDDED_WEIGHTS, tasks, tmp_path, teach, lambda: probes)
    assert nora["trained_numbers"] == 116_736
    assert 0.8 < lora["trained_numbers"] / nora["trained_numbers"] < 1.25
    for lesson in (nora, lora):
        assert lesson["both_right"] <= min(lesson["subject_right"], lesson["background_right"])
    assert json.loads((tmp_path / "lessons.jsonl").read_text().splitlines()[0]) == nora


def test_the_command_prints_and_writes_the_report(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(weights: Path, tasks: list[Task], out: Path) -> list[dict[str, Any]]:
        return run(weights, out, Teacher(), tasks)

    monkeypatch.setattr(comparing, "compare", quick)
    flags = ["--weights", str(weights), "--out", str(tmp_path / "out"), "--rates", "6e-4", "--seeds", "0", "1"]
    assert comparing.main(flags) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert text in capsys.readouterr().out and "4 subjects, 2 seeds" in text
    assert all(f"| {method} |" in text for method in comparing.DEFAULT_METHODS) and set(
        comparing.DEFAULT_METHODS
    ) <= set(METHODS)
    assert comparing.main(["--weights", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
