"""SDXL, SD 2.x, SD3 and Flux through the same loop; what they are told is what their pipelines tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from runs import Configure
from safetensors.torch import load_file

from nora_diffusion import load_adapter, open_pipeline
from nora_diffusion.errors import UserError
from nora_diffusion.pipelines.components import denoiser
from nora_diffusion.training import train
from nora_diffusion.training.step.denoiser import encode_prompts, family_of, predict
from nora_diffusion.training.step.objective import Objective

FAMILIES = ("sd2", "sdxl", "sd3", "flux")
ENCODERS = {"sd2": 1, "sdxl": 2, "sd3": 2, "flux": 1}
PROMPTS = ["a photo of sks dog", "a red hat"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:The following part of your input was truncated"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random pipeline of each family, on disk."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        tiny_pipeline(name, folder / "files").save_pretrained(folder / "pipe")
        found[name] = folder / "pipe"
    return found


@pytest.fixture
def family_run(configure: Configure, bases: dict[str, Path]) -> Any:
    def build(name: str, **changes: Any) -> Any:
        few = {"sd3": 16, "flux": 16}.get(name)
        return configure(
            pretrained_model_name_or_path=str(bases[name]), resolution=16, tokenizer_max_length=few, **changes
        )

    return build


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_calls_the_denoiser_as_the_pipeline_does(name: str, tmp_path: Path) -> None:
    """Same latents, timestep and prompts: the answer equals the one inside the stock pipeline's own first step."""
    pipe = tiny_pipeline(name, tmp_path)
    seen: dict[str, Any] = {}
    model = denoiser(pipe)

    def look(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.update(kwargs, noisy=args[0] if args else kwargs["hidden_states"], answer=output[0])
        seen["t"] = args[1] if len(args) > 1 else kwargs["timestep"]

    handle = model.register_forward_hook(look, with_kwargs=True)
    guidance = 0.0 if name == "flux" else 1.0
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16} if name in ("sd3", "flux") else {}
    with torch.no_grad():
        pipe(PROMPTS, num_inference_steps=1, guidance_scale=guidance, output_type="latent", **sizes)
        handle.remove()
        noisy, answer, times = seen["noisy"], seen["answer"], seen["t"].expand(2).float()
        if name == "flux":
            noisy, answer = (pipe._unpack_latents(x, 16, 16, pipe.vae_scale_factor) for x in (noisy, answer))
            times = times * 1000
        ours = predict(pipe, noisy, times, encode_prompts(pipe, PROMPTS, sizes.get("max_sequence_length")), None)
    assert family_of(pipe) == ("sd" if name == "sd2" else name)
    assert torch.allclose(ours, answer, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_no_words_are_what_guidance_takes_for_none(zeros: bool, tmp_path: Path) -> None:
    """A dropped caption of SDXL is what its pipeline guides away from."""
    pipe = tiny_pipeline("sdxl", tmp_path)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, negative, _, negative_pooled = pipe.encode_prompt("a red hat", device="cpu")
    with torch.no_grad():
        ours = encode_prompts(pipe, ["", "a red hat"])
    assert torch.allclose(ours["hidden"][:1], negative, atol=1e-6) and ours["hidden"][1].any()
    assert torch.allclose(ours["pooled"][:1], negative_pooled, atol=1e-6) and ours["pooled"][1].any()
    assert bool(ours["hidden"][0].any()) is not zeros


@pytest.mark.parametrize("name", FAMILIES)
def test_training_moves_what_it_should_and_the_file_loads(
    name: str, family_run: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    result = train(family_run(name, train_text_encoder=True, gradient_checkpointing=True, validation_prompt="a dog"))
    tensors = load_file(result.adapter_path)
    moved = {key.split(".")[0] for key, value in tensors.items() if key.endswith("B_in") and value.any()}
    assert len(moved) == 1 + ENCODERS[name]
    info = load_adapter(open_pipeline(bases[name]), result.adapter_path)
    assert info.applied == info.total == len(tensors)
    assert list((result.adapter_path.parent / "samples").glob("*.png"))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_pipelines_resume_bit_for_bit(name: str, family_run: Any, tmp_path: Path) -> None:
    whole = train(family_run(name, checkpointing_steps=1)).adapter_path
    expected = load_file(whole)
    train(family_run(name, checkpointing_steps=1, resume_from_checkpoint=str(whole.parent / "checkpoints/step-1")))
    assert all(torch.equal(value, expected[key]) for key, value in load_file(whole).items())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_the_formula(shift: float) -> None:
    """``x_t = (1 - n) x + n e``, target ``e - x``, with the levels and timesteps of the scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = Objective.of(scheduler, 5.0)
    x, e, guess = torch.randn(3, 3, 4, 2, 2).unbind()
    t = torch.tensor([0, 400, 999])
    u = (t + 1) / 1000
    n = shift * u / (1 + (shift - 1) * u)
    assert torch.allclose(objective.times[t], scheduler.timesteps[999 - t], rtol=1e-5)
    weight = torch.minimum(((1 - n) / n) ** 2, torch.tensor(5.0)) * n**2
    n = n.view(-1, 1, 1, 1)
    assert torch.allclose(objective.add_noise(x, e, t), (1 - n) * x + n * e, atol=1e-6)
    expected = ((guess - (e - x)) ** 2).mean((1, 2, 3)) * weight
    assert torch.allclose(objective.losses(guess, objective.target(x, e, t), t), expected, rtol=1e-4, atol=1e-6)


def test_what_a_family_does_not_know_is_refused(family_run: Any) -> None:
    with pytest.raises(UserError, match=r"--class_labels_conditioning is only for Stable Diffusion 1.x"):
        train(family_run("sdxl", class_labels_conditioning="timesteps"))
    with pytest.raises(UserError, match="resolution=18 must be a multiple of 4"):
        train(family_run("flux").__class__(**{**family_run("flux").to_dict(), "resolution": 18}))
