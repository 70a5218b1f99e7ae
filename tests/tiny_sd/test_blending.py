"""Two subjects in one image: what is read, the rivals of the default, and the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from factories import randomize

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    nora,
    open_pipeline,
    save_adapter,
)
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.tiny_sd.blending import gates
from nora_diffusion.tiny_sd.blending.guidance import guided
from nora_diffusion.tiny_sd.blending.modes import disjoint
from nora_diffusion.tiny_sd.blending.pairs import KINDS, TRIGGERS, halves, parse_pair, prompts, true_scenes
from nora_diffusion.tiny_sd.blending.studio import Studio
from nora_diffusion.tiny_sd.blending.tables import difference, report
from nora_diffusion.tiny_sd.examples import TRAINING_KINDS
from nora_diffusion.tiny_sd.world.vocabulary import SUBJECTS
from nora_diffusion.training.gates.learn import learn_gates

WORDS = {"dog": "sks dog", "cat": "toy cat"}
PAIR = ("tiger", "tractor")


@pytest.fixture
def pair(tiny_base: Path) -> Any:
    """A pipeline with two adapters on one basis."""
    pipe: Any = open_pipeline(tiny_base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for seed, name in enumerate(WORDS):
        add_adapter(pipe, nora(r=8, inner_r=4, basis="svd"), name)
        randomize(pipe, name, seed)
    return pipe


def cores(pipe: Any) -> list[torch.Tensor]:
    found: list[Any] = [
        layer.nora_delta[name].core for name in WORDS for layer in nora_layers(pipe.unet, name).values()
    ]
    return [(core.B_in @ core.A_in).detach().clone() for core in found]


def test_disjoint_cores_are_orthogonal_and_restored(pair: Any) -> None:
    before = cores(pair)
    with disjoint(pair, WORDS, PAIR):
        inside = cores(pair)
        for one, two in zip(inside[: len(inside) // 2], inside[len(inside) // 2 :], strict=True):
            assert max(float((one @ two.T).abs().max()), float((one.T @ two).abs().max())) < 1e-5
            assert float(one.norm()) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, cores(pair), strict=True))


def draw(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: torch.Tensor = pipe(
            "a sks dog on the toy cat", num_inference_steps=6, generator=generator, output_type="latent"
        ).images
    return found


def test_gates_are_learned_once_and_the_adapters_stay(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WORDS:
        save_adapter(pair, tmp_path / "adapters" / name, name)
        delete_adapter(pair, name)
        load_adapter(pair, tmp_path / "adapters" / name, name)
    monkeypatch.setattr(gates, "learn_gates", lambda config: learn_gates(replace(config, steps=2)))
    plain = draw(pair)
    drawn = []
    for _ in range(2):
        with gates.gated(pair, WORDS, PAIR, true_images=True):
            assert list_adapters(pair)["unet"] == [*WORDS, gates.NAME]
            drawn.append(draw(pair))
        assert torch.equal(draw(pair), plain)
    assert torch.equal(*drawn) and not torch.allclose(drawn[0], plain, atol=1e-3)
    assert len(list((tmp_path / "true" / "+".join(PAIR)).glob("*.png"))) == len(TRAINING_KINDS) * len(gates.JITTERS)


def test_guided_latents_move_and_the_scheduler_is_restored(pair: Any) -> None:
    plain = draw(pair)
    with guided(pair, WORDS):
        assert not torch.allclose(draw(pair), plain, atol=1e-4)
    assert torch.equal(draw(pair), plain)
    assert "step" not in vars(pair.scheduler)


def test_true_scenes_show_both_subjects_where_the_halves_are_read() -> None:
    images, captions = true_scenes(PAIR, KINDS, (0, 1))
    assert captions[::2] == prompts(PAIR)
    assert captions[0] == f"a {TRIGGERS['tiger']} cat next to a {TRIGGERS['tractor']} truck in the snow"
    swapped, _ = true_scenes(PAIR[::-1], KINDS, (0, 1))
    for (left, right), (other_left, other_right) in zip(
        *(zip(*halves(np.stack([np.asarray(i) for i in some])), strict=True) for some in (images, swapped)),
        strict=True,
    ):
        assert np.abs(left.astype(int) - other_left).mean() > 5
        assert np.abs(right.astype(int) - other_right).mean() > 5


def test_pairs_are_checked() -> None:
    assert parse_pair("tiger+castle") == ("tiger", "castle")
    assert set(TRIGGERS) <= set(SUBJECTS)
    assert len(set(TRIGGERS.values())) == len(TRIGGERS)
    for text in ("tiger", "tiger+tiger", "tiger+unicorn", "+"):
        with pytest.raises(UserError, match="is not a pair"):
            parse_pair(text)


def rows_of(images: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    return [
        {"mode": mode, "pair": pair, "seconds": 1.0, "scores": {"both right": values, "own": [0.5] * 8}}
        for (mode, pair), values in images.items()
    ]


RIGHT = {
    ("plain", "a+b"): [0.0] * 8, ("plain", "c+d"): [1.0, 0.0] * 4,
    ("apart", "a+b"): [1.0, 0.0] * 4, ("apart", "c+d"): [1.0] * 8,
}  # fmt: skip
"""Two images of each background."""


def test_report_has_a_row_for_each_mode() -> None:
    text = report(rows_of(RIGHT), 0.99)
    assert "| plain | 0.250 | 0.500 | 1.00 |" in text
    assert "| apart | 0.750 | 0.500 | 1.00 |" in text
    assert "| apart | +0.500 [+0.500, +0.500] | +0.000 [+0.000, +0.000] |" in text  # the same in both pairs
    by_pair = ["| mode | a+b | c+d |", "| --- | --- | --- |", "| plain | 0.000 | 0.500 |", "| apart | 0.500 | 1.000 |"]
    assert text.splitlines()[-4:] == by_pair
    assert "Minus" not in report(rows_of({key: v for key, v in RIGHT.items() if key[0] == "apart"}), 0.99)


def test_intervals_draw_pairs_and_then_backgrounds() -> None:
    alike = [1.0, 0.0] * 4, [1.0, 1.0, 0.0, 0.0] * 2  # by background: 0.5 in each, or 1 and 0
    widths = []
    for values in alike:
        gap = difference(rows_of(RIGHT | {("apart", pair): values for pair in ("a+b", "c+d")}), "apart", "both right")
        assert gap is not None and gap.mean == pytest.approx(0.25)
        widths.append(gap.high - gap.low)
    assert widths[0] == pytest.approx(0.5)  # 0.5 in one pair, 0 in the other: only the pairs differ
    assert widths[1] > 0.6


def test_each_image_has_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the true scenes: what is read in them, and the cosine of each to the true halves."""
    studio: Any = Studio.__new__(Studio)
    images, _ = true_scenes(PAIR, KINDS, (0, 1))
    studio.reader = SimpleNamespace(read=lambda images: [PAIR] * 7 + [PAIR[::-1]])
    studio.judge = None
    means: Any = [[np.asarray(image).mean((0, 1)) for image in half] for half in halves(np.stack(images))]
    monkeypatch.setattr(
        "nora_diffusion.tiny_sd.blending.studio.image_features",
        lambda _, images: torch.tensor(np.stack([np.asarray(image).mean((0, 1)) for image in images])),
    )
    scores = studio.score(PAIR, images, (0, 1))
    assert scores["both right"] == [1.0] * 7 + [0.0] and scores["blended"] == scores["lost"] == [0.0] * 7 + [1.0]
    left, right = (np.stack(half) for half in means)
    own = ((left @ left.T).mean(1) + (right @ right.T).mean(1)) / 2
    other = ((left @ right.T).mean(1) + (right @ left.T).mean(1)) / 2
    assert scores["own"] == pytest.approx(own, rel=1e-4) and scores["other"] == pytest.approx(other, rel=1e-4)
