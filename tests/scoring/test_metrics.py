"""Scores against their formulas, intervals against the normal approximation, escaping in reports."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion.reports import webpage
from nora_diffusion.scoring.metrics import agreement, diversity, interval, likeness, resampled


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_likeness_and_agreement_are_cosines() -> None:
    ours, theirs = unit([1.0, 0.0], [1.0, 1.0]), unit([1.0, 0.0], [0.0, 1.0])
    assert likeness(ours, theirs) == pytest.approx([0.5, math.sqrt(0.5)])
    assert agreement(ours, theirs) == pytest.approx([1.0, math.sqrt(0.5)])


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    three = unit([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    assert diversity(three) == pytest.approx(1 - (0 + 2 * math.sqrt(0.5)) / 3)
    assert diversity(three[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(diversity(three[:1]))


def test_an_interval_of_independent_rows_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    low, high = interval(values, resampled({"one": range(400)}))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_subjects_that_differ_widen_the_interval() -> None:
    """Ten equal rows of a subject are one observation, not ten."""
    groups = {str(s): range(10 * s, 10 * s + 10) for s in range(4)}
    values = [float(s) for s in range(4) for _ in range(10)]
    by_subject = interval(values, resampled(groups))
    by_row = interval(values, resampled({"all": range(40)}))
    assert by_subject[1] - by_subject[0] > 2 * (by_row[1] - by_row[0])
    assert interval(values, resampled(groups)) == by_subject  # deterministic


def test_a_page_is_self_contained_and_escapes_text() -> None:
    evil = '"><script>alert(1)</script>'
    picture = webpage.image_tag(Image.new("RGB", (300, 200), "red"), evil)
    parts = [webpage.heading(evil), webpage.paragraph(evil), webpage.table([evil, evil], [[evil, picture]], evil, 0)]
    text = webpage.page(evil, parts)
    found: list[tuple[str, dict[str, str | None]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))  # type: ignore[method-assign]
    reader.feed(text)
    tags = [tag for tag, _ in found]
    assert "script" not in tags and tags.count("img") == 1 and tags.count("tr") == 2
    assert dict(found)["img"]["src"].startswith("data:image/jpeg;base64,")  # type: ignore[union-attr]
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
