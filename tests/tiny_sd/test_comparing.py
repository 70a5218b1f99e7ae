"""Comparing methods: finished lessons are not repeated, and the tables report the lessons."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.results import leaderboard
from nora_diffusion.results.files import read_results
from nora_diffusion.results.protocols import protocols
from nora_diffusion.tiny_sd.comparing import command, lessons
from nora_diffusion.tiny_sd.comparing.curves import page
from nora_diffusion.tiny_sd.comparing.lessons import Task, all_tasks, base_hash, compare
from nora_diffusion.tiny_sd.comparing.rates import START, at_best_rate, next_rates
from nora_diffusion.tiny_sd.comparing.tables import difference, table_at_best_rate, table_by_rate
from nora_diffusion.tiny_sd.measures import probe, prompt_sets
from nora_diffusion.tiny_sd.measures.classroom import Classroom
from nora_diffusion.tiny_sd.measures.methods import METHODS, method_settings, peers_own, training_settings
from nora_diffusion.tiny_sd.measures.probes import Probes, Sizes
from nora_diffusion.tiny_sd.measures.scores import NAMES
from nora_diffusion.tiny_sd.measures.teaching import TAUGHT_SUBJECTS, Lesson, Student
from nora_diffusion.training.settings.checks import check_config
from nora_diffusion.training.settings.config import TrainConfig

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"


class Teacher:
    """Replaces minutes of training: records its batches and interrupts at call ``fails_at``."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.calls: list[list[Student]] = []

    @property
    def students(self) -> list[Student]:
        return [student for batch in self.calls for student in batch]

    def teach(self, students: Sequence[Student]) -> list[Lesson]:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append([*students])
        return [self.lesson(student) for student in students]

    def lesson(self, student: Student) -> Lesson:
        images = {name: [Image.new("RGB", (64, 64))] * 10 for name in student.prompts}
        scores = {name: 0.5 for prompts in student.prompts for name in NAMES[prompts]}
        return Lesson(student.subject, student.method, 1.0, images, {"heldout_loss": 0.06, **scores}, 7, 2**20, 1.0)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    (folder / UNET).parent.mkdir(parents=True)
    (folder / UNET).write_bytes(b"some weights")
    return folder


def run(weights: Path, out: Path, teacher: Teacher, tasks: list[Task], at_once: int = 1) -> list[dict[str, Any]]:
    return compare(base_hash(weights), tasks, out, teacher, at_once)


