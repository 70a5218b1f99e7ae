"""What `accelerate launch` may set up: supported, or refused in words before anything is read or written."""

from __future__ import annotations

import pytest
from runs import Configure, flags

from nora_diffusion.errors import UserError
from nora_diffusion.training import main, train
from nora_diffusion.training.run.launch import build_accelerator

REFUSED = {
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", "true"),
    "DeepSpeed, 1": ("ACCELERATE_USE_DEEPSPEED", "1"),
    "FSDP": ("ACCELERATE_USE_FSDP", "True"),
    "Megatron-LM": ("ACCELERATE_USE_MEGATRON_LM", "yes"),
    "parallelism": ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    "torch.compile": ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    "torch.compile, unknown": ("ACCELERATE_DYNAMO_BACKEND", "foo"),
    "fp8": ("ACCELERATE_MIXED_PRECISION", "fp8"),
    "no precision": ("ACCELERATE_MIXED_PRECISION", "half"),
    "accumulation": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    "accumulation, no number": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "four"),
}
ACCEPTED = {
    "nothing": {},
    "all off": {
        "ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "0", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    },
    "empty": {"ACCELERATE_USE_DEEPSPEED": "", "ACCELERATE_USE_FSDP": ""},
    "the same accumulation": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_trainer_does_not_do_is_refused(
    name: str, value: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^accelerate is set up for .*{name}.*: (run|start|give)"):
        train(configure())
    assert main(flags(configure())) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: accelerate is set up for") and "Traceback" not in errors
    assert not configure().folder.exists()


@pytest.mark.parametrize("values", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_it_does_is_accepted(
    values: dict[str, str], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert build_accelerator(configure(gradient_accumulation_steps=2)).num_processes == 1
