"""Whole runs on tiny random bases: what they write, what they learn from, what stops them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import tiny_random_pipeline, write_photos
from PIL import Image
from runs import Configure, assert_equal_tensors
from safetensors.torch import load_file

from nora_diffusion import inspect_adapter, load_adapter, open_pipeline
from nora_diffusion.adapters import PRESETS
from nora_diffusion.errors import UserError
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.training import check, main, train
from nora_diffusion.training.planning import plan
from nora_diffusion.training.planning.opening import open_base, opening_dtype
from nora_diffusion.training.planning.rundir import RunFolder, RunLog
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.settings.methods import parameters_of

SCRIPT = Path(__file__).parents[3] / "train_dreambooth_nora.py"


def script(words: list[str]) -> int:
    """Run the script in a process of its own; returns its exit code."""
    return subprocess.run([sys.executable, SCRIPT, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


@pytest.mark.parametrize(
    ("kind", "run"), [("tiny_base", script), ("tiny_v_base", main)], ids=["script", "v_prediction"]
)
def test_the_flags_of_diffusers(
    kind: str, run: Callable[[list[str]], int], photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A command line of diffusers' README with only the script's name changed, for two steps."""
    out = tmp_path / "out put"
    command = f"""--pretrained_model_name_or_path={request.getfixturevalue(kind)} --instance_data_dir={photos}
        --resolution=16 --train_batch_size=1 --gradient_accumulation_steps=1 --checkpointing_steps=100
        --learning_rate=1e-4 --report_to=none --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=2
        --validation_epochs=50 --num_validation_images=1 --sample_steps=2 --seed=0 --rank=4""".split()
    prompts = ["--instance_prompt=a photo of sks dog", "--validation_prompt=A photo of sks dog in snow"]
    assert run([*command, *prompts, f"--output_dir={out}"]) == 0
    info = inspect_adapter(out)
    assert (info.trigger, info.class_word, info.step, info.seed) == ("sks", "dog", 2, 0)
    assert info.instance_prompt == "a photo of sks dog"
    settings = read_settings(out / "samples/step-000002-0.png")
    assert settings.adapters == [{"name": out.name, "weight": 1.0, "sha256": "", "path": str(out), "step": 2}]
    assert (settings.width, settings.seed, settings.prompt) == (16, 0, "A photo of sks dog in snow")
    assert json.loads((out / "state.json").read_text())["status"] == "done"
    assert (
        "Use `sks`" in (out / "README.md").read_text()
        and "| learning_rate | 0.0001 |" in (out / "README.md").read_text()
    )
    assert yaml.safe_load((out / "config.yaml").read_text())["resolution"] == 16
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_a_users_mistake_is_one_sentence_and_code_2(photos: Path, tmp_path: Path) -> None:
    words = ["--instance_data_dir", str(photos), "--outputdir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown flag '--outputdir': did you mean --output_dir?"


def test_config_yaml_of_a_run_repeats_it(configure: Configure, tmp_path: Path) -> None:
    first = train(configure(seed=None, max_train_steps=None, num_train_epochs=1))
    assert first.steps == 2
    words = ["--config", str(first.adapter_path.parent / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(words) == 0
    one, other = load_file(first.adapter_path), load_file(tmp_path / "again/nora_adapter.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_learns_and_its_file_reproduces_the_model(method: str, configure: Configure, render: Any) -> None:
    small = {"num_experts": 2, "blocks": 2}
    keys = {key: value for key, value in small.items() if key in parameters_of(method)}
    foreign = {key: None for key in ("inner_rank", "basis") if key not in parameters_of(method)}
    result = train(configure(method=method, learning_rate=0.05, save_dtype="fp16", **foreign, **keys))
    base = str(configure().pretrained_model_name_or_path)
    plain, adapted = open_pipeline(base), open_pipeline(base)
    loaded = load_adapter(adapted, result.adapter_path)
    assert loaded.applied == loaded.total and loaded.trigger == "sks"
    assert result.trainable_parameters == inspect_adapter(result.adapter_path).trained_parameters
    assert (render(plain) - render(adapted)).abs().max() > 0


def test_a_basis_calibrated_on_the_subject_is_its_own(configure: Configure, tmp_path: Path) -> None:
    """The photos decide the frozen basis with calibration="subject", and only then."""

    def basis(calibration: str, photos: int) -> dict[str, torch.Tensor]:
        place = write_photos(tmp_path / f"photos{photos}", 4, seed=photos)
        run = configure(
            instance_data_dir=str(place), calibration=calibration, basis="awsvd", max_train_steps=1,
            output_dir=str(tmp_path / f"{calibration}{photos}"), overwrite_output_dir=True, target_blocks=["mid_block"],
        )  # fmt: skip
        tensors = load_file(train(run).adapter_path)
        return {key: value for key, value in tensors.items() if key.endswith("_out")}

    generic, other_generic = basis("generic", 1), basis("generic", 2)
    assert generic and all(key.startswith("unet.mid_block.") for key in generic)
    assert all(torch.equal(other_generic[key], value) for key, value in generic.items())
    one, two = basis("subject", 1), basis("subject", 2)
    again = basis("subject", 1)
    assert all(torch.equal(again[key], value) for key, value in one.items())
    assert any(not torch.equal(one[key], value) for key, value in two.items())
    assert any(not torch.equal(one[key], value) for key, value in generic.items())


def test_subjects_of_several_machines_share_one_basis(configure: Configure, tmp_path: Path) -> None:
    """Half precision gives the SVD other weights, as another machine gives it other rounding; taken over, it is one."""
    first = train(configure(basis="svd", max_train_steps=1, output_dir=str(tmp_path / "first"))).adapter_path
    settings = {"basis": "svd", "max_train_steps": 1, "mixed_precision": "bf16"}
    own = train(configure(**settings, output_dir=str(tmp_path / "own"))).adapter_path
    taken = configure(**settings, basis_from=str(first.parent), output_dir=str(tmp_path / "taken"))
    second = train(taken).adapter_path
    one, other, two = (inspect_adapter(path).basis_sha256 for path in (first, own, second))
    assert one == two != other
    with pytest.raises(UserError, match="this adapter would have r = 8: use the same value"):
        train(replace(taken, rank=8, output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_the_loss_falls(configure: Configure, tmp_path: Path) -> None:
    """One photo, every target, a high rate: the adapter must be able to fit it."""
    place = write_photos(tmp_path / "one", 1)
    result = train(
        configure(
            instance_data_dir=str(place), method="lora", inner_rank=None, basis=None, rank=8, max_train_steps=60,
            target_modules=["attn", "ff", "proj", "conv"], train_batch_size=8, learning_rate=2e-2,
        )
    )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (result.adapter_path.parent / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_text_encoder_training(configure: Configure) -> None:
    result = train(configure(train_text_encoder=True, gradient_checkpointing=True, text_encoder_lr=1e-3))
    tensors = load_file(result.adapter_path)
    moved = [key for key, value in tensors.items() if key.startswith("text_encoder.") and "_in" in key and value.any()]
    assert moved and any(key.startswith("unet.") for key in tensors)


def test_prior_preservation_fills_and_reuses_class_images(configure: Configure, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior = {
        "with_prior_preservation": True, "class_prompt": "a photo of dog", "class_data_dir": str(folder),
        "num_class_images": 3, "sample_batch_size": 2,
    }  # fmt: skip
    weighted = train(configure(**prior))
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(made) == 3
    unweighted = train(configure(**prior, prior_loss_weight=0.0, output_dir=str(tmp_path / "other")))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert weighted.final_loss > unweighted.final_loss
    (folder / sorted(made)[0]).unlink()
    train(configure(**prior, output_dir=str(tmp_path / "third")))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    with Image.open(folder / sorted(made)[0]) as image:  # without settings, so without a prompt to compare
        image.rotate(90).save(folder / "own.png")
    prior["output_dir"] = str(tmp_path / "fourth")
    findings = "\n".join(finding.text for finding in check(configure(**{**prior, "class_prompt": "a photo of cat"})))
    assert (
        f"3 of the class images in {folder} were generated with 'a photo of dog', not with 'a photo of cat'" in findings
    )
    assert "class images" not in "\n".join(finding.text for finding in check(configure(**prior)))


def test_captions_carry_the_trigger(configure: Configure, photos: Path, tmp_path: Path) -> None:
    place = shutil.copytree(photos, tmp_path / "captioned")
    for number in range(3):
        (place / f"{number}.txt").write_text(f"a toy dog with {number} hats")
    changes = {"instance_prompt": None, "use_captions": True, "trigger": "sks", "class_word": "dog"}
    result = train(configure(instance_data_dir=str(place), **changes))
    assert inspect_adapter(result.adapter_path).prompts == [f"a toy sks dog with {n} hats" for n in range(3)]


def test_a_guessed_trigger_stays_out_of_captions_when_the_run_is_repeated(
    configure: Configure, photos: Path, tmp_path: Path
) -> None:
    """A given one is put into captions that lack it; the one that was found in the prompt was not."""
    place = shutil.copytree(photos, tmp_path / "captioned")
    (place / "0.txt").write_text("a toy dog with a hat")
    first = train(configure(instance_data_dir=str(place), use_captions=True, max_train_steps=1)).adapter_path
    again = ["--config", str(first.parent / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    for adapter in (first, tmp_path / "again"):
        info = inspect_adapter(adapter)
        assert (info.trigger, info.prompts) == ("sks", ["a toy dog with a hat", "a photo of sks dog"])


def test_other_settings_run(configure: Configure, tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {
                "random_flip": True,
                "center_crop": True,
                "image_interpolation_mode": "bicubic",
                "dataloader_num_workers": 2,
            },
            {"scale_lr": True, "lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2, "snr_gamma": 5.0},
            {"text_encoder_use_attention_mask": True, "tokenizer_max_length": 16, "timestep_sampling": "stratified"},
            {"mixed_precision": "bf16", "validation_prompt": "a sks dog", "validation_steps": 2},
            {"target_modules": [".*to_q"], "basis": "awsvd", "calibration_prompts": ["a dog"], "save_dtype": "bf16"},
        )
    ):
        result = train(configure(output_dir=str(tmp_path / str(number)), **changes))
        assert result.adapter_path.exists(), changes


def test_the_denoiser_is_opened_in_the_precision_of_the_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU need never hold it in fp32, and no number depends on that."""
    half, cpu = configure(mixed_precision="bf16"), torch.device("cpu")
    prior = {"with_prior_preservation": True, "class_prompt": "a dog"}
    drawing = configure(mixed_precision="bf16", **prior)
    frozen = configure(mixed_precision="bf16", **prior, prior_preservation="frozen")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    unknown = configure(mixed_precision=None, resume_from_checkpoint="latest")
    found = [opening_dtype(runs, cpu) for runs in ([half], [frozen], [half, drawing], [unknown], [configure()])]
    assert found == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert opening_dtype([configure(mixed_precision=None)], cpu) == torch.bfloat16
    pipe = open_base(half, cpu, torch.bfloat16)
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    early = train(half).adapter_path
    monkeypatch.setattr(plan, "opening_dtype", lambda *_: torch.float32)
    late = train(configure(mixed_precision="bf16", output_dir=str(tmp_path / "late"))).adapter_path
    assert_equal_tensors(early, late)
    fingerprints = [inspect_adapter(path).base_fingerprint for path in (early, late)]
    assert fingerprints[0] == fingerprints[1]


def test_a_prompt_is_needed(configure: Configure) -> None:
    config = configure(instance_prompt=None)
    with pytest.raises(UserError, match="there is no prompt"):
        train(config)
    assert not config.folder.exists()


def test_bad_photos_and_bases_leave_nothing_behind(configure: Configure, tmp_path: Path) -> None:
    bad = write_photos(tmp_path / "bad", 2)
    (bad / "1.png").write_bytes(b"")
    for changes, words in (
        ({"instance_data_dir": str(bad)}, "1.png is empty"),
        ({"instance_data_dir": str(tmp_path)}, "no photos in"),
        ({"pretrained_model_name_or_path": str(tmp_path)}, "model_index.json is missing"),
        ({"pretrained_model_name_or_path": str(tmp_path / "absent")}, "does not exist"),
        ({"resolution": 17}, "must be a multiple of 2"),
        ({"tokenizer_max_length": 99}, "exceeds the 16 tokens"),
    ):
        config = configure(**changes)
        with pytest.raises(UserError, match=words):
            train(config)
        assert not config.folder.exists()


def test_targets_that_match_nothing(configure: Configure) -> None:
    with pytest.raises(UserError, match="matches no projection"):
        train(configure(target_modules=["to_nowhere"]))
    with pytest.raises(UserError, match=r"the base has no 'up_block.1': did you mean 'up_blocks.1'"):
        train(configure(target_blocks=["mid_block", "up_block.1"]))


def test_nan_stops_and_keeps_the_last_good_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stepper.loss
    monkeypatch.setattr(
        Stepper, "loss", lambda self, step, micro: original(self, step, micro) * (float("nan") if step == 2 else 1.0)
    )
    config = configure(checkpointing_steps=1, max_train_steps=5)
    with pytest.raises(UserError, match=r"the loss is not finite at step 3.*step-2"):
        train(config)
    good = load_file(config.folder / "checkpoints/step-2/nora_adapter.safetensors")
    assert all(torch.isfinite(value).all() for value in good.values())
    assert not (config.folder / "nora_adapter.safetensors").exists()
    assert json.loads((config.folder / "state.json").read_text())["status"] == "failed"


def test_an_output_folder_that_cannot_be_used(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place, words in ((tmp_path / "file", "is a file"), (tmp_path / "file/below", "cannot write")):
        with pytest.raises(UserError, match=words):
            train(configure(output_dir=str(place)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_use_that_is_no_run_is_left_as_it_is(configure: Configure, tmp_path: Path) -> None:
    config = configure(validation_prompt="a dog", validation_steps=1)
    names = ["samples/a.txt", "validation/held.txt", "candidates/people.csv", "candidates/step-by-step/a.txt",
             "checkpoints/sd15.txt", "checkpoints/step-1.txt", "report.html", "README.md", "config.yaml"]  # fmt: skip
    for name in names:
        (config.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (config.folder / name).write_text("mine")
    for begin in (check, train):
        with pytest.raises(UserError, match=r"holds no run, and a run would write into or over config\.yaml, report"):
            begin(config)
    assert sorted(str(p.relative_to(config.folder)) for p in config.folder.rglob("*") if p.is_file()) == sorted(names)
    again = replace(config, overwrite_output_dir=True)
    for _ in range(2):
        train(replace(again, checkpointing_steps=1))
        assert all((config.folder / name).read_text() == "mine" for name in names if "/" in name)
    train(replace(again, max_train_steps=1, validation_prompt=None))
    assert [p.name for p in (config.folder / "samples").iterdir()] == ["a.txt"]
    assert {p.name for p in (config.folder / "checkpoints").iterdir()} == {"sd15.txt", "step-1.txt", "step-1"}


def test_a_folder_without_anything_in_the_way_is_taken(configure: Configure) -> None:
    config = configure()
    for name in ("samples/", "class_images/", ".git/"):
        (config.folder / name).mkdir(parents=True)
    (config.folder / "notes.txt").write_text("mine")
    check(config)
    with RunFolder(config.folder) as folder:
        folder.claim(fresh=True, config={})  # and killed at once
    assert train(config).steps == 3 and (config.folder / "notes.txt").read_text() == "mine"


def test_two_trainers_in_one_folder(configure: Configure) -> None:
    with RunFolder(configure().folder), pytest.raises(UserError, match="another training runs in"):
        train(configure())


def test_a_disk_that_is_nearly_full_is_refused_before_anything_is_written(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free some space"):
        train(configure())
    assert not configure().folder.exists()


def test_a_failing_tracker_or_preview_does_not_stop_training(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LookupError("the service is down")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", broken)
    monkeypatch.setattr("nora_diffusion.training.measuring.samples.generate_images", broken)
    assert train(configure(validation_prompt="a dog", report_to="tensorboard")).steps == 3
    assert "the tracker tensorboard failed" in caplog.text and "no samples" in caplog.text


def test_what_leaves_a_run_is_listed_and_holds_no_secret(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            sent["token"] = token

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
            sent["asked_private"] = private
            return type("Url", (), {"repo_id": f"me/{name}"})()

        def repo_info(self, name: str) -> Any:
            return type("Info", (), {"private": sent.get("is_private", True)})()

        def upload_folder(self, **values: Any) -> None:
            sent.update(values)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    result = train(configure(push_to_hub=True, hub_token="secret", hub_model_id="dog"))
    assert (sent["token"], sent["repo_id"]) == ("secret", "me/dog")
    assert sent["allow_patterns"] == ["nora_adapter.safetensors", "README.md"] and sent["asked_private"] is True
    sent |= {"is_private": False, "repo_id": ""}
    with pytest.raises(UserError, match="me/dog is public"):
        train(configure(push_to_hub=True, hub_model_id="dog", overwrite_output_dir=True))
    assert sent["repo_id"] == ""
    everything = {"export": ["diffusers", "kohya", "peft"], "validation_prompt": "a dog", "hub_private": False}
    with caplog.at_level("INFO"):
        train(configure(push_to_hub=True, overwrite_output_dir=True, **everything))
    assert sent["allow_patterns"] == [
        "nora_adapter.safetensors", "README.md", "samples/step-000003-0.png",
        "exports/diffusers/pytorch_lora_weights.safetensors", "exports/kohya/run.safetensors",
        "exports/peft/unet/adapter_config.json", "exports/peft/unet/adapter_model.safetensors",
    ]  # fmt: skip
    assert all(f"to be uploaded to run: {name}, " in caplog.text for name in sent["allow_patterns"])
    assert "![sample 0](samples/step-000003-0.png)" in (result.adapter_path.parent / "README.md").read_text()
    exported = open_pipeline(str(configure().pretrained_model_name_or_path))
    exported.load_lora_weights(result.adapter_path.parent / "exports/diffusers")
    texts = [path.read_text(errors="ignore") for path in result.adapter_path.parent.rglob("*") if path.is_file()]
    assert not any("secret" in text for text in texts)


def test_an_upload_that_fails_is_a_sentence_after_the_list(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Offline(Exception):
        """As those of HTTP libraries, which are no OSError."""

    def create_repo(*_: Any, **__: Any) -> None:
        raise Offline("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with (
        caplog.at_level("INFO"),
        pytest.raises(UserError, match=r"is saved in .* failed \(Name or service not known\)"),
    ):
        train(configure(push_to_hub=True))
    assert "to be uploaded to run: nora_adapter.safetensors, " in caplog.text and configure().folder.is_dir()


def test_a_training_photo_is_never_sent(configure: Configure, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    def copied(pipe: Any, folder: Path, step: int, *_: Any) -> list[Path]:
        folder.mkdir(exist_ok=True)
        return [Path(shutil.copy(photos / "1.png", folder / f"step-{step:06d}-0.png"))]

    monkeypatch.setattr("nora_diffusion.training.run.steps.save_samples", copied)
    with pytest.raises(UserError, match=r"1.png is a training photo: nothing was uploaded"):
        train(configure(push_to_hub=True, validation_prompt="a dog"))


def test_exports_that_cannot_be_are_refused_before_training(configure: Configure) -> None:
    for changes, words in (
        ({"export": ["onnx"]}, "choose among diffusers, kohya, peft"),
        (
            {"export": ["kohya"], "method": "mor", "inner_rank": None, "basis": None},
            "no plain LoRA equals a mor adapter",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train(configure(**changes))


def test_another_models_pipeline_is_refused(configure: Configure, tmp_path: Path) -> None:
    base = tiny_random_pipeline(tmp_path / "inpainting")
    file = base / "unet/config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "addition_embed_type": "text", "encoder_hid_dim": 16}))
    with pytest.raises(UserError, match=r"is not supported|cannot load"):
        train(configure(pretrained_model_name_or_path=str(base)))


def test_the_log_drops_what_came_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = RunLog(path, resumed_step=2)
    log.write(step=3, loss=0.5)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
