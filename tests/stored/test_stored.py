"""What earlier releases wrote is read, and computes what it computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stored.make import CONFIGS, EXPECTED, HERE, TOKENS, answers, stored_base

from nora_diffusion import inspect_adapter, load_adapter
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.training.planning.checkpoints import read_checkpoint, restore_optimizer

KNOWN = json.loads(EXPECTED.read_text())
PACK = HERE / "pack-1/two.nora_pack.safetensors"
ADAPTERS = {
    **{name: HERE / "adapter-1" / name for name in (*CONFIGS, "shared")},
    "tokens": HERE / "adapter-2/tokens",
    "checkpoint": HERE / "checkpoint-1",
}


@pytest.fixture(scope="module")
def base() -> Any:
    pipe = stored_base()
    assert answers(pipe) == pytest.approx(KNOWN["base"], abs=1e-4), "the base of these files is another one now"
    return pipe


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_it_computed(name: str, base: Any) -> None:
    pipe = stored_base()
    loaded = load_adapter(pipe, ADAPTERS[name], "one")
    prompt = TOKENS if name == "tokens" else "a dog"
    assert loaded.applied == loaded.total and loaded.base
    assert answers(pipe, prompt) == pytest.approx(KNOWN[name], abs=1e-3)
    if name != "tokens":  # whose prompt the base was not asked
        assert KNOWN[name] != pytest.approx(KNOWN["base"], abs=1e-2)


@pytest.mark.parametrize("name", ["nora", "shared"])
def test_a_pack_gives_its_subjects(name: str, base: Any) -> None:
    pipe = stored_base()
    assert load_adapter(pipe, f"{PACK}#{name}", "one").trigger == ("sks" if name == "nora" else "")
    assert answers(pipe) == pytest.approx(KNOWN[name], abs=1e-3)


def test_a_checkpoint_gives_its_optimizer_back(base: Any, tmp_path: Path) -> None:
    pipe, place = stored_base(), Path(shutil.copytree(HERE / "checkpoint-1", tmp_path / "step-2"))
    load_adapter(pipe, place, "one")
    parameters = trainable_parameters(pipe, "one")
    optimizer = torch.optim.AdamW(parameters.values())
    checkpoint = read_checkpoint(place)
    tensors = restore_optimizer(optimizer, parameters, checkpoint)
    assert checkpoint.step == 2 and checkpoint.identity["seed"] == 0
    assert all(optimizer.state[p]["step"] == 2 and optimizer.state[p]["exp_avg"].any() for p in parameters.values())
    assert len(tensors) > 2 * len(parameters), "the moving average is there, too"


def test_what_their_headers_say() -> None:
    nora, tokens = inspect_adapter(ADAPTERS["nora"]), inspect_adapter(ADAPTERS["tokens"])
    assert (nora.method, nora.ranks, nora.trigger, nora.step) == ("nora", "r = 4, r' = 2", "sks", 7)
    assert (nora.format_version, tokens.format_version, list(tokens.tokens)) == (1, 2, ["<word>"])
