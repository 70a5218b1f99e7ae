"""The command lines of diffusers' README for ``train_dreambooth_lora.py``, with only the script's name changed.

Values are unchanged except for paths, the resolution, and the number of steps, checkpoints and images.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nora_diffusion import inspect_adapter
from nora_diffusion.training import main

PLAIN = """--pretrained_model_name_or_path={base} --instance_data_dir={photos} --output_dir={out}
  --instance_prompt="a photo of sks dog" --resolution=16 --train_batch_size=1 --gradient_accumulation_steps=1
  --checkpointing_steps=1 --learning_rate=1e-4 --report_to=none --lr_scheduler="constant" --lr_warmup_steps=0
  --max_train_steps={steps} --seed="0" """
PRIOR = """ --with_prior_preservation --prior_loss_weight=1.0 --class_data_dir={classes} --class_prompt="a photo of dog"
  --num_class_images=2 --sample_steps=1"""
TEXT = " --train_text_encoder"
RESUMED = " --resume_from_checkpoint=latest"


@pytest.mark.parametrize("extra", ["", PRIOR, TEXT], ids=["plain", "prior preservation", "text encoder"])
def test_the_readme_runs_and_resumes(extra: str, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    def run(more: str, steps: int) -> None:
        paths = {"base": tiny_base, "photos": photos, "out": tmp_path / "out", "classes": tmp_path / "classes"}
        assert main(shlex.split((PLAIN + extra + more).format(**paths, steps=steps))) == 0

    run("", 1)
    run(RESUMED, 2)
    info = inspect_adapter(tmp_path / "out")
    assert (info.step, info.trigger, info.class_word) == (2, "sks", "dog")
    assert ("text_encoder" in info.components) == (extra == TEXT)
