"""Two subjects in one image: where each adapter acts, what is refused, and when a prompt names two subjects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from diffusers import SD3Transformer2DModel
from factories import randomize
from torch import Tensor, nn

from nora_diffusion import UserError, add_adapter, lora, nora, open_pipeline, set_adapters, subjects_apart
from nora_diffusion.adapters import NoraLayer
from nora_diffusion.generation.apart import find_words, subjects_in, why_not, words_in
from nora_diffusion.generation.regions import SHARPNESS, AttentionMaps, grid

PROMPT = "a sks dog on the toy cat"
SUBJECTS = {"dog": "sks dog", "cat": "toy cat"}
LEFT = (torch.arange(8) < 4).double().expand(8, 8)
Seen = dict[str, list[tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def pair(tiny_base: Path) -> Any:
    """A pipeline with two adapters on one basis, and a LoRA for a style, in UNet and text encoder."""
    pipe: Any = open_pipeline(tiny_base)
    targets = ["attn", "ff", "proj", "conv"]
    for seed, name in enumerate(("dog", "cat", "style")):
        config = lora(r=2) if name == "style" else nora(r=4, inner_r=2, basis="svd", target_modules=targets)
        add_adapter(pipe, config, name, ("unet", "text_encoder"))
        randomize(pipe, name, seed)
    for module in (pipe.unet, pipe.text_encoder):
        module.double()
    set_adapters(pipe, ["dog", "cat", "style"], [0.5, 1.0, 1.0])
    return pipe


@contextmanager
def watching(module: nn.Module) -> Iterator[Seen]:
    """Inputs and outputs of each adapted layer, by path."""
    seen: Seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, path=path: seen.setdefault(path, []).append((x[0], y)))
        for path, layer in module.named_modules()
        if isinstance(layer, NoraLayer)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def draw(pipe: Any, prompt: str | list[str] = PROMPT, steps: int = 1, **more: Any) -> Tensor:
    """Latents."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts) * more.get("num_images_per_prompt", 1))]
    latents = torch.stack([torch.randn(4, 8, 8, generator=seed, dtype=torch.float64) for seed in seeds])
    found: Tensor = pipe(prompts, num_inference_steps=steps, output_type="latent", latents=latents, **more).images
    return found


def formula(layer: NoraLayer, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """``W x + sum_k m_k s_k dW_k x``; masks are ``[n, positions]`` or a number."""
    y: Tensor = layer.base_layer(x)
    for name in layer.nora_delta:
        weight = layer.get_delta_weight(name).double()
        base: Any = layer.base_layer
        is_conv = isinstance(base, nn.Conv2d)
        dy = nn.functional.conv2d(x, weight, None, base.stride, base.padding) if is_conv else x @ weight.T
        mask = masks[name]
        if mask.ndim:
            mask = mask.view(len(x), 1, *dy.shape[2:]) if is_conv else mask.unsqueeze(-1)
        y = y + mask * dy
    return y


def words_of(rows: list[list[int]]) -> dict[str, Tensor]:
    """The masks of the words by hand: begin, a, sks, dog, on, the, toy, cat, end."""
    own = {"dog": [2, 3], "cat": [6, 7]}
    return {
        name: torch.tensor([[float(i in places and bool(row)) for i in range(16)] for row in rows]).double()
        for name, places in own.items()
    } | {"style": torch.tensor(1.0).double()}


@torch.no_grad()
def test_each_adapter_acts_on_its_words_and_in_its_region(pair: Any) -> None:
    """Every layer against the dense formula, negative rows and two images per prompt included."""
    regions = {"dog": LEFT, "cat": 1 - LEFT}
    with watching(pair.unet) as seen, watching(pair.text_encoder) as read, subjects_apart(pair, SUBJECTS, regions):
        draw(pair, num_images_per_prompt=2)
    checked = {"text": 0, "image": 0}
    for path, calls in seen.items():
        layer, (x, y) = pair.unet.get_submodule(path), calls[0]
        is_text = ".attn2.to_k" in path or ".attn2.to_v" in path
        if is_text:
            masks = words_of([[], [], [1], [1]])
        else:
            tokens = y.shape[2] * y.shape[3] if y.ndim == 4 else y.shape[1]
            side = int(tokens**0.5)
            left = (torch.arange(tokens) % side < side / 2).double().expand(4, -1)
            masks = {"dog": left, "cat": 1 - left, "style": torch.tensor(1.0)}
        torch.testing.assert_close(y, formula(layer, x, masks), rtol=1e-6, atol=1e-6)
        checked["text" if is_text else "image"] += 1
    assert min(checked.values()) > 3
    for path, calls in read.items():  # the prompt, then the empty negative one
        for rows, (x, y) in zip(([[1]], [[]]), calls, strict=True):
            expected = formula(pair.text_encoder.get_submodule(path), x, words_of(rows))
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_pipeline_is_as_before_afterwards(pair: Any) -> None:
    before = draw(pair)
    with subjects_apart(pair, SUBJECTS):
        apart = draw(pair, steps=4)
    assert torch.equal(draw(pair), before)
    assert not torch.equal(apart, draw(pair, steps=4))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(pair: Any) -> None:
    """Regions and words are those of each image, whatever the other prompts are."""
    prompts = [PROMPT, "red toy cat with a sks dog"]
    with subjects_apart(pair, SUBJECTS):
        together = draw(pair, prompts, steps=5)
        alone = draw(pair, prompts[0], steps=5)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-6, atol=1e-6)


