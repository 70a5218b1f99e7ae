"""Two processes train what one does with twice the batch, and only the first one writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import write_photos
from PIL import Image
from runs import Configure, distance, flags, in_double, journal

from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.planning.opening import launched_precision
from nora_diffusion.training.run.batches import Batches
from nora_diffusion.training.run.launch import build_accelerator
from nora_diffusion.training.run.steps import Stepper

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 20
# In each process: fp64, and a stop with a trace where another process than the first one writes into the run.
SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from runs import in_double
from nora_diffusion.training import main

def watch(event, args):
    wrote = event in ("os.mkdir", "os.rename", "os.remove") or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
    if wrote and {out!r} in str(args[0]):
        print("process", os.environ["RANK"], "wrote", *args, file=sys.stderr)
        os._exit(9)

if os.environ.get("RANK", "0") != "0":
    sys.addaudithook(watch)
in_double(setattr)
sys.exit(main())
"""
KINDS: dict[str, dict[str, Any]] = {
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "timestep_sampling": "stratified", "ema_decay": 0.9},
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 1e-3, "scale_lr": True},
    "class pictures": {
        "with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3, "prior_loss_weight": 0.3,
    },
    "frozen prior, text encoder": {
        "with_prior_preservation": True, "class_prompt": "a dog", "prior_preservation": "frozen",
        "train_text_encoder": True, "text_encoder_lr": 5e-3,
    },
    "masks, shapes, wordings": {
        "instance_data_dir": "{shapes}", "background_loss_weight": 0.2, "aspect_buckets": True, "shuffle_tags": 3,
        "caption_dropout": 0.3, "instance_prompt": "sks dog, red, toy, hat", "noise_offset": 0.1,
    },
    "new tokens": {"train_text_encoder_ti": True, "instance_prompt": "a photo of <sks> dog", "token_lr": 1e-2},
    "measured ranks": {"rank_allocation": "gradient"},
    "moved ranks": {"rank_allocation": "adalora"},
    "ablated ranks": {"rank_allocation": "alora"},
    "ranks by inputs": {"rank_allocation": "prilora"},
    "rank mask": {"method": "dylora", "inner_rank": None, "basis": None},
}  # fmt: skip


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Photos of two shapes, one of them with a mask."""
    place = write_photos(tmp_path / "shapes", 2)
    write_photos(tmp_path / "wide", 2, size=(40, 20), seed=1)
    for path in (tmp_path / "wide").iterdir():
        path.rename(place / f"wide{path.name}")
    (place / "masks").mkdir()
    mask = np.zeros((20, 24), dtype=np.uint8)
    mask[4:12, 6:18] = 255
    Image.fromarray(mask).save(place / "masks" / "0.png")
    return place


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def forked(run: Callable[[int], Any], count: int = 2) -> list[int]:
    """``run(rank)`` in processes that see each other; their exit codes: 2 after a user's mistake."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)
                run(rank)
                code = 0
            except UserError as error:
                print(error, file=sys.stderr)
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def assert_same(one: Path, other: Path) -> None:
    """Losses, gradient norms, weights and moments of two runs, at 1e-8."""
    for mine, yours in zip(journal(one), journal(other), strict=True):
        assert mine == pytest.approx(yours, rel=1e-6)  # losses are added in fp32
    assert distance(one, other) <= 1e-8


