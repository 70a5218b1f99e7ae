"""Faults of disks, files and memory: a sentence with the remedy, earlier work kept byte for byte, and the way on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_random_pipeline
from runs import Configure, assert_equal_tensors, assert_same_run

from nora_diffusion import open_pipeline
from nora_diffusion.errors import UserError
from nora_diffusion.io import files
from nora_diffusion.training import main, train
from nora_diffusion.training.planning import identity
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.updates import Updates

WAYS: dict[str, tuple[Any, str]] = {
    "making": (files.os, "open"),
    "writing": (files.os, "fdopen"),
    "flushing": (os, "fsync"),
    "renaming": (Path, "replace"),
}
FOUR = {"checkpointing_steps": 1, "max_train_steps": 4}


def contents(folder: Path) -> dict[str, bytes]:
    """All whole files but those of the watcher and the log."""
    names = (".lock", "state.json", "log.jsonl")
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def broken(original: Callable[..., Any], when: Callable[[], bool], number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if when():
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("way", "number"),
    [*((way, errno.ENOSPC) for way in WAYS.values()), (WAYS["making"], errno.EROFS)],
    ids=[*WAYS, "read-only"],
)
def test_a_disk_that_fails_inside_a_save_keeps_what_is_whole(
    way: tuple[Any, str], number: int, configure: Configure, tmp_path: Path
) -> None:
    config = configure(**FOUR)
    place = config.folder / "checkpoints"
    whole = train(configure(**FOUR, output_dir=str(tmp_path / "whole"))).adapter_path.parent
    before: dict[str, bytes] = {}

    def third() -> bool:
        there = len(list(place.glob("step-*"))) == 2
        if there and not before:
            before.update(contents(place / "step-1") | {f"2/{k}": v for k, v in contents(place / "step-2").items()})
        return there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*way, broken(getattr(*way), third, number))
        with pytest.raises(UserError, match=rf"cannot write .*{os.strerror(number)}; .* choose another"):
            train(config)
    assert sorted(path.name for path in place.iterdir()) == ["step-1", "step-2"]
    assert before == contents(place / "step-1") | {f"2/{k}": v for k, v in contents(place / "step-2").items()}
    train(configure(**FOUR, resume_from_checkpoint="latest"))
    assert_same_run(whole, config.folder, last=4)


def test_a_folder_that_is_read_only_from_the_start(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure()
    finished = train(config).adapter_path.parent
    before = contents(finished)
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if finished in Path(path).parents and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    sentence = r"cannot write .*run/\.lock: Read-only file system; change its permissions or choose another path"
    with pytest.raises(UserError, match=sentence):
        train(replace(config, overwrite_output_dir=True))
    assert contents(finished) == before
    monkeypatch.setattr(Path, "mkdir", broken(Path.mkdir, lambda: True, errno.EROFS))
    with pytest.raises(UserError, match="Read-only file system"):
        train(configure(output_dir=str(finished.parent / "fresh")))


def test_a_state_that_cannot_be_written_is_a_warning(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Path.write_text

    def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == ".state.json.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    assert train(configure()).adapter_path.exists()
    assert caplog.text.count("state.json cannot be written") == 1


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda whole: whole[: len(whole) // 2], r"is damaged or truncated \(.*\): copy it again"),
    "cut in the header": (lambda whole: whole[:100], r"is damaged or truncated \(.*\): copy it again"),
    "empty": (lambda _: b"", "is empty, truncated or not a safetensors file: copy it again"),
    "Git LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643268\n",
        r"is a Git LFS pointer, not weights: fetch the file itself \(git lfs pull\)",
    ),
    "web page": (lambda _: b"<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
    "pickle": (lambda _: b"\x80\x04\x95" + b"\x00" * 80, "is a Python pickle: it may run code"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_random_pipeline(tmp_path_factory.mktemp("spoilt") / "base")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_weights_that_are_none(
    change: Callable[[bytes], bytes], words: str, part: str, spoilt: Path, configure: Configure
) -> None:
    (file,) = (spoilt / part).glob("*.safetensors")
    whole = file.read_bytes()
    try:
        file.write_bytes(change(whole))
        config = configure(pretrained_model_name_or_path=str(spoilt))
        with pytest.raises(UserError, match=f"^{file} {words}"):
            train(config)
    finally:
        file.write_bytes(whole)
    assert not config.folder.exists()


def test_a_base_that_is_half_there_or_out_of_reach(spoilt: Path, tmp_path: Path) -> None:
    half = shutil.copytree(spoilt, tmp_path / "half")
    file = half / "unet/diffusion_pytorch_model.safetensors"
    parts = {f"p{n}": f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    file.rename(file.with_name(parts["p1"]))
    (half / "unet" / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors"):
        open_pipeline(half)
    with pytest.raises(UserError, match="a hub id that this machine can reach"):
        open_pipeline("nobody/nothing")


MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory."),
    "python": MemoryError(),
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
}


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY.keys())
def test_out_of_memory_keeps_the_last_checkpoint_and_advises(
    error: Exception, configure: Configure, tmp_path: Path
) -> None:
    whole = train(configure(**FOUR, output_dir=str(tmp_path / "whole"))).adapter_path.parent
    config, original = configure(**FOUR), Stepper.loss

    def loss(self: Stepper, step: int, micro: int) -> torch.Tensor:
        if step == 2:
            raise error
        return original(self, step, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "loss", loss)
        with pytest.raises(
            UserError, match=r"lower --train_batch_size .*--gradient_checkpointing.*checkpoints are kept"
        ):
            train(config)
    state = json.loads((config.folder / "state.json").read_text())
    assert (state["status"], state["message"]) == ("failed", "out of memory")
    train(replace(config, resume_from_checkpoint="latest"))
    assert_same_run(whole, config.folder, last=4)


def test_other_errors_are_no_want_of_memory(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Stepper, "loss", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        train(configure())


def test_a_resume_under_other_versions_or_settings_names_each(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    before = contents(train(config).adapter_path.parent)
    now = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: {**now, "torch": "9.9", "diffusers": "9.1"})
    with pytest.raises(UserError) as refused:
        train(replace(config, resume_from_checkpoint="latest", rank=8, max_train_steps=9))
    text = str(refused.value)
    assert f"(rank: 4 -> 8; version of diffusers: '{now['diffusers']}' -> '9.1'; version of torch: " in text
    assert "restore these values, or start a new run in another --output_dir" in text
    assert contents(config.folder) == before


def test_a_run_that_was_killed_is_said_to_have_been(
    configure: Configure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever process has its number now, and whatever the clock says."""
    config = configure(**FOUR)
    train(replace(config, max_train_steps=2))
    later = json.dumps({"status": "training", "step": 3, "pid": os.getpid(), "time": 9e12})
    (config.folder / "state.json").write_text(later)
    train(replace(config, resume_from_checkpoint="latest"))
    assert "was killed at step 3, probably because it ran out of memory" in caplog.text


