"""Joint training: one adapter for several subjects, each with its own trigger."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import tiny_clip, write_photos
from runs import Configure, assert_same_run, flags
from safetensors.torch import load_file

from nora_diffusion import inspect_adapter
from nora_diffusion.errors import UserError
from nora_diffusion.training import main, train
from nora_diffusion.training.run.batches import Batches
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.signals import Interrupted
from nora_diffusion.training.step.randomness import balanced_indices, owned_indices


@pytest.fixture
def joint(configure: Configure, tmp_path: Path) -> Configure:
    """``joint(entries, key=value)`` returns the config of two subjects with two and four photos."""

    def build(entries: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Any:
        subjects = []
        for number, (name, trigger) in enumerate({"dog": "sks", "toy": "xyz"}.items()):
            folder = write_photos(tmp_path / name, 2 + 2 * number, seed=number)
            own = {"instance_data_dir": str(folder), "instance_prompt": f"a photo of {trigger} {name}"}
            subjects.append({**own, **(entries or {}).get(name, {})})
        (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(subjects))
        values = {"instance_data_dir": None, "instance_prompt": None, "joint": True}
        return configure(**{**values, "subjects": str(tmp_path / "subjects.yaml"), **changes})

    return build


def test_subjects_and_their_images_are_equally_frequent() -> None:
    owners = ["a"] * 2 + ["b"] * 3 + ["c"]
    rows = [row for start in range(0, 36, 4) for row in balanced_indices(5, "photos", owners, start, 4)]
    assert Counter(owners[row] for row in rows) == {"a": 12, "b": 12, "c": 12}
    assert Counter(rows) == {0: 6, 1: 6, 2: 4, 3: 4, 4: 4, 5: 12}
    assert all({owners[row] for row in rows[i : i + 3]} == {"a", "b", "c"} for i in range(0, 36, 3))
    assert rows[:18] != rows[18:]
    assert rows[7:9] == balanced_indices(5, "photos", owners, 7, 2)


def test_batches_have_one_shape_and_one_subject_and_are_balanced() -> None:
    owners, shapes = ["a"] * 2 + ["b"] * 3, [1, 2, 1, 1, 2]
    batches = [owned_indices(5, "photos", owners, shapes, number, 4) for number in range(12)]
    assert all(len({(owners[row], shapes[row]) for row in rows}) == 1 for rows in batches)
    assert all({owners[rows[0]] for rows in batches[i : i + 2]} == {"a", "b"} for i in range(0, 12, 2))
    assert Counter(row for rows in batches for row in rows) == {0: 12, 1: 12, 2: 8, 3: 8, 4: 8}


def test_buckets_and_validation_with_several_subjects(joint: Configure, tmp_path: Path) -> None:
    """Each subject has held-out photos and a prompt of its own; a resumed run is the same."""
    write_photos(tmp_path / "toy", 4, (20, 48), seed=9)
    changes: dict[str, Any] = {
        "aspect_buckets": True, "judge": str(tiny_clip(tmp_path / "clip")), "validation_split": 1, "resolution": 32,
        "validation_prompts": ["{}"], "validation_steps": 2, "checkpointing_steps": 1, "max_train_steps": 4,
    }  # fmt: skip
    own = {"dog": {"class_word": "dog"}, "toy": {"class_word": "toy"}}
    folder = train(joint(own, **changes)).adapter_path.parent
    measured = json.loads((folder / "validation.json").read_text())
    assert measured["settings"]["prompts"] == ["a sks dog", "a xyz toy"] and len(measured["settings"]["photos"]) == 2
    assert [point["step"] for point in measured["points"]] == [0, 2, 4]
    assert len(json.loads((folder / "data_report.json").read_text())["held_out"]) == 2
    whole = shutil.copytree(folder, tmp_path / "whole")
    train(joint(own, **changes, resume_from_checkpoint=str(folder / "checkpoints/step-1")))
    assert_same_run(folder, whole, last=4)
    assert json.loads((folder / "validation.json").read_text()) == measured


@pytest.mark.parametrize("method", ["nora", "mor"])
def test_one_adapter_for_all_subjects(method: str, joint: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are trained with their own subject's prompt, all subjects equally often, into one file."""
    seen: list[tuple[float, str]] = []
    original = Batches._noised

    def noised(self: Batches, latents: torch.Tensor, prompts: list[str], *rest: Any) -> Any:
        count = len(self.data.latents.views_of_image)
        seen.extend((count, prompt) for prompt in prompts)
        return original(self, latents, prompts, *rest)

    monkeypatch.setattr(Batches, "_noised", noised)
    extra = {"inner_rank": None, "basis": None, "num_experts": 2} if method == "mor" else {}
    result = train(joint(method=method, max_train_steps=6, **extra))
    assert Counter(seen) == {(6, "a photo of sks dog"): 6, (6, "a photo of xyz toy"): 6}
    info = inspect_adapter(result.adapter_path)
    assert info.method == method and info.trigger == "sks, xyz" and info.class_word == "dog, toy"
    assert [(s["name"], s["trigger"]) for s in info.extra["subjects"]] == [("dog", "sks"), ("toy", "xyz")]
    assert set(info.prompts) == {"a photo of sks dog", "a photo of xyz toy"}