def test_regions_follow_the_attention() -> None:
    """Two layers of different resolution, against the softmax spelled out."""
    torch.manual_seed(0)
    maps, latents = AttentionMaps(), (16, 16)
    words = {"dog": torch.tensor([[0.0, 1, 1, 0, 0]] * 2), "cat": torch.tensor([[0.0, 0, 0, 1, 0]] * 2)}
    maps.start(latents, words)
    expected: dict[str, Tensor] = {"dog": torch.zeros(2, 16, 16), "cat": torch.zeros(2, 16, 16)}
    for side in (16, 8):
        layer = SimpleNamespace(heads=2, scale=0.5, to_q=nn.Linear(6, 8), to_k=nn.Linear(6, 8))
        undo = maps.watch(layer)
        q, k = layer.to_q(torch.randn(4, side * side, 6)), layer.to_k(torch.randn(4, 5, 6))
        for step in undo:
            step()
        for head in (slice(0, 4), slice(4, 8)):
            attended = (0.5 * q[2:, :, head] @ k[2:, :, head].transpose(1, 2)).softmax(-1)
            for name, mask in words.items():
                own = (attended * mask[:, None]).sum(-1).view(2, 1, side, side) / 2
                expected[name] += nn.functional.interpolate(own, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    relative = {name: own / own.mean((1, 2), keepdim=True) for name, own in expected.items()}
    powers = {name: own**SHARPNESS for name, own in relative.items()}
    found = maps.regions()
    for name in words:
        torch.testing.assert_close(found[name], powers[name] / (powers["dog"] + powers["cat"]))
    maps.clear()
    assert maps.regions() == {}


def test_grids_of_odd_sizes() -> None:
    assert [grid((65, 48), n) for n in (65 * 48, 33 * 24, 17 * 12, 100)] == [(65, 48), (33, 24), (17, 12), None]


def test_words_are_found_wherever_they_stand() -> None:
    ids = torch.tensor([[1, 5, 6, 5, 6, 2], [5, 1, 6, 2, 2, 5]])
    assert find_words(ids, [5, 6]).tolist() == [[0, 1, 1, 1, 1, 0], [0] * 6]
    assert find_words(ids, [5]).tolist() == [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks dog and a zwx cat", {"one": "sks dog", "two": "zwx cat"}),
        ("zwx, sks dogs", {"one": "sks", "two": "zwx"}),
        ("a sks dog", {}),
        ("a sks dog and a sks cat", {}),
    ],
)
def test_words_of_subjects(prompt: str, expected: dict[str, str]) -> None:
    adapters = {"one": ("sks", "dog"), "two": ("zwx", "cat"), "style": ("", "")}
    assert subjects_in(prompt, adapters) == expected


def test_one_trigger_with_two_classes_is_told_apart() -> None:
    adapters = {"one": ("sks", "dog"), "two": ("sks", "cat")}
    assert subjects_in("a sks dog and a sks cat", adapters) == {"one": "sks dog", "two": "sks cat"}
    assert subjects_in("a sks and a sks cat", adapters) == {}


@pytest.mark.parametrize(
    ("subjects", "regions", "message"),
    [
        ({"dog": "sks dog", "other": "toy cat"}, None, "'other' is no adapter"),
        ({"dog": "sks dog", "cat": " "}, None, "words of 'cat'"),
        (SUBJECTS, {"dog": LEFT}, "regions are given for"),
        (SUBJECTS, {"dog": LEFT, "cat": 2 * LEFT}, "region of 'cat'"),
    ],
)
def test_refusals(pair: Any, subjects: dict[str, str], regions: Any, message: str) -> None:
    with pytest.raises(UserError, match=message), subjects_apart(pair, subjects, regions):
        pass


def test_a_prompt_without_a_subject_is_refused(pair: Any) -> None:
    with subjects_apart(pair, SUBJECTS), pytest.raises(UserError, match="does not name the subject of 'cat'"):
        draw(pair, "a sks dog in snow")


@torch.no_grad()
def test_two_text_encoders_and_an_image_that_is_not_square(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sdxl", tmp_path)
    for seed, name in enumerate(SUBJECTS):
        add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), name, ("unet", "text_encoder", "text_encoder_2"))
        randomize(pipe, name, seed)
    set_adapters(pipe, list(SUBJECTS))

    def sdxl() -> Tensor:
        generator, shape = torch.Generator().manual_seed(0), {"height": 24, "width": 16}
        found: Tensor = pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=generator, **shape).images
        return found

    plain = sdxl()
    with subjects_apart(pipe, SUBJECTS):
        assert not torch.allclose(sdxl(), plain, atol=1e-3)
    assert torch.equal(sdxl(), plain)


def test_joint_attention_is_refused() -> None:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    )  # fmt: skip
    problem = why_not({"transformer": model}, ["dog"])
    assert problem is not None
    assert "Stable Diffusion 1, 2 and XL" in problem


def test_words_of_a_new_token_are_all_its_vectors(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline expands a token with several vectors in prompts; so do the words that are searched for."""
    monkeypatch.setattr(
        pair, "maybe_convert_prompt", lambda texts, _: [text.replace("sks", "sks toy") for text in texts], raising=False
    )
    found = words_in(pair, ["a sks dog"], {"dog": "sks dog"})
    assert found["dog"].tolist() == [[0.0, 0, 1, 1, 1] + [0.0] * 11]