TRACKERS = {"starts": "start", "begins": "store_init_configuration", "logs": "log", "ends": "finish"}


@pytest.mark.parametrize(
    ("method", "error"),
    [*((method, RuntimeError("down")) for method in TRACKERS.values()), ("start", SystemExit(1))],
    ids=[*TRACKERS, "starts, and ends the script"],
)
def test_a_tracker_that_fails_when_it(
    method: str, error: BaseException, configure: Configure, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fail)
    assert train(configure(report_to="tensorboard", max_train_steps=1)).steps == 1
    assert "the tracker tensorboard failed and is not used any more" in caplog.text


def test_the_command_shows_no_trace(
    configure: Configure, spoilt: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import flags

    def exhausted(*_: Any) -> None:
        raise MEMORY["torch on a CPU"]

    monkeypatch.setattr(Stepper, "loss", exhausted)
    assert main(flags(configure())) == 2
    said = capfd.readouterr().err
    assert "error: out of memory: lower" in said and "Traceback" not in said


def test_a_trigger_that_is_known_is_not_advised(configure: Configure) -> None:
    """The tokenizer of this base has 'sks' among its words."""
    from nora_diffusion.training import check

    texts = [finding.text for finding in check(configure(instance_prompt="a sks dog"))]
    (text,) = [text for text in texts if "The base already knows the trigger" in text]
    assert "trigger 'sks'," in text and text.endswith("such as 'ohwx'.")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_power_cut_finds_nothing_half_written(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a checkpoint is on the disk before its name is, the manifest last, then the folder's name."""
    events: list[tuple[str, str]] = []
    flush, rename = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        flush(handle)
        events.append(("flushed", Path(f"/proc/self/fd/{handle}").readlink().name))

    def replaced(self: Path, target: Path) -> Path:
        events.append((f"{self.name} becomes", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replaced)
    train(configure(max_train_steps=1))
    (end,) = [number for number, event in enumerate(events) if event == (".tmp-step-1 becomes", "step-1")]
    assert events[end + 1] == ("flushed", "checkpoints")
    named = []
    for number, (what, name) in enumerate(events[:end]):
        if what.endswith(" becomes") and name in ("nora_adapter.safetensors", "optimizer.safetensors", "manifest.json"):
            named.append(name)
            assert events[number - 1] == ("flushed", what.removesuffix(" becomes"))  # the content, then the name
            assert events[number + 1] == ("flushed", ".tmp-step-1")
    assert named == ["nora_adapter.safetensors", "optimizer.safetensors", "manifest.json"]


def test_a_finished_run_says_that_it_is(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(max_train_steps=1)
    first = train(config)
    card = (config.folder / "README.md").read_text()
    again = train(replace(config, resume_from_checkpoint="latest"))
    assert "this run is complete at step 1: raise --max_train_steps to continue" in caplog.text
    assert (again.final_loss, again.seconds) == (first.final_loss, first.seconds)  # of the steps, not of this start
    assert json.loads((config.folder / "state.json").read_text())["loss"] == first.final_loss
    assert (config.folder / "README.md").read_text().split("## Training")[1] == card.split("## Training")[1]


def test_a_finished_run_whose_schedule_has_ended_is_not_to_be_prolonged(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(max_train_steps=1, lr_scheduler="cosine")
    train(config)
    train(replace(config, resume_from_checkpoint="latest"))
    assert "complete at step 1: its learning rate schedule ends there; start a longer run in another" in caplog.text
    with pytest.raises(UserError, match="max_train_steps: 1 -> 2"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=2))


def test_weights_beyond_save_dtype_are_refused_and_the_run_goes_on_in_another(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = Updates.apply

    def apply(self: Updates, step: int, total: torch.Tensor) -> Any:
        found = original(self, step, total)
        if step == 2:  # the last
            with torch.no_grad():
                next(p for name, p in self.run.parameters.items() if name.endswith(".nora_B_in"))[0, 0] = 1e5
        return found

    monkeypatch.setattr(Updates, "apply", apply)
    with pytest.raises(UserError, match=r"nora_B_in has values beyond 65504.*bf16.*--resume_from_checkpoint latest$"):
        train(configure(save_dtype="fp16"))
    folder = configure().folder
    assert not (folder / "nora_adapter.safetensors").exists()
    assert json.loads((folder / "state.json").read_text())["status"] == "failed"
    saved = train(configure(save_dtype="bf16", resume_from_checkpoint="latest")).adapter_path
    whole = train(configure(save_dtype="bf16", output_dir=str(tmp_path / "whole"))).adapter_path
    assert_equal_tensors(saved, whole)
