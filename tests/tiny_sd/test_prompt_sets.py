"""What a comparison shows and asks for, and whether its scores are right on constructed images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.scoring.judges import load_judge
from nora_diffusion.tiny_sd.examples import subject_object
from nora_diffusion.tiny_sd.measures import probe
from nora_diffusion.tiny_sd.measures.probes import COMPANIONS, Fitted, Probes, Sizes, accompanied, companion_of
from nora_diffusion.tiny_sd.measures.prompt_sets import PROMPT_SETS, asked, companion_scenes
from nora_diffusion.tiny_sd.measures.scores import BETTER, NAMES, SCORERS, Drawn, Judges, failed, score, told_apart
from nora_diffusion.tiny_sd.measures.shown import members, write_shown
from nora_diffusion.tiny_sd.world.render import render
from nora_diffusion.tiny_sd.world.vocabulary import SUBJECTS

TRIO = "cyclops-purple+cyclops-orange+gremlin-green"
JUDGE = load_judge(EMBEDDED_WEIGHTS / "judge")


class Read:
    """Probes that answer what the test says, image by image."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = answers

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.zeros(len(images), 1)

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(probe=SimpleNamespace(predict=lambda _: self.answers[name.replace(" ", "_")]))


def scored(prompts: str, images: Sequence[Image.Image], slug: str, shown: int = 6, **answers: list[str]) -> Any:
    probes: Any = Read(**answers)
    drawn = Drawn(asked(prompts, slug), images, shown, lambda: rendered(prompts, slug))
    return score(prompts, Judges(JUDGE, probes), drawn)


def rendered(prompts: str, slug: str) -> list[Image.Image]:
    return [Image.fromarray(render(scene)) for _, scene in asked(prompts, slug)]


def test_new_scenes_count_right_subjects_and_copied_backgrounds() -> None:
    images = rendered("scenes", "tiger")
    # The last three are backgrounds of the six training images, two of them also of three.
    kinds = ["forest", "desert", "mountains", "road", "wall", "sea", "sky", "grass", "grass", "beach"]
    subjects = ["tiger"] * 6 + ["panda"] * 4
    found = scored("scenes", images, "tiger", subject=subjects, background=kinds)
    assert found["subject_right"] == 0.6 and found["background_right"] == 0.7 and found["both_right"] == 0.6
    assert found["copied_background"] == 0.3 and found["subject_score"] > 0.8
    assert scored("scenes", images, "tiger", 3, subject=subjects, background=kinds)["copied_background"] == 0.2


def test_companions_need_the_companion_and_the_subject() -> None:
    truth = [companion_of(scene) for scene in companion_scenes("tiger")]
    assert truth == [*COMPANIONS[1:5], "tree", "tree", "another object", "another object", "two of it", "three of it"]
    read, subjects = [*truth[:5], *["none"] * 5], ["panda", *["tiger"] * 9]
    found = scored("companions", rendered("companions", "tiger"), "tiger", companion=read, accompanied_subject=subjects)
    assert found == {"companion_right": 0.5, "accompanied_right": 0.9, "obeyed": 0.4}


def test_the_class_is_compared_with_the_images_of_the_base() -> None:
    same = scored("class", rendered("class", "tiger"), "tiger", object=["cat"] * 8 + ["bear"] * 2)
    assert same["class_right"] == 0.8 and same["class_distance"] < 1e-6
    other = scored("class", rendered("class", "tractor"), "tiger", object=["truck"] * 10)
    assert other["class_right"] == 0 and other["class_distance"] > 0.3
    assert other["class_likeness"] < same["class_likeness"]


def test_members_are_told_apart_only_among_themselves() -> None:
    fitted = probe.Probe(("a", "b", "other"), torch.eye(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
    features = torch.tensor([[1.0, 0, 5], [0, 1, 5], [1, 0, 5]])  # "other" would be the answer among all
    assert told_apart(fitted, features, ["a", "b", "b"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_set_asks_for_ten_new_captions(name: str) -> None:
    for slug in SUBJECTS:
        captions = [scene.caption for _, scene in asked(name, slug)]
        assert len(set(captions)) == 10 and all(("sks" in text) == (name != "class") for text in captions)
        others = [scene.objects[-1].class_word for scene in companion_scenes(slug) if len(set(scene.objects)) > 1]
        assert len(set(others)) == 2 and subject_object(slug).class_word not in others


def test_joined_subjects_have_a_trigger_each(tmp_path: Path) -> None:
    assert members(TRIO) == {"cyclops-purple": "sks", "cyclops-orange": "ohwx", "gremlin-green": "zwx"}
    write_shown(TRIO, tmp_path, 3)
    captions = [(tmp_path / f"{i}.txt").read_text() for i in range(9)]
    assert [sum(f"{word} monster" in text for text in captions) for word in ("sks", "ohwx", "zwx")] == [3, 3, 3]
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(9)}) == 9
    assert [slug for slug, _ in asked("scenes", TRIO)] == [slug for slug in members(TRIO) for _ in range(10)]
    for wrong in ("tiger+fox", "tiger+tiger"):
        with pytest.raises(UserError):
            members(wrong)


def test_a_failed_lesson_has_the_worst_scores() -> None:
    assert {*SCORERS} == {*PROMPT_SETS} == {*NAMES}
    found = failed(tuple(PROMPT_SETS), several=True)
    assert {*found} == {*BETTER} and found["heldout_loss"] == math.inf and found["obeyed"] == 0


def test_every_companion_is_drawn_and_known() -> None:
    names, scenes = accompanied(3, 1)
    assert len(scenes) == len(SUBJECTS) * len(COMPANIONS)
    assert [companion_of(scene) for scene in scenes] == [*COMPANIONS] * len(SUBJECTS)
    assert all(scene.objects[0] == subject_object(name) for name, scene in zip(names, scenes, strict=True))


def test_probes_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORA_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "load_network", lambda: None)
    monkeypatch.setattr(
        probe, "features", lambda _, images: torch.from_numpy(images[:, 4::16, 4::16].reshape(len(images), -1)) / 255.0
    )
    sizes = Sizes(scenes=60, tested=10, alone=2, accompanied=1)
    first = Probes(sizes)["companion"]
    monkeypatch.setattr(probe, "fit", None)
    second = Probes(sizes)["companion"]
    assert isinstance(second, Fitted) and second.accuracy == pytest.approx(first.accuracy)
    assert second.probe.labels == first.probe.labels == tuple(sorted(COMPANIONS))
    assert torch.equal(second.probe.weight, first.probe.weight)
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert Probes(sizes).features([image]).shape == (1, 48)
