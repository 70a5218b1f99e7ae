"""Methods side by side: what is learned once stays learned, and the tables say what the lessons say."""

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
from nora_diffusion.tiny_sd.comparing import Task, against_first, at_best_rate, by_rate, compare, tasks
from nora_diffusion.tiny_sd.measures import probe, teaching
from nora_diffusion.tiny_sd.measures.teaching import METHODS, SUBJECTS, Lesson, Probes, fit_probes, new_scenes, teach

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"


class Teacher:
    """Stands for minutes of training: counts the lessons, and fails at one if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, weights: Path, probes: object, subject: str, method: str, **values: Any) -> Lesson:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append((subject, method, values))
        share = len(self.asked) / 100
        return Lesson(subject, method, 1.0, [Image.new("RGB", (64, 64))] * 10, share, share, share, 0.5, 0.25, 7, 2**20)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    (folder / UNET).parent.mkdir(parents=True)
    (folder / UNET).write_bytes(b"some weights")
    return folder


def learn(weights: Path, out: Path, teacher: Teacher, wanted: list[Task]) -> list[dict[str, Any]]:
    return compare(weights, wanted, out, teacher, lambda: None)  # type: ignore[arg-type, return-value]


def test_each_method_and_rate_is_taught_each_subject_from_each_seed() -> None:
    found = tasks(["base", "nora", "lora"], [1e-4, 1e-3], [0, 1, 1], ["tiger", "tractor"])
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2 + 2)
    assert {task.rate for task in found if task.method == "base"} == {None}
    assert {task.seed for task in found[: len(found) // 2]} == {0}


def test_a_comparison_goes_on_where_it_was_stopped(weights: Path, tmp_path: Path) -> None:
    wanted, out = tasks(["base", "nora"], [1e-4, 1e-3], [0, 1], ["tiger"]), tmp_path / "out"
    first, second = Teacher(fails_at=4), Teacher()
    with pytest.raises(KeyboardInterrupt):
        learn(weights, out, first, wanted)
    assert len((out / "lessons.jsonl").read_text().splitlines()) == 4
    rows = learn(weights, out, second, wanted)
    assert (len(first.asked), len(second.asked)) == (4, 2)
    assert [(r["method"], r["rate"], r["seed"]) for r in rows] == [(t.method, t.rate, t.seed) for t in wanted]
    assert second.asked[-1] == ("tiger", "nora", {"seed": 1, "learning_rate": 1e-3})
    assert len(list((out / "pictures").glob("*.png"))) == len(wanted)


def test_other_weights_and_other_steps_are_other_lessons(weights: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "out", Teacher()
    for steps in (None, 2, None):
        learn(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger", steps)])
    assert len(teacher.asked) == 2
    (weights / UNET).write_bytes(b"better weights")
    learn(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger")])
    assert len(teacher.asked) == 3


def test_what_is_no_list_of_lessons_and_no_base_is_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "lessons.jsonl").write_text('{"key": 1}\n[3]\n')
    with pytest.raises(UserError, match=r"lessons.jsonl is no list of lessons"):
        learn(weights, tmp_path, Teacher(), [])
    with pytest.raises(UserError, match="holds no base"):
        learn(tmp_path, tmp_path / "out", Teacher(), [])


def row(method: str, rate: float | None, seed: int, subject: str, both: float) -> dict[str, Any]:
    return {
        "method": method, "rate": rate, "seed": seed, "subject": subject, "subject_right": both,
        "background_right": 1.0, "both_right": both, "subject_score": 0.5, "prompt_score": 0.25,
        "trained_numbers": 1234, "bytes": 2**20, "seconds": 60.0,
    }  # fmt: skip


def test_the_table_is_mean_over_subjects_and_deviation_between_seeds() -> None:
    values = {(0, "a"): 0.2, (0, "b"): 0.6, (1, "a"): 0.4, (1, "b"): 0.8}
    rows = [row("base", None, 0, "a", 0.1), *(row("nora", 1e-3, *where, both) for where, both in values.items())]
    base, nora = by_rate(rows).splitlines()[2:]
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
    nora, lora = against_first(rows).splitlines()[2:]
    assert nora == "| nora | 0.600 | 1.000 | 0.600 |  |"
    assert lora == "| lora | 0.500 | 1.000 | 0.500 | -0.100 [-0.100, -0.100] |"


def pixels(network: object, pictures: np.ndarray, batch: int = 64) -> torch.Tensor:
    return torch.from_numpy(pictures[:, 4::8, 4::8].reshape(len(pictures), -1)).float() / 255


@pytest.mark.slow
def test_lessons_of_equal_size_on_the_embedded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "load_network", lambda: None)  # pixels for features: the network is an extra
    monkeypatch.setattr(probe, "features", pixels)
    for module in (teaching, comparing):
        monkeypatch.setattr(module, "new_scenes", lambda slug: new_scenes(slug)[:2])
    probes: Probes = fit_probes(fitted=100, tested=10, each=4)
    wanted = [Task(method, 1e-3, 0, SUBJECTS[1], 1) for method in ("nora", "lora_r2")]
    nora, lora = compare(EMBEDDED_WEIGHTS, wanted, tmp_path, teach, lambda: probes)
    assert nora["trained_numbers"] == 116_736
    assert 0.8 < lora["trained_numbers"] / nora["trained_numbers"] < 1.25
    for lesson in (nora, lora):
        assert lesson["both_right"] <= min(lesson["subject_right"], lesson["background_right"])
    assert json.loads((tmp_path / "lessons.jsonl").read_text().splitlines()[0]) == nora


def test_the_command_prints_and_writes_the_report(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(weights: Path, wanted: list[Task], out: Path) -> list[dict[str, Any]]:
        return learn(weights, out, Teacher(), wanted)

    monkeypatch.setattr(comparing, "compare", quick)
    flags = ["--weights", str(weights), "--out", str(tmp_path / "out"), "--rates", "6e-4", "--seeds", "0", "1"]
    assert comparing.main(flags) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert text in capsys.readouterr().out and "4 subjects, 2 seeds" in text
    assert all(f"| {method} |" in text for method in comparing.COMPARED) and set(comparing.COMPARED) <= set(METHODS)
    assert comparing.main(["--weights", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
