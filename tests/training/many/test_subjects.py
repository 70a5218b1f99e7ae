"""Several subjects in one run: each result equals that of a separate run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from factories import write_photos
from PIL import Image
from runs import Configure, distance, factors, flags, in_double

from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, main, train
from nora_diffusion.training.many import subjects
from nora_diffusion.training.many.batched import BatchedTrainer
from nora_diffusion.training.many.subjects import train_subjects
from nora_diffusion.training.run.batches import Batches
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.signals import Interrupted

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "shared basis": {},
    "dense core": {"method": "lora_xs", "inner_rank": None, "placement": "sqrt"},
    "own bases": {"basis": "orthogonal"},
    "no basis": {"method": "lora", "inner_rank": None, "basis": None},
    "router": {"method": "mor", "inner_rank": None, "basis": None, "num_experts": 2, "router": "prompt+timestep"},
    "block gates": {"method": "milora", "inner_rank": None, "basis": None, "balance_loss_weight": 0.0},
    "balance loss": {"method": "malora", "basis": None, "num_experts": 2, "balance_loss_weight": 0.5},
    "rank mask": {"method": "dylora", "inner_rank": None, "basis": None},
    "magnitude": {"magnitude": True},
    "dropout": {"dropout": 0.3},
    "text encoder": {"train_text_encoder": True, "text_encoder_lr": 5e-3, "dropout": 0.1},
    "new tokens": {"train_text_encoder_ti": True, "token_lr": 5e-3},
    "checkpointing": {"gradient_checkpointing": True},
    "pairs, LoRA-Pro": {"optimizer": "lora_pro"},
    "pairs, LoRA-RITE": {"optimizer": "lora_rite"},
    "measured ranks": {"rank_allocation": "gradient"},
    "moved ranks": {"rank_allocation": "adalora", "method": "lora", "inner_rank": None, "basis": None},
    "ablated ranks": {"rank_allocation": "alora"},
    "ranks by inputs": {"rank_allocation": "prilora"},
    "prior": {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2},
    "chain": {"strategy": "chain", "chain_links": 2},
    "paths between blocks": {"strategy": "reslora", "shortcut": "input"},
    "noise": {"strategy": "halora"},
}


@pytest.fixture
def entries(tmp_path: Path) -> list[dict[str, Any]]:
    """Three subjects that differ in photos, words, seeds, batches, accumulation, rates, clipping and length.

    No rate is so high that a run multiplies the rounding of its first steps: at 2e-2 a plain LoRA's does by 1e8.
    """
    folders = [write_photos(tmp_path / name, 2 + n, seed=n) for n, name in enumerate(("dog", "cat", "toy"))]
    own: list[dict[str, Any]] = [
        {"instance_prompt": "a photo of sks dog", "seed": 1, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"instance_prompt": "a photo of sks cat", "seed": 2, "train_batch_size": 3},
        {"instance_prompt": "sks toy", "seed": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3, "alpha": 8.0,
         "learning_rate": 5e-3, "snr_gamma": 5.0, "timestep_sampling": "stratified"},
    ]  # fmt: skip
    return [{"instance_data_dir": str(f), **values} for f, values in zip(folders, own, strict=True)]


def listed(entries: list[dict[str, Any]], path: Path) -> str:
    path.write_text(yaml.safe_dump(entries))
    return str(path)


@pytest.fixture
def together(configure: Configure, entries: list[dict[str, Any]], tmp_path: Path) -> Configure:
    """``together(key=value)``: a config of all three subjects in ``tmp_path/run``."""

    def build(**changes: Any) -> TrainConfig:
        steps = changes.get("max_train_steps", STEPS)
        entries[1]["max_train_steps"] = steps // 2
        for entry in entries if changes.get("train_text_encoder_ti") else ():
            word = f"<{Path(entry['instance_data_dir']).name}>"
            entry["instance_prompt"] = entry["instance_prompt"].replace("sks", word)
        values = {"instance_data_dir": None, "instance_prompt": None, "max_train_steps": steps, "seed": None}
        return configure(**{**values, "subjects": listed(entries, tmp_path / "subjects.yaml"), **changes})

    return build


def separately(config: TrainConfig, place: Path) -> dict[str, Path]:
    """Train each subject of ``config`` in a separate run; return the folders by name."""
    folders = {}
    for name, own in subjects.read_subjects(config).items():
        own.output_dir = str(place / name)
        folders[name] = train(own).adapter_path.parent
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_subjects_equal_their_own_runs(
    kind: dict[str, Any], together: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_double(monkeypatch.setattr)
    found = train_subjects(together(**kind))
    assert [result.steps for result in found] == [STEPS // 2, STEPS, STEPS]
    alone = separately(together(**kind), tmp_path / "alone")
    for name, folder in alone.items():
        assert distance(tmp_path / "run" / name, folder) <= 1e-8, name


def test_rows_of_one_batch_belong_to_different_subjects(
    together: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short version of the slow test, which also checks that rows share a pass."""
    in_double(monkeypatch.setattr)
    sizes: list[tuple[int, ...]] = []
    original = BatchedTrainer._pass
    monkeypatch.setattr(
        BatchedTrainer,
        "_pass",
        lambda self, some: (sizes.append(tuple(len(b.noisy) for _, b in some)), original(self, some))[1],
    )
    train_subjects(together(max_train_steps=3))
    assert sizes == [(2, 3, 2), (2,)] + [(2, 2), (2,)] * 2
    sizes.clear()
    train_subjects(together(max_train_steps=3, rows_at_once=5, output_dir=str(tmp_path / "less")))
    assert sizes == [(2, 3), (2,), (2,)] + [(2, 2), (2,)] * 2
    alone = separately(together(max_train_steps=3), tmp_path / "alone")
    for name, folder in alone.items():
        assert distance(tmp_path / "run" / name, folder) <= 1e-8, name
        assert distance(tmp_path / "less" / name, folder) <= 1e-8, name


