"""Scores: any CLIP in transformers' format, in fp32, without torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import tiny_clip, tiny_dino
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.scoring.judges import (
    Judge,
    image_features,
    load_judge,
    load_vision,
    prompt_score,
    subject_score,
    text_features,
)

PIXELS = {"red": (1.0, -1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "green": (-1.0, 1 / 255, -1.0)}
COLORS = tuple(PIXELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("judge") / "clip")


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return load_judge(folder)


def images(side: int = 24) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), color) for color in COLORS]


def test_features_have_length_one_in_fp32(judge: Judge) -> None:
    for features in (image_features(judge, images()), text_features(judge, COLORS)):
        assert features.shape == (3, 8) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_scores_are_mean_cosines(judge: Judge) -> None:
    image, text = image_features(judge, images()), text_features(judge, COLORS)
    expected = sum(float(a @ b) for a in image[:2] for b in image) / 6
    assert subject_score(judge, images()[:2], images()) == pytest.approx(expected, abs=1e-6)
    assert prompt_score(judge, images(), COLORS) == pytest.approx(float((image * text).sum()) / 3, abs=1e-6)
    assert subject_score(judge, images()[:1], images()[:1]) == pytest.approx(1, abs=1e-6)


def test_preprocessing_is_that_of_the_judge(judge: Judge) -> None:
    """On an image of one color: pixels are (value - mean) / std, at any size and shape."""
    pixel = judge.model.vision_model.embeddings.patch_embedding.weight.sum((2, 3)) @ torch.tensor([2.0, -2.0, -2.0])
    seen: list[torch.Tensor] = []
    hook = judge.model.vision_model.embeddings.patch_embedding.register_forward_hook(lambda *a: seen.append(a[2]))
    image_features(judge, [Image.new("RGB", (50, 30), "red")])
    hook.remove()
    torch.testing.assert_close(seen[0][0], pixel.view(-1, 1, 1).expand_as(seen[0][0]), atol=1e-4, rtol=1e-4)


def test_loading_anything_else_as_a_judge_fails(tmp_path: Path, tiny_base: Path) -> None:
    for folder in (tmp_path, tiny_base):
        with pytest.raises(UserError, match="cannot load the judge"):
            load_judge(folder)


def test_the_shipped_judge_distinguishes_subjects() -> None:
    """Held-out images of a subject are closer to it than images of another subject, on average over four."""
    from nora_diffusion.demo import open_example

    judge = load_judge()
    examples = [open_example(slug) for slug in ("cyclops-purple", "panda", "tractor", "tiger")]
    training = [e.images() for e in examples]
    heldout = [e.heldout_images() for e in examples]
    scores = torch.tensor([[subject_score(judge, a, b) for b in heldout] for a in training])
    same, other = scores.diagonal().mean(), (scores.sum() - scores.trace()) / 12
    assert same > other + 0.05, scores


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dino(tmp_path_factory.mktemp("vision") / "dino")


def test_a_vision_model_judges_by_its_class_token(vision: Path) -> None:
    judge = load_vision(vision)
    features = image_features(judge, images())
    pixels = torch.stack([torch.tensor(rgb).view(3, 1, 1).expand(3, 28, 28) for rgb in PIXELS.values()])
    with torch.no_grad():
        token = judge.model(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, torch.nn.functional.normalize(token, dim=-1), atol=1e-4, rtol=1e-4)
    assert subject_score(judge, images()[:1], images()[:1]) == pytest.approx(1, abs=1e-6)


def test_loading_anything_else_as_a_vision_model_fails(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a CLIP with --judge"):
        load_vision(folder)
    with pytest.raises(UserError, match="cannot load the vision model"):
        load_vision(tmp_path)