def test_images_get_their_own_prompts(joint: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[int], list[str]]] = []
    original = Batches._images

    def images(self: Batches, *rest: int) -> list[int]:
        found = original(self, *rest)
        drawn.append((found, self.plan.captions.draw(found, torch.Generator())))
        return found

    monkeypatch.setattr(Batches, "_images", images)
    train(joint())
    words = {row: prompt for rows, prompts in drawn for row, prompt in zip(rows, prompts, strict=True)}
    assert all(words[row] == ("a photo of sks dog" if row < 2 else "a photo of xyz toy") for row in words)


def test_each_class_has_its_own_prior_prompt(joint: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    original = Batches._noised
    monkeypatch.setattr(Batches, "_noised", lambda self, x, p, *r: (seen.append(p), original(self, x, p, *r))[1])
    own = {"dog": {"class_word": "dog"}, "toy": {"class_prompt": "a red toy"}}
    prior = {"with_prior_preservation": True, "prior_preservation": "frozen"}
    train(joint(own, **prior))
    pairs = {pair for prompts in seen for pair in zip(prompts[:2], prompts[2:], strict=True)}
    assert pairs == {("a photo of sks dog", "a photo of a dog"), ("a photo of xyz toy", "a red toy")}
    with pytest.raises(UserError, match="one set of class images"):
        train(joint(own, with_prior_preservation=True, output_dir="other"))


def test_interrupted_and_resumed_is_the_same_run(
    joint: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    words = {n: {"instance_prompt": f"a <{n}> {n}", "token_abstraction": f"<{n}>"} for n in ("dog", "toy")}
    changes = {"train_text_encoder_ti": True, "token_lr": 0.05}
    whole = train(joint(words, output_dir=str(tmp_path / "whole"), **changes)).adapter_path.parent
    assert list(inspect_adapter(whole).tokens) == ["<dog>", "<toy>"]
    original = Updates._update
    with monkeypatch.context() as patch:
        patch.setattr(
            Updates, "_update", lambda self, n: (n == 1 and os.kill(os.getpid(), signal.SIGTERM), original(self, n))[1]
        )
        with pytest.raises(Interrupted):
            train(joint(words, **changes))
    resumed = train(joint(words, resume_from_checkpoint="latest", **changes))
    assert_same_run(whole, resumed.adapter_path.parent, last=3)
    with pytest.raises(UserError, match="photos and captions"):
        train(joint({**words, "toy": {"instance_prompt": "a <toy> hat"}}, resume_from_checkpoint="latest", **changes))


MISTAKES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any], str]] = {
    "same trigger": (
        {"toy": {"instance_prompt": "a sks toy"}},
        {},
        "captions of dog contain 'sks', the trigger of toy",
    ),
    "no trigger": ({"dog": {"instance_prompt": "a dog"}}, {}, "dog has no trigger word: give it one"),
    "own rate": ({"dog": {"learning_rate": 1.0}}, {}, "learning_rate must be the same for all subjects"),
    "no list": ({}, {"subjects": None}, "--joint needs the list of subjects"),
    "one prompt": ({}, {"instance_prompt": "a dog"}, "reads instance_prompt of each subject from the list"),
    "held out": ({}, {"validation_data_dir": "photos"}, "use --validation_split instead of --validation_data_dir"),
    "cluster": ({}, {"engine": "ray"}, "--joint is a single run: leave out --engine and --address"),
}


@pytest.mark.parametrize(("entries", "changes", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(
    entries: dict[str, Any], changes: dict[str, Any], words: str, joint: Configure, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(joint(entries, **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_command(joint: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags(joint(max_train_steps=2))
    assert main([*words, "--preflight_only"]) == 0
    findings = capsys.readouterr().out
    assert "lack the trigger" not in findings and "validation prompt" not in findings
    assert main([*words, "--preflight_only", "--validation_prompt", "a dog"]) == 0
    assert "The validation prompt lacks the trigger 'sks'" in capsys.readouterr().out
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "done"
    assert load_file(tmp_path / "run" / "nora_adapter.safetensors")
    config = tmp_path / "run" / "config.yaml"
    assert main(["--config", str(config), "--resume_from_checkpoint", "latest", "--max_train_steps", "4"]) == 0
