"""Crops, buckets and flips."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nora_diffusion.data.transforms import Transform, View, bucket_shapes, nearest_shape
from nora_diffusion.training.step.randomness import batch_indices, shuffled_indices

SQUARE = [(8, 8)]


def gradient(width: int, height: int) -> Image.Image:
    """Red increases to the right, green downward."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def boxes(transform: Transform, size: tuple[int, int], **more: object) -> list[tuple[float, ...]]:
    return [view.box for view in transform.views(size, np.random.default_rng(0), **more)]  # type: ignore[arg-type]


def test_crops_cover_the_long_side() -> None:
    found = boxes(Transform(SQUARE, "random", 4), (100, 40))
    assert len(found) == 4 and all(box[2] - box[0] == box[3] - box[1] == 40 for box in found)
    assert found[0][0] < 15 and found[-1][2] > 85
    assert boxes(Transform(SQUARE, "center", 4), (100, 40)) == [(30, 0, 70, 40)]
    assert boxes(Transform(SQUARE, "random", 4), (40, 40)) == [(0, 0, 40, 40)]


def test_subject_crops_contain_the_whole_subject() -> None:
    transform = Transform(SQUARE, "subject", 8)
    for start in range(0, 81, 10):
        for box in boxes(transform, (120, 40), subject=(start, 5, start + 30, 35)):
            assert box[0] <= start and box[2] >= start + 30 and box[0] >= 0 and box[2] <= 120
    assert len({box[0] for box in boxes(transform, (120, 40), subject=(50, 0, 60, 40))}) == 8
    # A subject longer than the window: centered on it. No mask: the center of the image.
    assert boxes(transform, (120, 40), subject=(20, 0, 90, 40)) == [(35, 0, 75, 40)]
    assert boxes(transform, (120, 40)) == [(40, 0, 80, 40)]
    assert boxes(transform, (40, 120), subject=(0, 100, 40, 110))[0][3] >= 110


def test_a_view_is_the_resized_box() -> None:
    image = gradient(64, 64)
    pixels = View((16, 16, 48, 48), (8, 8)).pixels(image)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32
    centers = 16 + 4 * (np.arange(8) + 0.5) - 0.5
    assert np.abs(pixels[0] - (centers / 63 * 2 - 1)[None, :]).max() < 0.02
    assert np.abs(pixels[1] - (centers / 63 * 2 - 1)[:, None]).max() < 0.02
    assert np.array_equal(View((16, 16, 48, 48), (8, 8), mirrored=True).pixels(image), pixels[:, :, ::-1])


def test_flips_double_the_views() -> None:
    views = Transform(SQUARE, "random", 3, flip=True).views((20, 10))
    assert [view.mirrored for view in views] == [False, True] * 3


@pytest.mark.parametrize(("side", "step"), [(512, 64), (1024, 64), (64, 16), (16, 4)])
def test_buckets_have_at_most_the_area_of_the_square(side: int, step: int) -> None:
    shapes = bucket_shapes(side, step)
    assert (side, side) in shapes and len(shapes) > 2 and len(set(shapes)) == len(shapes)
    for width, height in shapes:
        assert width % step == height % step == 0 and side * side * 0.7 < width * height <= side * side
        assert (height, width) in shapes and max(width, height) <= 2 * min(width, height)


def test_an_image_gets_the_nearest_bucket_and_loses_little() -> None:
    shapes = bucket_shapes(512, 64)
    assert nearest_shape((4000, 3000), shapes) == (576, 448)
    assert nearest_shape((3000, 4000), shapes) == (448, 576)
    assert nearest_shape((500, 510), shapes) == (512, 512)
    (view,) = Transform(shapes).views((4000, 3000))
    left, top, right, bottom = view.box
    assert (right - left) / (bottom - top) == pytest.approx(576 / 448)
    assert (right - left) * (bottom - top) > 0.95 * 4000 * 3000


def test_batches_stay_within_a_bucket_and_use_every_image_equally() -> None:
    groups = ["wide", "tall", "wide", "square", "wide", "tall", "wide"]
    epochs = 6
    drawn: Counter[int] = Counter()
    for number in range(epochs * len(groups)):
        rows = batch_indices(3, "photos", groups, number, 4)
        assert len(rows) == 4 and len({groups[row] for row in rows}) == 1
        assert rows == batch_indices(3, "photos", groups, number, 4)
        drawn.update(rows)
    assert set(drawn.values()) == {4 * epochs} and len(drawn) == len(groups)


def test_one_bucket_gives_the_same_order_as_no_buckets() -> None:
    for number in range(9):
        assert batch_indices(5, "photos", [0] * 5, number, 3) == shuffled_indices(5, "photos", 5, number * 3, 3)
