"""dtypes: defaults by device, flags of the commands, effects of half precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_pipeline
from factories import write_photos
from PIL import Image
from torch import Tensor

from nora_diffusion import UserError, add_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.cli import flags, main
from nora_diffusion.evaluation.grid import base_description
from nora_diffusion.evaluation.protocol import evaluate
from nora_diffusion.evaluation.settings import EvaluationConfig
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.latent_preview import LatentPreview
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.pipelines.precision import (
    AUTO,
    DTYPES,
    MIXED_DTYPES,
    best_precision,
    dtype_name,
    in_fp32,
    resolve_dtype,
)
from nora_diffusion.scoring.judges import Judge
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.jobs.training_form import build_settings
from nora_diffusion.ui.state import App

ROOT = Path(__file__).parents[2]
SIZE = ["--width", "16", "--height", "16", "--steps", "2"]
SMALL = Sampling(1, 2.0, width=16, height=16)
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_half_precision_on_gpus_only(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    found = {device: resolve_dtype(AUTO, device) for device in ("cpu", "mps", "cuda", "cuda:1", torch.device("cuda"))}
    half = torch.bfloat16 if has_bf16 else torch.float16
    assert found == dict.fromkeys(("cpu", "mps"), torch.float32) | dict.fromkeys([*found][2:], half)
    assert best_precision(torch.device("cuda")) == ("bf16" if has_bf16 else "no")


def test_explicit_dtypes() -> None:
    explicit = {name: resolve_dtype(name, "cuda") for name in DTYPES}
    assert explicit == DTYPES and resolve_dtype("bf16", "cpu") == torch.bfloat16
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == [*DTYPES] and dtype_name(torch.int8) == "int8"
    assert {"no": torch.float32, **DTYPES} == MIXED_DTYPES and (AUTO, *DTYPES) == flags.DTYPES
    with pytest.raises(UserError, match="fp16 needs a GPU: use bf16 or fp32"):
        resolve_dtype("fp16", "cpu")
    with pytest.raises(UserError, match="'fp8' is unknown: choose one of auto, fp32, fp16, bf16"):
        resolve_dtype("fp8", "cuda")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        AppConfig(BaseSource(dtype="fp16", device="cpu")).check()


def test_dtypes_are_defined_once() -> None:
    tables = [file.name for file in (ROOT / "nora_diffusion").rglob("*.py")
              if re.search(r"""["']fp16["']: *torch""", file.read_text(encoding="utf-8"))]  # fmt: skip
    assert tables == ["precision.py"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records ``(dtype, revision, variant)`` of each base that is opened, and stops there."""
    calls: list[tuple[Any, ...]] = []

    def stop(source: Any, *options: Any) -> None:
        calls.append(options)
        raise UserError("enough")

    monkeypatch.setattr("nora_diffusion.pipelines.base._from_pretrained", stop)
    return calls


@pytest.mark.parametrize("command", ["generate", "grid", "evaluate", "app"])
def test_commands_pass_dtype_variant_and_revision(
    command: str, opened: list[tuple[Any, ...]], tiny_base: Path, tmp_path: Path
) -> None:
    words = {
        "generate": ["--prompt", "a dog"], "grid": ["--x", "seed=1", "--prompt", "a dog"],
        "evaluate": ["--adapters", "a=nowhere", "--subjects", str(write_photos(tmp_path / "rex", 2))],
    }  # fmt: skip
    flags = ["--base", str(tiny_base), "--dtype", "bf16", "--variant", "fp16", "--revision", "v2"]
    if command == "evaluate":
        flags += ["--judge", "tiny"]
        words["evaluate"][1] = f"a={_adapter(tiny_base, tmp_path / 'dog')}"
    if command == "app":
        source = BaseSource(str(tiny_base), dtype="bf16", variant="fp16", revision="v2")
        config = AppConfig(source, library=str(tmp_path))
        engine = App(config, tmp_path).engine
        with pytest.raises(UserError, match="enough"):
            _ = engine.pipe
        settings = build_settings(engine, "Fast", "sks", "dog", {})
        assert (settings["variant"], settings["revision"]) == ("fp16", "v2")  # a training run gets the same options
    else:
        assert main([command, *flags, *words[command], "--out", str(tmp_path / "out")]) == 2
    assert opened == [(torch.bfloat16, "v2", "fp16")]


def _adapter(base: Path, folder: Path) -> Path:
    """Save an adapter without :func:`open_pipeline`, which a test may have replaced."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), "one")
    save_adapter(pipe, folder, "one", info={"trigger": "sks", "class_word": "dog"})
    return folder


def test_variant(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    open_pipeline(tiny_base).save_pretrained(tmp_path / "base", variant="fp16")
    words = ["generate", "--base", str(tmp_path / "base"), "--prompt", "a dog", "--out", str(tmp_path / "out"), *SIZE]
    assert main(words) == 2
    assert main([*words, "--variant", "fp16"]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert read_settings(file).dtype == "fp32"  # the CPU's default; the dtype of the files does not matter


def test_half_precision_changes_images_little(tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    """With an adapter on UNet and text encoder; image metadata and grid cells record the dtype."""
    pipe: Any = open_pipeline()
    torch.manual_seed(0)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one", ("unet", "text_encoder"))
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data.normal_(std=0.3)
    save_adapter(pipe, tmp_path / "dog", "one")
    images = {}
    for name in ("auto", "fp32", "bf16"):
        words = ["generate", "--adapter", str(tmp_path / "dog"), "--prompt", "a red fox", "--steps", "8"]
        assert main([*words, "--device", "cpu", "--dtype", name, "--out", str(tmp_path / name)]) == 0
        file = Path(capsys.readouterr().out.strip())
        assert read_settings(file).dtype == ("fp32" if name == "auto" else name)
        images[name] = np.asarray(Image.open(file), dtype=float)
    assert (images["auto"] == images["fp32"]).all()
    assert 0 < np.abs(images["bf16"] - images["fp32"]).mean() < 2
    assert base_description(open_pipeline(tiny_base, "bf16"))["dtype"] == "torch.bfloat16"


def test_judges_run_in_fp32(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nora_diffusion.evaluation import protocol

    seen: set[torch.dtype] = set()
    original: Callable[..., Tensor] = protocol.image_features

    def record(judge: Judge, images: Any) -> Tensor:
        seen.update(parameter.dtype for parameter in judge.model.parameters())
        return original(judge, images)

    monkeypatch.setattr(protocol, "image_features", record)
    config = EvaluationConfig(
        [str(_adapter(tiny_base, tmp_path / "dog"))], [str(write_photos(tmp_path / "rex", 2))],
        Sampling(1, 7.5, width=16, height=16), BaseSource(str(tiny_base), "cpu", "bf16"), seeds=1, judge="tiny",
        out=str(tmp_path / "out"),
    )  # fmt: skip
    (tmp_path / "one.txt").write_text("{} on the beach")
    config.prompts = str(tmp_path / "one.txt")
    board = evaluate(config)
    settings = {f.name for kind in (EvaluationConfig, Sampling, BaseSource) for f in fields(kind)} - {
        "sampling",
        "source",
    }
    assert seen == {torch.float32}
    assert board.settings["dtype"] == "bf16" and settings <= set(board.settings)
    assert {read_settings(file).dtype for row in board.scored for file in row.files} == {"bf16"}


def test_out_of_memory_while_decoding_restores_the_vae_dtype(tmp_path: Path) -> None:
    """SDXL's pipeline decodes in fp32 where fp16 overflows, and does not restore the dtype if that fails."""
    pipe = _sdxl_in_fp16(tmp_path)
    decode, fail = pipe.vae.decode, [True]

    def decoding(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert latents.dtype == pipe.vae.dtype == torch.float32
        if fail.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = decoding
    with pytest.raises(torch.OutOfMemoryError):
        sample_images(pipe, ["a dog"], [0], SMALL)
    assert pipe.vae.dtype == torch.float16
    fail[:] = [False]
    assert np.asarray(sample_images(pipe, ["a dog"], [0], SMALL)[0]).std() > 1


def _sdxl_in_fp16(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    pipe = tiny_pipeline("sdxl", folder)
    pipe.vae = AutoencoderKL(
        latent_channels=4, norm_num_groups=4, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    assert pipe.vae.config.force_upcast
    for component in (pipe.vae, pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        torch.nn.Module.to(component, torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", HALF)
def test_preview_is_fitted_in_fp32(dtype: torch.dtype) -> None:
    """SDXL's VAE overflows in fp16; this test scales the weights to get the same."""
    vae = open_pipeline(None, dtype).vae
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e4)
    fitted = LatentPreview.fit(vae)
    assert fitted.weight.isfinite().all() and vae.dtype == dtype
    with in_fp32(vae):
        torch.testing.assert_close(LatentPreview.fit(vae).weight, fitted.weight)