def test_tasks_are_all_combinations_without_duplicates() -> None:
    tasks = all_tasks(["base", "nora", "lora"], [1e-4, 1e-3], [0, 1, 1], ["tiger", "tractor"])
    assert len(tasks) == len(set(tasks)) == 2 * 2 * (1 + 2 + 2)
    assert {task.rate for task in tasks if task.method == "base"} == {None}
    assert {task.seed for task in tasks[: len(tasks) // 2]} == {0}


def test_a_method_can_have_a_rate_of_its_own() -> None:
    tasks = all_tasks(["lora:rank=4@1e-2", "nora"], [1e-3, 2e-3], [0], ["tiger"])
    assert [(task.method, task.rate) for task in tasks] == [("lora:rank=4", 1e-2), ("nora", 1e-3), ("nora", 2e-3)]
    for wrong in ("lora@", "lora@fast", "lora@-1"):
        with pytest.raises(UserError, match="write a learning rate behind @"):
            all_tasks([wrong], [1e-3], [0], ["tiger"])


def test_the_name_of_a_lesson_is_a_valid_name_for_a_run() -> None:
    name = Task("mor:router=prompt,rank=8", 4.8e-3, 0, "tiger+tractor", 200, shown=3).name
    assert re.fullmatch(r"\w[\w.-]*", name) and name == "mor-router-prompt-rank-8-0.0048-200-of3-0-tiger_tractor"


def test_an_interrupted_comparison_continues(weights: Path, tmp_path: Path) -> None:
    tasks, out = all_tasks(["base", "nora"], [1e-4, 1e-3], [0, 1], ["tiger"]), tmp_path / "out"
    first, second = Teacher(fails_at=2), Teacher()
    with pytest.raises(KeyboardInterrupt):
        run(weights, out, first, tasks, at_once=2)
    assert len((out / "lessons.jsonl").read_text().splitlines()) == 4
    rows = run(weights, out, second, tasks, at_once=2)
    assert ([*map(len, first.calls)], [*map(len, second.calls)]) == ([2, 2], [2])
    assert [(r["method"], r["rate"], r["seed"]) for r in rows] == [(t.method, t.rate, t.seed) for t in tasks]
    last = second.students[-1]
    assert (last.subject, last.method, last.settings) == ("tiger", "nora", {"seed": 1, "learning_rate": 1e-3})
    assert len(list((out / "pictures").glob("*.png"))) == len(tasks)


def test_lessons_depend_on_weights_steps_and_settings(weights: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "out", Teacher()
    for steps in (None, 2, None):
        run(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger", steps)])
    assert len(teacher.calls) == 2
    run(weights, out, teacher, [Task("nora:inner_rank=8", 1e-3, 0, "tiger")])
    (weights / UNET).write_bytes(b"better weights")
    run(weights, out, teacher, [Task("nora", 1e-3, 0, "tiger")])
    assert len(teacher.calls) == 4


def test_a_lesson_with_its_own_rate_and_steps_does_not_depend_on_their_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = set()
    for rate in (1e-3, 2e-3):
        monkeypatch.setattr(lessons, "method_settings", lambda _, rate=rate: {"rank": 8, "learning_rate": rate})
        keys |= {
            (task.rate, task.key("base"))
            for task in (Task("lora", 5e-3, 0, "tiger", 5), Task("lora", None, 0, "tiger"))
        }
    assert [rate for rate, _ in sorted(keys, key=str)].count(5e-3) == 1 and len(keys) == 3


def test_lessons_depend_on_what_is_shown_and_asked(weights: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "out", Teacher()
    first = Task("nora", 1e-3, 0, "tiger", 5)
    rows = run(weights, out, teacher, [first, replace(first, shown=3), replace(first, prompts=("companions", "class"))])
    assert [student.shown for student in teacher.students] == [6, 3, 6]
    assert [row["task"] for row in rows] == ["six images", "three images", "six images"]
    assert "obeyed" in rows[2] and "subject_score" not in rows[2]
    assert {path.name for path in (out / "pictures").iterdir()} == {
        "nora-0.001-5-0-tiger.png", "nora-0.001-5-of3-0-tiger.png",
        "nora-0.001-5-0-tiger-companions.png", "nora-0.001-5-0-tiger-class.png",
    }  # fmt: skip


def test_a_damaged_list_of_lessons_and_a_missing_base_are_errors(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "lessons.jsonl").write_text('{"key": 1}\n[3]\n')
    with pytest.raises(UserError, match=r"lessons.jsonl is not a list of lessons"):
        run(weights, tmp_path, Teacher(), [])
    with pytest.raises(UserError, match="holds no base"):
        run(tmp_path, tmp_path / "out", Teacher(), [])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "base"])
def test_named_methods_are_valid_runs(method: str) -> None:
    settings = method_settings(method)
    check_config(TrainConfig(**settings, instance_data_dir="photos", instance_prompt="a sks dog"))
    assert settings["target_modules"][:2] == ["attn", "ff"] and settings["snr_gamma"] == 5.0


def test_a_method_takes_settings_in_text() -> None:
    plain, changed = method_settings("nora"), method_settings("nora:inner_rank=8,basis=orthogonal")
    assert changed == {**plain, "inner_rank": 8, "basis": "orthogonal"}
    assert method_settings("lora:target_modules=attn+ff")["target_modules"] == ["attn", "ff"]


def test_a_peer_has_the_settings_of_lora_and_its_own() -> None:
    shared = {key: value for key, value in method_settings("lora").items() if key not in ("method", "rank")}
    assert method_settings("full") == {**shared, "method": "full"}
    assert method_settings("lokr:rank=4") == {**shared, "method": "lokr", "rank": 4}
    assert method_settings("oft") == {**shared, "method": "oft", "block_size": 32}
    assert peers_own("lokr:rank=4") == {"rank": 4} and training_settings("oft") == method_settings("lora")


@pytest.mark.parametrize(
    "text, message",
    [
        ("loha", "the method 'loha' is unknown"), ("base:rank=2", "not trained"), ("nora:rank", "name=value"),
        ("nora:ranks=2", "unknown setting 'ranks'"), ("nora:learning_rate=1", "use --rates"),
        ("full:rank=2", "full takes no settings, not rank"), ("lokr:alpha=2", "lokr takes rank, not alpha"),
        ("oft:block_size=0", "block_size=0 is not a whole number"), ("oft:learning_rate=1", "use --rates"),
    ],
)  # fmt: skip
def test_wrong_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_settings(text)


def row(method: str, rate: float | None, seed: int, subject: str, loss: float, score: float = 0.5) -> dict[str, Any]:
    return {
        "method": method, "rate": rate, "seed": seed, "subject": subject, "subject_right": 0.5,
        "background_right": 1.0, "both_right": 0.25, "subject_score": score, "prompt_score": 0.25,
        "heldout_loss": loss, "trained_numbers": 1234, "bytes": 2**20, "seconds": 60.0, "cpu_seconds": 8.0,
    }  # fmt: skip


def test_the_table_shows_mean_over_subjects_and_deviation_between_seeds() -> None:
    values = {(0, "a"): 0.02, (0, "b"): 0.06, (1, "a"): 0.04, (1, "b"): 0.08}
    rows = [row("base", None, 0, "a", 0.1), *(row("nora", 1e-3, *key, loss) for key, loss in values.items())]
    base, nora = table_by_rate(rows).splitlines()[2:]
    deviation = statistics.stdev([0.04, 0.06])
    assert base == "| base |  | 0.1000 | 0.500 | 0.250 | 0.500 | 1.000 | 0.250 |  |  |  |"
    assert f"| 0.0500 ± {deviation:.4f} |" in nora
    assert nora.endswith("| 1,234 | 1.05 MB | 8.0 |")


def test_a_subjects_rate_is_chosen_on_the_other_subjects() -> None:
    table = {("a", 1e-4): 0.1, ("a", 1e-3): 0.9, ("b", 1e-4): 0.8, ("b", 1e-3): 0.7, ("c", 1e-4): 0.5, ("c", 1e-3): 0.3}
    rows = [row("lora", rate, 0, subject, loss) for (subject, rate), loss in table.items()]
    chosen = {r["subject"]: r["rate"] for r in at_best_rate(rows, "lora")}
    assert chosen == {"a": 1e-3, "b": 1e-4, "c": 1e-4}  # a's own 0.1 does not count for a


def test_methods_are_compared_lesson_by_lesson() -> None:
    subjects = ("a", "b", "c")
    rows = [row("nora", 1e-3, s, name, 0.05 + 0.01 * i, 0.4) for s in (0, 1) for i, name in enumerate(subjects)]
    rows += [row("lora", 1e-3, s, name, 0.04 + 0.01 * i, 0.6) for s in (0, 1) for i, name in enumerate(subjects)]
    nora, lora = table_at_best_rate(rows).splitlines()[2:]
    assert "| 0.0600 |" in nora and nora.endswith("|  |  |")
    assert "| 0.0500 |" in lora
    assert lora.endswith("| -0.0100 [-0.0100, -0.0100] | +0.200 [+0.200, +0.200] |")


def test_a_single_lesson_has_no_interval() -> None:
    rows = [row("nora", 1e-3, 0, "a", 0.05, 0.4), row("lora", 1e-3, 0, "a", 0.04, 0.6)]
    assert table_at_best_rate(rows).endswith("| -0.0100 | +0.200 |")


RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name, gap", [("quick", "+0.0138 ["), ("embedded-seeds", "+0.0174 [")])
@pytest.mark.skipif(not [*RESULTS.glob("*.json")], reason="there are no submitted results")
def test_the_report_and_the_leaderboard_have_the_same_differences(name: str, gap: str) -> None:
    (protocol,) = protocols([read_results(RESULTS / f"{name}.json")])
    rows = [
        {**r.scores, "method": r.method, "subject": r.subject, "seed": r.seed, "rate": r.rate} for r in protocol.rows
    ]
    header, lines = leaderboard.table(leaderboard.rank(protocol))
    cells = {line[0]: line[header.index("held-out loss minus lora's")] for line in lines}
    assert cells["nora_input"].startswith(gap)
    for method in ("nora", "nora_input"):
        assert difference(rows, method, "lora", "heldout_loss") == cells[method]


def test_rates_go_on_until_the_best_is_inside() -> None:
    def rows(losses: dict[float, float]) -> list[dict[str, Any]]:
        return [row("lora", rate, 0, subject, loss) for rate, loss in losses.items() for subject in ("a", "b")]

    assert next_rates([], "lora") == list(START)
    assert next_rates(rows({1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.1}), "lora") == [8e-3]
    assert next_rates(rows({1e-3: 0.1, 2e-3: 0.2}), "lora") == [5e-4]
    assert next_rates(rows({1e-3: 0.3, 2e-3: 0.1, 4e-3: float("inf")}), "lora") == []
    both = [*rows({1e-3: 0.1, 2e-3: 0.2}), row("lora", 1e-3, 1, "a", 0.9)]  # b's rate, chosen on a, is the higher one
    assert next_rates(both, "lora") == [4e-3, 5e-4]


def test_the_curves_show_every_method() -> None:
    rows = [row(m, rate, 0, "a", 0.1 / rate, 0.4) for m in ("nora", "lora") for rate in (1e-3, 2e-3, 4e-3)]
    text = page([*rows, row("nora", 8e-3, 0, "a", float("inf"))])
    assert text.count("<svg") == 3 and text.count("<polyline") == 6


def pixels(network: object, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    return torch.from_numpy(images[:, 4::8, 4::8].reshape(len(images), -1)).float() / 255


@pytest.mark.slow
def test_lessons_are_the_same_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "load_network", lambda: None)  # the network is an optional extra: use pixels as features
    monkeypatch.setattr(probe, "features", pixels)
    two = {name: lambda slug, make=make: make(slug)[:2] for name, make in prompt_sets.PROMPT_SETS.items()}
    monkeypatch.setattr(prompt_sets, "PROMPT_SETS", two)
    probes = Probes(Sizes(scenes=100, tested=10, alone=4, accompanied=1), cached=False)
    room, base = Classroom(EMBEDDED_WEIGHTS, probes, "no"), base_hash(EMBEDDED_WEIGHTS)
    sets = ("scenes", "class")
    tasks = [Task(method, 1e-3, 0, TAUGHT_SUBJECTS[1], 2, prompts=sets) for method in ("base", "nora", "lora_r2")]
    together, alone = (compare(base, tasks, tmp_path / str(n), room, at_once=n) for n in (3, 1))
    costs = {"seconds", "cpu_seconds"}
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - costs:
            # Images have 8 bits, so that rounding shows more in their scores.
            most = 2e-5 if name == "heldout_loss" else 5e-4
            same = pytest.approx(other[name], abs=most) if isinstance(other[name], float) else other[name]
            assert one[name] == same, name
    control, nora, lora = together
    assert nora["trained_numbers"] == 116_736
    assert 0.8 < lora["trained_numbers"] / nora["trained_numbers"] < 1.25
    assert nora["heldout_loss"] < control["heldout_loss"] and lora["heldout_loss"] < control["heldout_loss"]
    assert control["class_distance"] < 1e-6
    for lesson in together:
        assert lesson["both_right"] <= min(lesson["subject_right"], lesson["background_right"])
    stored = json.loads((tmp_path / "3/lessons.jsonl").read_text().splitlines()[0])
    assert stored == {**control, "prompts": list(sets)}


def test_the_command_prints_and_writes_the_report(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--weights", str(weights), "--out", str(tmp_path / "out"), "--rates", "6e-4", "--seeds", "0", "1"]
    assert command.main(flags, Teacher()) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert text in capsys.readouterr().out and "4 subjects, 2 seeds, ten images each of scenes" in text
    assert all(f"| {method} |" in text for method in command.DEFAULT_METHODS)
    assert (tmp_path / "out/curves.html").is_file()
    results = read_results(tmp_path / "out/results.json")
    assert len(results.rows) == 4 * 2 * len(command.DEFAULT_METHODS) and results.methods["nora"]["method"] == "nora"
    assert not {"learning_rate", "max_train_steps"} & {*results.methods["nora"]}
    assert {*results.scores} == {"heldout_loss", *NAMES["scenes"]} and results.rows[0].scores["heldout_loss"] == 0.06
    assert {*results.data["six images"]} == {*TAUGHT_SUBJECTS} and str(tmp_path) not in results.command
    for wrong in (
        ["--weights", str(tmp_path)], ["--methods", "loha"], ["--rates", "auto", "1e-3"], ["--at_once", "0"],
        ["--subjects", "tiger+lion"],
    ):  # fmt: skip
        assert command.main(["--weights", str(weights), "--out", str(tmp_path / "other"), *wrong], Teacher()) == 2


def test_the_command_compares_methods_that_are_not_ours(weights: Path, tmp_path: Path) -> None:
    flags = ["--weights", str(weights), "--out", str(tmp_path / "out"), "--rates", "1e-3", "--seeds", "0", "--methods"]
    teacher = Teacher()
    assert command.main([*flags, "lora", "full@1e-4", "lokr:rank=4", "oft"], teacher) == 0
    results = read_results(tmp_path / "out/results.json")
    assert results.methods["lokr:rank=4"] == {**results.methods["lora"], "method": "lokr", "rank": 4}
    assert {row.rate for row in results.rows if row.method == "full"} == {1e-4}
    assert "lokr:rank=4" in (tmp_path / "out/curves.html").read_text()
    assert command.main([*flags, "lora", "full@1e-4", "lokr:rank=4", "oft"], again := Teacher()) == 0
    assert len(teacher.students) == 16 and not again.students
    assert command.main([*flags, "lokr:alpha=4"], Teacher()) == 2


def test_automatic_rates_of_the_command_end(weights: Path, tmp_path: Path) -> None:
    class Parabola(Teacher):
        """The best rate is 9.6e-3."""

        def lesson(self, student: Student) -> Lesson:
            rate = student.settings.get("learning_rate", 1.0)
            lesson = super().lesson(student)
            return replace(lesson, scores={**lesson.scores, "heldout_loss": abs(float(np.log2(rate / 9.6e-3)))})

    teacher = Parabola()
    flags = ["--weights", str(weights), "--out", str(tmp_path), "--rates", "auto", "--methods", "base", "lora"]
    assert command.main([*flags, "--seeds", "0", "--subjects", "tiger", "tractor"], teacher) == 0
    rates = {student.settings["learning_rate"] for student in teacher.students if student.method == "lora"}
    assert sorted(rates) == [1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3, 1.92e-2]