def journal(folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


def assert_same(one: Path, other: Path, names: tuple[str, ...] = ("dog", "cat", "toy")) -> None:
    """Losses, weights and optimizer moments are equal bit for bit."""
    for name in names:
        assert journal(one / name) == journal(other / name)
        first, second = factors(one / name), factors(other / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [{}, {"dropout": 0.3, "train_text_encoder": True}, {"train_text_encoder_ti": True}],
    ids=["shared", "alone", "new tokens"],
)  # fmt: skip
def test_interrupted_and_resumed_is_the_same_run(
    kind: dict[str, Any], together: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives within a step, after one subject has finished and the others have not."""
    kind = {**kind, "max_train_steps": 4}
    train_subjects(together(output_dir=str(tmp_path / "whole"), **kind))
    original = Updates._update

    def update(self: Stepper, step: int) -> float:
        if step == 2 and self.folder.path.name == "dog":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "_update", update)
        with pytest.raises(Interrupted, match="--resume_from_checkpoint latest") as stop:
            train_subjects(together(**kind))
    assert (stop.value.exit_code, stop.value.step) == (143, 3)
    states = {n: json.loads((tmp_path / "run" / n / "state.json").read_text())["status"] for n in ("dog", "cat", "toy")}
    assert states == {"dog": "interrupted", "cat": "done", "toy": "interrupted"}
    torch.randn(5)
    results = train_subjects(together(resume_from_checkpoint="latest", **kind))
    assert [result.adapter_path.parent.name for result in results] == ["dog", "toy"]
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert train_subjects(together(resume_from_checkpoint="latest", **kind)) == []


def test_one_subject_goes_on_alone(together: Configure, tmp_path: Path) -> None:
    """The folder is that of an ordinary run: a single-subject training resumes from its checkpoint."""
    train_subjects(together(max_train_steps=2))
    config = tmp_path / "run" / "dog" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    assert values["subjects"] is None and values["output_dir"] == str(tmp_path / "run" / "dog")
    assert main(["--config", str(config), "--resume_from_checkpoint", "latest"]) == 0


@pytest.mark.parametrize("where", ["write_checkpoint", "conclude"])
def test_a_subject_that_cannot_be_written_is_left_out(
    where: str, together: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subject fails at its end (full disk, upload) while the others are still training."""
    owner: Any = Stepper if where == "write_checkpoint" else subjects
    original = getattr(owner, where)

    def fail(*given: Any) -> Any:
        stepper = given[0] if where == "write_checkpoint" else given[1]
        if stepper.folder.path.name == "cat":
            raise UserError("there is no room: free some space")
        return original(*given)

    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(UserError, match=r"^cat: there is no room: free some space; 2 other subjects were trained$"):
        train_subjects(together(max_train_steps=2))
    states = {n: json.loads((tmp_path / "run" / n / "state.json").read_text())["status"] for n in ("dog", "cat", "toy")}
    assert states == {"dog": "done", "cat": "failed", "toy": "done"}


def test_a_subject_that_fails_is_left_out(together: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_subjects(together(output_dir=str(tmp_path / "whole"), max_train_steps=4))
    original = Batches.mean_loss

    def mean_loss(self: Batches, *rest: Any) -> torch.Tensor:
        return original(self, *rest) * (float("nan") if self.plan.folder.name == "dog" else 1.0)

    monkeypatch.setattr(Batches, "mean_loss", mean_loss)
    with pytest.raises(UserError, match=r"dog: the loss is not finite at step 1.*2 other subjects were trained"):
        train_subjects(together(max_train_steps=4))
    assert json.loads((tmp_path / "run" / "dog" / "state.json").read_text())["status"] == "failed"
    for name in ("cat", "toy"):
        assert distance(tmp_path / "run" / name, tmp_path / "whole" / name) <= 1e-4


@pytest.mark.slow
def test_samples_show_each_subject(together: Configure, tmp_path: Path) -> None:
    """The samples of a subject equal those of its separate run."""
    changes = {"max_train_steps": 2, "validation_prompt": "a photo of sks dog", "validation_steps": 2}
    train_subjects(together(learning_rate=5.0, **changes))
    alone = separately(together(learning_rate=5.0, **changes), tmp_path / "alone")
    for name in ("dog", "toy"):
        pictures = [
            np.asarray(Image.open(place / "samples" / f"step-00000{step}-0.png"), dtype=float)
            for place in (tmp_path / "run" / name, alone[name])
            for step in (0, 2)
        ]
        start, end, own_start, own_end = pictures
        assert abs(start - own_start).max() <= 1 and abs(end - own_end).max() <= 1
        assert name == "toy" or abs(end - start).max() > 0


MISTAKES: dict[str, tuple[Any, str]] = {
    "no list": ({"name": "dog"}, "must be a YAML list of subjects"),
    "no photos": ([{"name": "dog"}], r"subject 1 of .* \(dog\): no photos"),
    "no name": ([{"instance_prompt": "x"}], "subject 1 of .*: '' is not a valid folder name"),
    "odd name": ([{"name": "../dog"}], r"'../dog' is not a valid folder name"),
    "twice": ([{"instance_data_dir": "{photos}"}, {"name": "SUBJECT"}], "the name 'SUBJECT' is used twice"),
    "shared": ([{"name": "dog", "mixed_precision": "bf16"}], "same for all subjects: give it as a flag, --mixed_prec"),
    "unknown": ([{"name": "dog", "ranc": 4}], "unknown setting 'ranc': did you mean 'rank'"),
    "prompt": ([{"instance_data_dir": "{photos}", "instance_prompt": " "}], "instance prompt is empty"),
    "upload": (
        [{"name": n, "instance_data_dir": "{photos}", "push_to_hub": True, "hub_model_id": "me/zoo"}
         for n in ("dog", "cat")], "dog and cat would both be uploaded to me/zoo: leave out --hub_model_id",
    ),
    "token": (
        [{"name": n, "instance_data_dir": "{photos}", "instance_prompt": "<a> dog", "train_text_encoder_ti": True}
         for n in ("dog", "cat")], "cat: dog already has the new token '<a>': give each",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_before_anything_is_written(
    entries: Any, words: str, configure: Configure, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "subjects.yaml"
    text = yaml.safe_dump(entries).replace("{photos}", str(photos))
    path.write_text(text)
    config = configure(subjects=str(path), instance_data_dir=None)
    with pytest.raises(UserError, match=words):
        train_subjects(config)
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_names_and_words_stay_text(configure: Configure, tmp_path: Path) -> None:
    path = tmp_path / "subjects.yaml"
    rows = [f"- {{name: {name}, instance_data_dir: {name}, trigger: {name}}}" for name in ("007", "0010", "no", "1e3")]
    path.write_text("\n".join(rows))
    found = subjects.read_subjects(configure(subjects=str(path), instance_data_dir=None))
    assert {name: (own.trigger, own.instance_data_dir) for name, own in found.items()} == {
        name: (name, name) for name in ("007", "0010", "no", "1e3")
    }
    path.write_text("- name: dog\n  instance_data_dir: a\n  name: cat\n")
    with pytest.raises(UserError, match=r"subjects\.yaml, line 3: 'name' is also in line 1"):
        subjects.read_subjects(configure(subjects=str(path), instance_data_dir=None))


def test_the_command(together: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags(together(max_train_steps=2))
    assert main([*words, "--preflight_only"]) in (0, 2)
    assert "dog: " in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / "run" / name / "nora_adapter.safetensors") for name in ("cat", "dog", "toy")
    ]
    assert main(words) == 2
    assert "dog: " in capsys.readouterr().err
