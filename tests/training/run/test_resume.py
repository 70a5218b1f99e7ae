"""Kill and resume: bit for bit the run that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, assert_same_run, flags, interrupt_after, journal

from nora_diffusion import inspect_adapter
from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, main, train
from nora_diffusion.training.planning.checkpoints import read_checkpoint
from nora_diffusion.training.planning.rundir import RunFolder
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.signals import Interrupted

SCRIPT = Path(__file__).parents[3] / "train_dreambooth_nora.py"
HARD = {
    "accumulation": {"gradient_accumulation_steps": 2, "dropout": 0.3},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "snr_gamma": 5.0},
    "text encoder": {"train_text_encoder": True, "text_encoder_lr": 5e-3, "dropout": 0.1},
    "new tokens": {
        "train_text_encoder_ti": True, "token_abstraction": ["<pet>, <place>"], "ema_decay": 0.9,
        "instance_prompt": "a <pet> dog on <place>", "token_lr": 0.05,
    },
    "router": {"method": "mor", "inner_rank": None, "basis": None, "num_experts": 2},
    "block gates": {"method": "milora", "inner_rank": None, "basis": None, "top_k": 3, "balance_loss_weight": 0.5},
    "rank mask": {"method": "dylora", "inner_rank": None, "basis": None},
    "magnitude": {"magnitude": True, "core": "dense", "inner_rank": None},
    "measured ranks": {"rank_allocation": "gradient", "target_modules": ["attn", "conv"]},
    "moved ranks": {
        "rank_allocation": "adalora", "method": "lora", "inner_rank": None, "basis": None, "dropout": 0.2,
        "gradient_accumulation_steps": 2,
    },
    "layers on and off": {"rank_allocation": "heterolora", "train_text_encoder": True, "text_encoder_lr": 5e-3},
    "wordings": {"shuffle_tags": 3, "caption_dropout": 0.3, "instance_prompt": "sks dog, red, toy, hat"},
    "prior": {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2},
    "chain": {"strategy": "chain", "chain_links": 2, "inner_rank": 1},
    "paths between blocks": {"strategy": "reslora", "shortcut": "middle", "gradient_accumulation_steps": 2},
    "noise": {"strategy": "flat", "train_text_encoder": True},
    "noise and norms": {"strategy": "halora", "gradient_accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("variation", HARD.values(), ids=HARD.keys())
def test_interrupted_and_resumed_is_the_same_run(
    variation: dict[str, Any], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(configure(output_dir=str(tmp_path / "whole"), **variation)).adapter_path.parent
    torch.manual_seed(123)  # whatever state the process is in
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        with pytest.raises(Interrupted) as stop:
            train(configure(output_dir=str(tmp_path / "parts"), **variation))
    assert (stop.value.exit_code, stop.value.step) == (143, 1)
    torch.randn(5)
    parts = train(configure(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest", **variation))
    assert_same_run(whole, parts.adapter_path.parent, last=3)


def test_resume_at_every_step(configure: Configure, tmp_path: Path) -> None:
    whole = train(configure(checkpointing_steps=1, max_train_steps=4)).adapter_path.parent
    kept = shutil.copytree(whole, tmp_path / "kept")
    for step in (1, 2, 3):
        train(
            configure(
                checkpointing_steps=1, max_train_steps=4, resume_from_checkpoint=str(whole / f"checkpoints/step-{step}")
            )
        )
        assert_same_run(whole, kept, last=4)


def test_killed_process_resumes(configure: Configure, tmp_path: Path) -> None:
    """SIGKILL at any moment after the first checkpoint: what is on disk is whole and enough."""
    slow = {"checkpointing_steps": 1, "max_train_steps": 30, "checkpoints_total_limit": 2}
    config = configure(output_dir=str(tmp_path / "killed"), **slow)
    child = run_script(config)
    wait_for(lambda: any(config.folder.glob("checkpoints/step-*")), lambda: child.poll() is None)
    child.kill()
    child.communicate()
    (config.folder / "checkpoints/.tmp-step-9").mkdir()
    resumed = train(configure(output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest", **slow))
    whole = train(configure(output_dir=str(tmp_path / "whole"), **slow))
    assert_same_run(whole.adapter_path.parent, resumed.adapter_path.parent, last=30)
    assert sorted(p.name for p in (config.folder / "checkpoints").iterdir()) == ["step-29", "step-30"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(number: int, code: int, configure: Configure, tmp_path: Path) -> None:
    config = configure(max_train_steps=100_000)
    child = multiprocessing.get_context("fork").Process(target=command, args=(flags(config), tmp_path / "errors"))
    child.start()
    wait_for(lambda: (config.folder / "log.jsonl").exists() and bool(journal(config.folder)), child.is_alive)
    os.kill(child.pid or 0, number)
    child.join(600)
    assert child.exitcode == code
    errors = (tmp_path / "errors").read_text()
    assert "--resume_from_checkpoint latest" in errors and "Traceback" not in errors
    state = json.loads((config.folder / "state.json").read_text())
    assert state["status"] == "interrupted"
    assert (config.folder / f"checkpoints/step-{state['step']}/manifest.json").exists()


def test_a_changed_run_is_refused_with_the_difference(configure: Configure, tiny_v_base: Path) -> None:
    train(configure())
    for change, word in (
        ({"learning_rate": 0.5, "max_train_steps": 4}, "learning_rate: 0.01 -> 0.5"),
        ({"instance_prompt": "a photo of xyz dog"}, "photos and captions"),
        ({"pretrained_model_name_or_path": str(tiny_v_base)}, "base"),
    ):
        with pytest.raises(UserError, match=word):
            train(configure(resume_from_checkpoint="latest", **change))


def test_a_damaged_checkpoint_is_detected(configure: Configure) -> None:
    folder = train(configure()).adapter_path.parent
    file = folder / "checkpoints/step-3/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged \(optimizer.safetensors"):
        train(configure(resume_from_checkpoint="latest", max_train_steps=5))
    with pytest.raises(UserError, match="the checkpoints of this run: step-3"):
        train(configure(resume_from_checkpoint="step-77"))


def test_a_finished_run_is_not_trained_again_but_may_be_prolonged(configure: Configure, tmp_path: Path) -> None:
    first = train(configure())
    kept = shutil.copytree(first.adapter_path.parent, tmp_path / "kept")
    again = train(configure(resume_from_checkpoint="latest"))
    assert_same_run(again.adapter_path.parent, kept, last=3)
    longer = train(configure(resume_from_checkpoint="latest", max_train_steps=5))
    assert len(journal(longer.adapter_path.parent)) == 5


def test_an_earlier_run_is_not_overwritten_unasked(configure: Configure) -> None:
    first = train(configure())
    content = first.adapter_path.read_bytes()
    with pytest.raises(UserError, match="holds an earlier run"):
        train(configure(seed=8))
    assert first.adapter_path.read_bytes() == content
    assert train(configure(seed=8, overwrite_output_dir=True)).adapter_path.read_bytes() != content


def run_script(config: TrainConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def command(words: list[str], errors: Path) -> None:
    """The command in a forked process, which has imported everything; ``errors`` gets what it prints."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    with errors.open("w") as sys.stderr:
        sys.exit(main(words))


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert alive(), "the child has ended"
        assert time.monotonic() < end, "the child did not get there"
        time.sleep(0.02)