@needs_fork
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_two_processes_are_one_with_twice_the_batch(
    kind: dict[str, Any], configure: Configure, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_double(monkeypatch.setattr)
    values = {key: str(shapes) if value == "{shapes}" else value for key, value in kind.items()}
    values["max_train_steps"] = 4
    one = train(configure(train_batch_size=4, output_dir=str(tmp_path / "one"), **values)).adapter_path.parent
    if kind.get("num_class_images"):
        values["class_data_dir"] = str(one / "class_images")
    config = configure(train_batch_size=2, **values)
    assert forked(lambda _: train(config)) == [0, 0]
    assert_same(config.folder, one)


@needs_fork
def test_the_others_wait_for_as_long_as_the_first_one_draws(configure: Configure, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        original: Any = torch.distributed.init_process_group

        def init(**given: Any) -> None:
            (tmp_path / str(rank)).write_text(str(given["timeout"]))
            original(**given)

        torch.distributed.init_process_group = init
        assert build_accelerator(configure()).num_processes == 2

    assert forked(run) == [0, 0]
    assert (tmp_path / "1").read_text() == "1 day, 0:00:00"


def test_the_launchers_no_is_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so where it was told nothing: then the hardware decides, as without it."""
    monkeypatch.setattr("nora_diffusion.training.planning.opening.best_precision", lambda device: "bf16")
    found = []
    for told in ("no", "fp8", "fp16", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        found.append(launched_precision(torch.device("cpu")))
    assert found == ["bf16", "bf16", "fp16", "bf16"]


@needs_fork
def test_dropout_draws_other_masks_in_each_process(configure: Configure, tmp_path: Path) -> None:
    def seen(rank: int) -> None:
        original = Batches.draw

        def draw(self: Batches, step: int, micro: int) -> Any:
            batch = original(self, step, micro)
            (tmp_path / f"{rank}-{step}").write_text(str(torch.initial_seed()))
            return batch

        Batches.draw = draw  # type: ignore[method-assign]
        train(configure(dropout=0.3))

    assert forked(seen) == [0, 0]
    seeds = [path.read_text() for path in tmp_path.glob("[01]-*")]
    assert len(seeds) == len(set(seeds)) == 6


@needs_fork
def test_two_processes_resume_bit_for_bit(configure: Configure, tmp_path: Path) -> None:
    whole = configure(output_dir=str(tmp_path / "whole"), dropout=0.2)
    assert forked(lambda _: train(whole)) == [0, 0]
    part = configure(dropout=0.2, max_train_steps=2)
    assert forked(lambda _: train(part)) == [0, 0]
    again = configure(dropout=0.2, resume_from_checkpoint="latest")
    assert forked(lambda _: train(again)) == [0, 0]
    assert journal(again.folder) == journal(whole.folder) and distance(again.folder, whole.folder) == 0
    with pytest.raises(UserError, match="processes: 2 -> 1"):
        train(configure(dropout=0.2, resume_from_checkpoint="latest", max_train_steps=4))


@needs_fork
def test_factors_are_those_of_the_first_process(configure: Configure, tmp_path: Path) -> None:
    """A basis that came out otherwise elsewhere, as the signs of an SVD may."""
    from nora_diffusion.training.run import run as building

    one = train(configure(train_batch_size=4, output_dir=str(tmp_path / "one"))).adapter_path.parent
    config, original = configure(train_batch_size=2), building.add_new_adapter

    def run(rank: int) -> None:
        def add_new_adapter(*given: Any) -> Any:
            parameters = original(*given)
            with torch.no_grad():
                for name, value in given[1].unet.named_buffers():
                    if ".nora_" in name and rank == 1:
                        value.neg_().add_(0.1)
            return parameters

        building.add_new_adapter = add_new_adapter
        train(config)

    assert forked(run) == [0, 0]
    assert distance(config.folder, one) <= 1e-3


@needs_fork
def test_a_process_that_fails_stops_the_others_with_a_sentence(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk is full for the only one that writes."""

    def full(*_: Any) -> None:
        raise UserError("the disk is full: free some space")

    monkeypatch.setattr(Stepper, "save", lambda self, done: full() if self.folder.owner else None)
    config = configure(checkpointing_steps=1)
    assert forked(lambda _: train(config)) == [2, 2]
    said = capfd.readouterr().err
    assert "the disk is full" in said and "another process of this run has stopped" in said
    assert "Traceback" not in said


def launch(config: TrainConfig, tmp_path: Path, processes: int = 2) -> subprocess.Popen[str]:
    """``accelerate launch`` as a user types it, in a process group of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[2]), out=config.output_dir))
    kind = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *kind, str(script), *flags(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_accelerate_launch(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it: 20 steps in two processes over gloo."""
    config = configure(max_train_steps=STEPS, checkpointing_steps=5)
    launched = launch(config, tmp_path)
    said, errors = launched.communicate(timeout=600)
    assert launched.returncode == 0, errors
    assert said.count("trained parameters") == 1
    in_double(monkeypatch.setattr)
    whole = configure(max_train_steps=STEPS, train_batch_size=4, output_dir=str(tmp_path / "one"))
    assert_same(config.folder, train(whole).adapter_path.parent)


@pytest.mark.slow
def test_ctrl_c_saves_once_for_all(configure: Configure, tmp_path: Path) -> None:
    """The launcher passes the signal on, and all stop at one step."""
    config = configure(max_train_steps=100_000)
    launched = launch(config, tmp_path)
    end = time.monotonic() + 600
    while not (config.folder / "log.jsonl").exists() or not journal(config.folder):
        assert launched.poll() is None and time.monotonic() < end, launched.communicate()
        time.sleep(0.05)
    os.killpg(launched.pid, signal.SIGINT)
    _, errors = launched.communicate(timeout=600)
    state = json.loads((config.folder / "state.json").read_text())
    assert state["status"] == "interrupted", errors
    assert (config.folder / f"checkpoints/step-{state['step']}/manifest.json").exists()
