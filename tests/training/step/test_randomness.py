"""Training restores the global generators and does not touch those of other devices."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runs import Configure

from nora_diffusion.training import train
from nora_diffusion.training.step.randomness import forked


def test_the_global_generator_is_restored_and_no_other_device_is_initialized(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = torch.random.fork_rng

    def fork_rng(devices: Any = None, *rest: Any, **named: Any) -> Any:
        asked.append(devices)  # None would be all devices
        return original(devices, *rest, **named)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    before = torch.get_rng_state()
    train(configure(max_train_steps=1))
    assert asked and all(devices == [] for devices in asked)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 0), ("mps", 0)])
def test_a_devices_own_generator_is_forked(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda *a, **k: (asked.append((a, k)), nullcontext())[1])
    with forked(torch.device(device)):
        pass
    assert asked == [(([index],), {"device_type": device.partition(":")[0]})]