def changed_digit(text: str) -> str:
    return text.replace('"last_epoch": 3', '"last_epoch": 2')


def changed_identity(text: str) -> str:
    return text.replace('"learning_rate": 0.01', '"learning_rate": 0.02')


MANIFESTS: dict[str, tuple[Any, str]] = {
    "a digit of the schedule": (changed_digit, r"damaged \(manifest.json was changed\)"),
    "a digit of the settings": (changed_identity, r"damaged \(manifest.json was changed\)"),
    "a digit of a hash": (lambda t: t.replace('_sha256": "', '_sha256": "0'), r"damaged \(manifest.json was changed\)"),
    "another version": (lambda t: t.replace('"format_version": 2', '"format_version": 1'), "manifest.json was changed"),
    "no hash": (lambda t: t.replace("manifest_sha256", "manifest_sha255"), "manifest.json was changed"),
    "the step": (lambda t: t.replace('"step": 3', '"step": 2'), "manifest.json was changed"),
    "not text": (lambda t: b"\xff" + t.encode(), "its manifest cannot be read"),
    "no object": (lambda t: "[1]", "its manifest cannot be read"),
    "too deep": (lambda t: "[" * 100_000, "its manifest cannot be read"),
    "infinite": (lambda t: t.replace('"step": 3', '"step": 1e999'), "its manifest cannot be read"),
    "cut": (lambda t: t[: len(t) // 2], "its manifest cannot be read"),
    "empty": (lambda t: "", "its manifest cannot be read"),
}


def test_a_changed_manifest_is_detected(configure: Configure) -> None:
    folder = train(configure(lr_scheduler="constant_with_warmup")).adapter_path.parent
    file = folder / "checkpoints/step-3/manifest.json"
    text = file.read_text()
    for name, (change, words) in MANIFESTS.items():
        changed = change(text)
        assert changed != text, name
        file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        with pytest.raises(UserError, match=words):
            read_checkpoint(file.parent)
    file.write_text(json.dumps(json.loads(text), sort_keys=True))  # the same values
    assert read_checkpoint(file.parent).step == 3


def test_a_checkpoint_in_the_folder_of_another_step_is_detected(configure: Configure, tmp_path: Path) -> None:
    folder = train(configure(checkpointing_steps=1)).adapter_path.parent / "checkpoints"
    shutil.rmtree(folder / "step-3")
    shutil.copytree(folder / "step-2", folder / "step-9")
    with pytest.raises(UserError, match=r"step-9 is not that of its folder's name \(manifest.json has step 2\)"):
        read_checkpoint(folder / "step-9")
    assert read_checkpoint(Path(shutil.copytree(folder / "step-2", tmp_path / "a copy"))).step == 2
    resumed = train(configure(checkpointing_steps=1, resume_from_checkpoint="latest"))  # from step 2
    assert [row[0] for row in journal(resumed.adapter_path.parent)] == [1, 2, 3]


LINES = [
    b"\xff", b'{"step": 2, "loss": "\xe9", "seconds": 1}', b'{"step": 2, "lo\xffss": 1}', b"\x00", b"[1]", b"7",
    b"null", b"\x85",
    b'{"step": "2"}', b'{"step": 2.5}', b'{"step": null}', b'{"step": true}', b'{"step": 1e999}', b'{"loss": 1}',
    b'{"step": 2, "loss": NaN, "seconds": 0}', b"[" * 100_000, b'{"step": 2, "loss": 0.5, "seco', b"\xe2\x80\xa8",
]  # fmt: skip


def test_a_log_with_any_bytes_is_resumed(configure: Configure, tmp_path: Path) -> None:
    """Lines that are no steps are dropped; the others stay."""
    whole = train(configure(output_dir=str(tmp_path / "whole"), max_train_steps=4, lr_scheduler="constant"))
    folder = train(configure(checkpointing_steps=1)).adapter_path.parent
    lines = (folder / "log.jsonl").read_bytes().splitlines()
    (folder / "log.jsonl").write_bytes(b"\n".join([*LINES, lines[0], *LINES, *lines[1:], *LINES]))
    resumed = train(configure(max_train_steps=4, resume_from_checkpoint="latest"))
    assert journal(folder) == journal(whole.adapter_path.parent)
    assert resumed.final_loss == whole.final_loss


def test_odd_numbers_of_a_log_are_no_steps(tmp_path: Path) -> None:
    rows = [{"loss": loss, "seconds": 1} for loss in (1e999, 10**400, "1", None, True, [])]
    rows += [{"loss": 1, "seconds": seconds} for seconds in (1e999, "inf", -(10**400), {})]
    rows.append({"loss": 0.5, "seconds": 2})
    lines = (json.dumps({"step": number, **row}) for number, row in enumerate(rows))
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert RunFolder(tmp_path).steps() == [(len(rows) - 1, 0.5, 2.0)]


def test_a_lowered_number_of_steps_names_the_step_of_the_adapter(configure: Configure) -> None:
    folder = train(configure()).adapter_path.parent
    assert train(configure(max_train_steps=2, resume_from_checkpoint="latest")).steps == 3
    assert inspect_adapter(folder).step == 3


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced by a file"])
def test_a_folder_that_goes_away_while_training(
    how: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, original = configure(max_train_steps=6, checkpointing_steps=4), Updates._update

    def update(self: Updates, step: int) -> Any:
        if step == 1:
            if how == "renamed":
                config.folder.rename(config.folder.with_name("elsewhere"))
            else:
                shutil.rmtree(config.folder)
            if how == "replaced by a file":
                config.folder.write_text("")
        return original(self, step)

    monkeypatch.setattr(Updates, "_update", update)
    with pytest.raises(UserError, match="run was removed or renamed during the run: start it again in another"):
        train(config)
