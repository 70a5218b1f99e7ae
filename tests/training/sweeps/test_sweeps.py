"""Sweeps: which cells a file describes, what is trained and trained again, and the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_clip, write_photos
from runs import Configure, assert_equal_tensors
from transformers import CLIPModel

from nora_diffusion.cli import main
from nora_diffusion.errors import UserError
from nora_diffusion.results.files import read_results
from nora_diffusion.scoring.judges import judge_hashes, load_judges
from nora_diffusion.training.sweeps.cells import read_cells
from nora_diffusion.training.sweeps.results import means, write_results
from nora_diffusion.training.sweeps.run import run_sweep

AXES = """
axes:
  subject:
    dog: {instance_data_dir: dogs, instance_prompt: a sks dog}
    cat: {instance_data_dir: cats, instance_prompt: a sks cat}
  learning_rate: [5e-4, 1e-3]
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def test_cells_are_the_product_of_the_axes(tmp_path: Path) -> None:
    cells = read_cells(written(tmp_path, "settings: {rank: 4}" + AXES))
    assert [cell.name for cell in cells] == ["dog_5e-4", "dog_1e-3", "cat_5e-4", "cat_1e-3"]
    assert cells[2].labels == {"subject": "cat", "learning_rate": "5e-4"}
    assert cells[2].settings == {
        "rank": "4", "instance_data_dir": "cats", "instance_prompt": "a sks cat", "learning_rate": "5e-4",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("settings: {rank: 4}", "has no axes"),
        ("axes: {}", "has no axes"),
        ("[a]", "has no axes"),
        ("axes: {rank: [1]}\nsetting: {}", "unknown key 'setting'.*settings"),
        ("axes: {ranks: [1]}", "unknown setting 'ranks'.*rank"),
        ("axes: {rank: [1]}\nsettings: {lerning_rate: 1}", "did you mean 'learning_rate'"),
        ("axes: {rank: 4}", "give a list of values"),
        ("axes: {rank: []}", "give a list of values"),
        ("axes: {rank: [1, 1]}", "occurs twice"),
        ("axes: {size: {a: {rank: 1}}, rank: [1]}", "both set rank"),
        ("axes: {rank: [1]}\nsettings: {output_dir: a}", "output_dir cannot be set"),
        ("axes: {instance_prompt: [a dog, a/dog]}", "would share the folder 'a-dog'"),
        (f"axes: {{instance_prompt: [{'a' * 300}]}}", "is not a folder name"),
        (f"axes: {{rank: {list(range(1, 200))}, seed: {list(range(200))}}}".replace("'", ""), "39800 cells"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_cells(written(tmp_path, text))


KEPT = ("pretrained_model_name_or_path", "max_train_steps", "train_batch_size", "inner_rank", "basis", "seed")
"""Settings of the tests' configuration that the sweeps have."""


@pytest.fixture
def sweep(configure: Configure, tmp_path: Path) -> Path:
    """Two subjects, and an axis that concerns the whole run."""
    folders = {name: str(write_photos(tmp_path / name, 2, seed=n)) for n, name in enumerate(("dog", "cat"))}
    common = {key: value for key, value in configure().to_dict().items() if key in (*KEPT, "rank")}
    axes: dict[str, Any] = {
        "subject": {n: {"instance_data_dir": path, "instance_prompt": f"a sks {n}"} for n, path in folders.items()},
        "learning_rate": ["1e-2"],
        "mixed_precision": ["no", "bf16"],
    }
    return written(tmp_path, json.dumps({"settings": {**common, "seed": 7}, "axes": axes}))


def test_missing_cells_are_trained_and_finished_ones_are_kept(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", str(sweep), "--out", str(out), "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and not out.exists()
    assert main(["sweep", str(sweep), "--out", str(out)]) == 0
    adapters = {name: out / name / "nora_adapter.safetensors" for name in names}
    times = {name: file.stat().st_mtime_ns for name, file in adapters.items()}
    exact, rounded = read_results(out / "results.json"), read_results(out / "results-2.json")  # of another precision
    assert exact.protocol | {"precision": "bf16"} == rounded.protocol
    assert [row.subject for row in exact.rows] == ["dog", "cat"] and exact.data["photos"]["dog"]["training"].images == 2
    assert [*exact.methods] == ["nora mixed_precision=no"] and str(tmp_path) not in exact.command
    row = exact.rows[0]
    assert (row.seed, row.rate, row.steps) == (7, 1e-2, 3) and row.scores["training_loss"] > 0
    assert row.bytes == adapters[names[0]].stat().st_size and row.trained_parameters > 0 and row.seconds > 0
    assert not {"seed", "learning_rate", "instance_data_dir"} & {*exact.methods["nora mixed_precision=no"]}

    adapters[names[2]].unlink()  # as if its run had been stopped before it saved
    assert main(["sweep", str(sweep), "--out", str(out)]) == 0
    again = {name: file.stat().st_mtime_ns for name, file in adapters.items()}
    assert [name for name in names if again[name] != times[name]] == [names[2]]


def test_a_failing_cell_does_not_stop_the_others(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "cat" / "0.png").write_bytes(b"not an image")
    cells = read_cells(sweep)
    errors = run_sweep(cells, tmp_path / "out", at_once=2)
    rows = write_results("sweep", cells, tmp_path / "out", "sweep sweep.yaml")
    assert errors and all("cat" in error for error in errors)
    assert {row.labels["subject"] for row in rows} == {"dog"} and len(rows) == 2
    assert set(means(rows)) == {("1e-2", "no"), ("1e-2", "bf16")}


def test_a_renamed_cell_is_no_result_of_another(sweep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells, out = read_cells(sweep), tmp_path / "out"
    assert run_sweep(cells, out, at_once=4) == []
    assert len(write_results("sweep", cells, out, "sweep sweep.yaml")) == 4
    first, second = (out / cell.name for cell in cells[:2])
    first.rename(out / "aside")
    second.rename(first)
    (out / "aside").rename(second)
    assert len(write_results("sweep", cells, out, "sweep sweep.yaml")) == 2
    assert f"{first} is left out: its run has other settings than its name says" in caplog.text
    state = out / cells[2].name / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"loss": 1e300}))
    write_results("sweep", cells, out, "sweep sweep.yaml")
    assert [read_results(file) for file in out.glob("results*.json")]


def test_results_have_the_hashes_of_their_judges(configure: Configure, tmp_path: Path) -> None:
    clips = [str(tiny_clip(tmp_path / name)) for name in ("clip", "retrained")]
    other: Any = CLIPModel.from_pretrained(clips[1])
    torch.nn.init.ones_(other.visual_projection.weight)
    other.save_pretrained(clips[1])
    common = {"num_validation_images": 1, "validation_steps": 3, "sample_steps": 1}
    settings = configure(**common).to_dict() | {"judge": clips[0]}
    own = {key: settings[key] for key in (*common, *KEPT, "judge", "instance_data_dir", "instance_prompt")}
    cells = read_cells(written(tmp_path, json.dumps({"settings": own, "axes": {"rank": ["2", "4"]}})))
    out = tmp_path / "out"
    assert run_sweep(cells[:1], out) == []
    for file in Path(clips[1]).iterdir():  # the same name, other weights
        (Path(clips[0]) / file.name).write_bytes(file.read_bytes())
    assert run_sweep(cells, out) == []
    write_results("sweep", cells, out, "sweep sweep.yaml")
    files = [read_results(out / name) for name in ("results.json", "results-2.json")]
    assert [row.scores["clip_i"] for row in files[0].rows]
    assert files[1].judges == judge_hashes(load_judges(clips[1], None, "cpu")) != files[0].judges
    assert [*files[0].judges] == ["clip_i"]


@pytest.mark.slow
def test_processes_train_the_same_adapters(sweep: Path, tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("two", 2)):
        assert run_sweep(read_cells(sweep), tmp_path / out, workers=workers) == []
    for cell in read_cells(sweep):
        file = f"{cell.name}/nora_adapter.safetensors"
        assert_equal_tensors(tmp_path / "one" / file, tmp_path / "two" / file)
