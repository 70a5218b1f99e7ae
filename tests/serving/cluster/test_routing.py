"""Each subject has a home, which stays while other replicas come and go, and which is left when it is too busy."""

from __future__ import annotations

import math

import pytest

from nora_diffusion.errors import UserError
from nora_diffusion.serving.cluster.routing import BALANCE, FEW, ranked
from nora_diffusion.serving.cluster.scale import Scale, parse_scale

SUBJECTS = [f"/adapters/{number}.safetensors" for number in range(300)]
IDLE = dict.fromkeys(("one", "two", "three"), 0)


def test_subjects_are_spread_and_stay() -> None:
    homes = [ranked(subject, IDLE)[0] for subject in SUBJECTS]
    assert all(60 <= homes.count(name) <= 140 for name in IDLE)
    without = {name: 0 for name in IDLE if name != "two"}
    for subject, home in zip(SUBJECTS, homes, strict=True):
        order = ranked(subject, IDLE)
        assert set(order) == set(IDLE)
        assert ranked(subject, without) == [name for name in order if name != "two"]
        assert home != "two" or ranked(subject, without)[0] == order[1]


def test_a_popular_subject_is_shared_by_several_replicas() -> None:
    loads = dict(IDLE)
    for count in range(1, 100):
        loads[ranked(SUBJECTS[0], loads)[0]] += 1
        assert max(loads.values()) <= max(FEW, math.ceil(BALANCE * count / len(loads)))
    assert min(loads.values()) > 0


@pytest.mark.parametrize(("text", "scale"), [("2", Scale(2, 2)), ("1:4", Scale(1, 4))])
def test_scales(text: str, scale: Scale) -> None:
    assert parse_scale(text) == scale


@pytest.mark.parametrize("text", ["", "two", "1:", "0", "4:1", "1:2:3", "-1", "1:1001"])
def test_wrong_scales(text: str) -> None:
    if text == "1:":
        assert parse_scale(text) == Scale(1, 1)
        return
    with pytest.raises(UserError, match="--replicas"):
        parse_scale(text)
