"""A base whose files have wrong values is refused in a sentence, whatever its libraries raise about it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import UserError, open_pipeline
from nora_diffusion.pipelines import base
from nora_diffusion.pipelines.base import BaseSource

Values = dict[str, Any]
WRONG: dict[str, tuple[str, Callable[[Values], Any]]] = {
    "a number as the class": ("model_index.json", lambda v: {**v, "_class_name": 5}),
    "an unknown class": ("model_index.json", lambda v: {**v, "_class_name": "Nope"}),
    "another pipeline": ("model_index.json", lambda v: {**v, "_class_name": "DDPMPipeline"}),
    "no class": ("model_index.json", lambda v: {k: x for k, x in v.items() if k != "_class_name"}),
    "a component of numbers": ("model_index.json", lambda v: {**v, "unet": [5, 5]}),
    "a component that is a number": ("model_index.json", lambda v: {**v, "unet": 5}),
    "a component of another class": ("model_index.json", lambda v: {**v, "vae": ["diffusers", "UNet2DConditionModel"]}),
    "text as a number": ("unet/config.json", lambda v: {**v, "in_channels": "4"}),
    "a list as a config": ("text_encoder/config.json", lambda v: []),
    "text as a size": ("text_encoder/config.json", lambda v: {**v, "hidden_size": "x"}),
    "another size than the weights": ("text_encoder/config.json", lambda v: {**v, "vocab_size": 3}),
    "no blocks": ("vae/config.json", lambda v: {**v, "block_out_channels": []}),
    "an unknown schedule": ("scheduler/scheduler_config.json", lambda v: {**v, "beta_schedule": "x"}),
    "text as a count": ("scheduler/scheduler_config.json", lambda v: {**v, "num_train_timesteps": "a"}),
    "a number as the prediction": ("scheduler/scheduler_config.json", lambda v: {**v, "prediction_type": 5}),
    "text as a factor": ("vae/config.json", lambda v: {**v, "scaling_factor": "x"}),
    "no factor": ("vae/config.json", lambda v: {**v, "scaling_factor": 0}),
    "text as a length": ("tokenizer/tokenizer_config.json", lambda v: {**v, "model_max_length": "long"}),
    "a negative count": ("scheduler/scheduler_config.json", lambda v: {**v, "num_train_timesteps": -1}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_of_a_base_are_a_sentence(name: str, tiny_base: Path, tmp_path: Path) -> None:
    file, change = WRONG[name]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    values = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(change(values)))
    with pytest.raises(UserError) as error:
        open_pipeline(base, device="cpu")
    text = str(error.value)
    assert text.startswith("cannot load the pipeline") and str(base) in text and "\n" not in text
    assert text.endswith("give a diffusers folder with safetensors weights or a hub id that this machine can reach")


def test_out_of_memory_is_not_the_fault_of_the_base(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", full)
    with pytest.raises(MemoryError):
        open_pipeline(tiny_base)


def test_a_base_is_opened_in_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of OpenMP that stay behind in this thread make torch slower in every other one."""
    threads = []
    monkeypatch.setattr(base, "open_pipeline", lambda *_: threads.append(threading.current_thread()))
    BaseSource(device="cpu").open()
    assert threads[0] is not threading.current_thread() and not threads[0].is_alive()
    monkeypatch.undo()
    with pytest.raises(UserError, match="nowhere"):
        BaseSource("/nowhere", device="cpu").open()
