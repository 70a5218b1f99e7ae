"""The recipe trains, resumes exactly, and writes folders that plain diffusers and transformers load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nora_diffusion import UserError
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.scoring.judges import load_judge, text_features
from nora_diffusion.tiny_sd.recipe import processes
from nora_diffusion.tiny_sd.recipe.configs import SIZES, Stage, StageConfig
from nora_diffusion.tiny_sd.recipe.loop import LoopOptions, learning_rate
from nora_diffusion.tiny_sd.recipe.muon import orthogonalize
from nora_diffusion.tiny_sd.recipe.ship import export_all, finish_vae, frozen_vae
from nora_diffusion.tiny_sd.recipe.stage_diffusion import build_scheduler, loss_weight
from nora_diffusion.tiny_sd.recipe.stage_vae import read_vae, to_tensor
from nora_diffusion.tiny_sd.train import STAGES, adjusted, run_stage
from nora_diffusion.tiny_sd.world.render import sample

NANO = SIZES["nano"]


@pytest.fixture(scope="module")
def nano_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages of the nano size, trained without interruption."""
    out = tmp_path_factory.mktemp("nano")
    for stage in STAGES:
        run_stage(stage, NANO, LoopOptions(out, log_every=2), device="cpu")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_stage_equals_an_uninterrupted_one(stage: Stage, nano_run: Path, tmp_path: Path) -> None:
    if stage == "diffusion":
        (tmp_path / "vae.state.safetensors").write_bytes((nano_run / "vae.state.safetensors").read_bytes())
    run_stage(stage, NANO, LoopOptions(tmp_path, stop_at=3), device="cpu")
    run_stage(stage, NANO, LoopOptions(tmp_path), device="cpu")
    uninterrupted = load_file(nano_run / f"{stage}.state.safetensors")
    resumed = load_file(tmp_path / f"{stage}.state.safetensors")
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[k], resumed[k]) for k in uninterrupted)


@pytest.mark.slow
def test_the_log_holds_finite_losses_of_every_stage(nano_run: Path) -> None:
    rows = [json.loads(line) for line in (nano_run / "log.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in rows} == set(STAGES)
    assert all(0 < r["loss"] < 100 for r in rows)


@pytest.mark.slow
def test_nano_weights_load_in_plain_diffusers(nano_run: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    export_all(NANO, nano_run, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a sks dog", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64) and text_features(load_judge(tmp_path / "judge"), ["a dog"]).shape == (1, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "frozen"), [("vae", ()), ("decoder", ("encoder.", "quant_conv."))])
def test_training_of_an_autoencoder_continues(
    stage: Stage, frozen: tuple[str, ...], nano_run: Path, tmp_path: Path
) -> None:
    export_all(NANO, nano_run, tmp_path / "weights")
    init = tmp_path / "weights" / "pipeline"
    run_stage(stage, NANO, LoopOptions(tmp_path), device="cpu", init=init)
    before, after = read_vae(init / "vae").state_dict(), frozen_vae(NANO, tmp_path, 0, init).state_dict()
    assert {k for k, v in after.items() if torch.equal(v, before[k])} == {k for k in before if k.startswith(frozen)}


@pytest.mark.slow
def test_finished_latents_have_mean_zero_and_deviation_one(nano_run: Path) -> None:
    vae = finish_vae(NANO, nano_run, 0)
    images = torch.stack([to_tensor(sample(10, i)[0][None])[0] for i in range(NANO.normalizing)])
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(4), atol=1e-3, rtol=0)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    config = StageConfig(steps=100, batch=1, lr=1.0, warmup=10, decay=0.5)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[20] == rates[49] == 1.0 and 0 < rates[99] < 0.03


def test_orthogonalize_brings_singular_values_near_one() -> None:
    for shape in ((12, 30), (30, 12)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_loss_weight_is_one_for_noise_and_small_for_clean_images() -> None:
    weight = loss_weight(torch.tensor([0.0, 4.0, 99.0]))
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 0.05]))
    assert build_scheduler().alphas_cumprod[-1] < 1e-7


def test_settings_of_one_stage_can_be_changed() -> None:
    changed = adjusted(NANO, "vae", steps=9, lr=None)
    assert changed.stages["vae"] == replace(NANO.stages["vae"], steps=9)
    assert changed.stages["judge"] == NANO.stages["judge"] and adjusted(NANO, "vae", steps=None) == NANO


def test_shipped_weights_load_and_have_the_documented_size() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED_WEIGHTS / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    tiny = SIZES["tiny"]
    assert tuple(pipe.unet.config.block_out_channels) == tiny.unet["block_out_channels"]
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.vae.config.scaling_factor == 1.0
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 32
    image = pipe("a fox in the snow", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    total = sum(p.stat().st_size for p in EMBEDDED_WEIGHTS.rglob("*") if p.is_file())
    assert 15e6 < total < 40e6
    card = (EMBEDDED_WEIGHTS / "README.md").read_text()
    assert "OFL" in card and "license" in card


def _average_on_two_ranks(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradient = torch.arange(12.0).view(1, 3, 2, 2).to(memory_format=torch.channels_last) * (rank + 1)
    other = torch.full((5,), float(rank))
    processes.average([gradient, None, other])
    torch.testing.assert_close(gradient, torch.arange(12.0).view(1, 3, 2, 2) * 1.5)
    torch.testing.assert_close(other, torch.full((5,), 0.5))


@pytest.mark.slow
def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average_on_two_ranks, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.slow
def test_two_processes_train_one_unet_on_different_scenes(nano_run: Path, tmp_path: Path) -> None:
    export_all(NANO, nano_run, tmp_path / "weights")
    flags = f"--nproc_per_node=2 -m nora_diffusion.tiny_sd.train --stage diffusion --size nano --out {tmp_path / 'run'}"
    flags += f" --device cpu --init {tmp_path / 'weights' / 'pipeline'}"
    command = [sys.executable, "-m", "torch.distributed.run", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4], "only rank 0 writes"
    seen = json.loads((tmp_path / "run" / "weights" / "training.json").read_text())["scenes"]
    assert [seed for seed, _ in seen] == [0, 0, 1000]
    assert all(count >= NANO.pool for _, count in seen)


def test_only_the_diffusion_stage_supports_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--stage vae runs in one process"):
        run_stage("vae", NANO, LoopOptions(tmp_path))
    assert not any(tmp_path.iterdir())


def test_processes_must_share_a_batch_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    with pytest.raises(UserError, match="3 processes cannot share --batch 10 evenly"):
        run_stage("diffusion", adjusted(NANO, "diffusion", batch=10), LoopOptions(tmp_path))
    assert not any(tmp_path.iterdir())
