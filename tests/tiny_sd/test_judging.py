"""The measurements of the base: the subject loss, the linear probes, and unseen captions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nora_diffusion.tiny_sd.examples import subject_object, write_subject
from nora_diffusion.tiny_sd.measures import probe
from nora_diffusion.tiny_sd.measures.following import QUESTIONS, unseen_scenes
from nora_diffusion.tiny_sd.measures.prompt_sets import new_scenes
from nora_diffusion.tiny_sd.measures.teaching import TAUGHT_SUBJECTS
from nora_diffusion.tiny_sd.recipe.stage_clip import subject_loss
from nora_diffusion.tiny_sd.recipe.stage_diffusion import TRAINING_FILE, record_scenes
from nora_diffusion.tiny_sd.world.scenes import Background, Scene, SceneObject, random_scene, scene_pair


def test_a_pair_of_scenes_shares_the_object_and_nothing_else() -> None:
    pairs = [scene_pair(3, i) for i in range(200)]
    assert all(a.objects[0] == b.objects[0] for a, b in pairs)
    assert sum(a.background == b.background for a, b in pairs) < 20
    assert sum(a.objects[0].color is not None for a, _ in pairs) > 80


def test_the_subject_loss_is_the_formula() -> None:
    features = F.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    objects = [SceneObject(name) for name in ("fox", "dog", "fox", "dog", "fox")]
    t, total = 0.3, 0.0
    for i in range(5):
        others = [k for k in range(5) if k != i]
        denominator = sum(math.exp(float(features[i] @ features[k]) / t) for k in others)
        positives = [j for j in others if objects[j] == objects[i]]
        total -= sum(float(features[i] @ features[j]) / t - math.log(denominator) for j in positives) / len(positives)
    assert math.isclose(float(subject_loss(features, objects, t)), total / 5, rel_tol=1e-5)


def test_a_probe_learns_a_linear_label_and_nothing_from_noise() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=g)
    truth = ["left" if v < 0 else "right" for v in x[:, 3].tolist()]
    fit = probe.fit(x[:300], truth[:300])
    assert fit.accuracy(x[300:], truth[300:]) > 0.9
    noise = probe.fit(x[:300, 4:], truth[:300])
    assert noise.accuracy(x[300:, 4:], truth[300:]) < 0.65


def test_random_blur_is_reproducible() -> None:
    edge = np.zeros((20, 16, 16, 3), np.uint8)
    edge[:, :, 8:] = 255
    soft = probe.soften(edge, seed=1)
    assert np.array_equal(soft, probe.soften(edge, seed=1)) and not np.array_equal(soft, probe.soften(edge, seed=2))
    steepest = np.abs(np.diff(soft[:, 8, :, 0].astype(int), axis=1)).max(1)
    assert steepest.min() < 90 < 200 < steepest.max()  # from clearly blurred to almost sharp


def test_unseen_captions_are_not_training_captions(tmp_path: Path) -> None:
    record_scenes(tmp_path / TRAINING_FILE, None, 900_003, 40)
    own = {random_scene(900_003, i).caption for i in range(40)}
    scenes = unseen_scenes(tmp_path, 30)
    captions = [scene.caption for scene in scenes]
    assert len(set(captions)) == 30 and not own & set(captions)


def test_the_scenes_of_the_initial_weights_stay_recorded(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    record_scenes(first / TRAINING_FILE, None, 0, 100)
    record_scenes(second / TRAINING_FILE, first / "pipeline", 1, 50)
    assert json.loads((second / TRAINING_FILE).read_text())["scenes"] == [[0, 100], [1, 50]]


def test_the_true_answers_describe_the_scene() -> None:
    fox, ball = SceneObject("fox"), SceneObject("basketball")
    plain = Scene((fox,), Background("solid", "red"), "", 0)
    two = Scene((fox, ball), Background("striped", "red", "blue"), "", 0)
    crowned = Scene((fox,), Background("snow"), "", 0, accessory="crown")
    answers = [[answer(scene) for answer in QUESTIONS.values()] for scene in (plain, two, crowned)]
    word = fox.class_word
    assert answers == [[word, "solid red", "none"], [word, "striped", "another object"], [word, "snow", "crown"]]


@pytest.mark.parametrize("slug", TAUGHT_SUBJECTS)
def test_the_new_scenes_of_a_subject_are_not_in_its_training_images(slug: str, tmp_path: Path) -> None:
    write_subject(slug, tmp_path)
    trained = {path.read_text().strip() for path in tmp_path.glob("*.txt")}
    scenes = new_scenes(slug)
    assert len({scene.caption for scene in scenes}) == 10
    assert not trained & {scene.caption for scene in scenes}
    assert all(scene.objects == (subject_object(slug),) for scene in scenes)
