"""Pivotal tuning: new tokens are trained, saved in the adapter file and deleted with the adapter."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from runs import Configure
from safetensors import safe_open
from safetensors.torch import load_file

from nora_diffusion import delete_adapter, inspect_adapter, load_adapter, open_pipeline
from nora_diffusion.errors import UserError
from nora_diffusion.training import train

TI: dict[str, Any] = {"train_text_encoder_ti": True, "instance_prompt": "a photo of <pet> dog", "token_lr": 0.05}
KEY = "tokens.0.text_encoder"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The following part of your input was")


def step_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step}/nora_adapter.safetensors")


def test_a_token_starts_from_the_class_word_and_is_trained_and_saved(configure: Configure, tiny_base: Path) -> None:
    folder = train(configure(**TI, checkpointing_steps=1, train_text_encoder_ti_frac=1.0)).adapter_path.parent
    pipe = open_pipeline(tiny_base)
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer("dog").input_ids[1]]
    first, last = step_of(folder, 1)[KEY], load_file(folder / "nora_adapter.safetensors")[KEY]
    assert last.shape == (2, 16) and not torch.equal(first, last)
    # AdamW's first step equals the learning rate, whatever the gradient. The two vectors have different positions.
    assert torch.allclose((first - start).abs(), torch.tensor(0.05), atol=1e-5) and not torch.equal(last[0], last[1])
    info = inspect_adapter(folder)
    assert info.tokens == {"<pet>": ["text_encoder"]} and info.trigger == "<pet>" and info.format_version == 2
    assert "`<pet>`" in (folder / "README.md").read_text()


def test_the_prompt_is_encoded_as_the_pipeline_encodes_it(
    configure: Configure, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last training step and a pipeline that loads the file have the same text embeddings."""
    from nora_diffusion.training.data.prompts import PromptEmbeddings

    seen: list[torch.Tensor] = []
    original = PromptEmbeddings.__call__
    monkeypatch.setattr(
        PromptEmbeddings, "__call__", lambda self, p: (seen.append(original(self, p)["hidden"]), original(self, p))[1]
    )
    folder = train(configure(**TI, checkpointing_steps=1)).adapter_path.parent
    assert not torch.equal(seen[0], seen[1])  # encoded again in each step
    pipe = open_pipeline(tiny_base)
    load_adapter(pipe, folder / "checkpoints/step-2", "dog")
    expected = pipe.encode_prompt("a photo of <pet> dog", "cpu", 1, False)[0]
    assert torch.allclose(seen[2][:1], expected, atol=1e-6)


def test_each_group_stops_at_its_fraction(configure: Configure) -> None:
    fractions = {"train_text_encoder_ti_frac": 0.5, "text_encoder_frac": 0.25, "denoiser_frac": 0.75}
    both = {"train_text_encoder": True, "max_train_steps": 4, "checkpointing_steps": 1}
    folder = train(configure(**TI, **fractions, **both)).adapter_path.parent
    steps = [step_of(folder, step) for step in (1, 2, 3, 4)]
    trained = [key for key in steps[0] if not key.endswith("_out")]
    for prefix, last in (("tokens.", 2), ("text_encoder.", 1), ("unet.", 3)):
        moved = [
            any(not torch.equal(a[key], b[key]) for key in trained if key.startswith(prefix))
            for a, b in itertools.pairwise(steps)
        ]
        assert moved == [step < last for step in (1, 2, 3)], prefix


@pytest.mark.parametrize(("name", "count"), [("sd2", 2), ("sdxl", 2), ("sd3", 1), ("flux", 2)])
def test_every_family_trains_tokens(name: str, count: int, configure: Configure, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_pipeline(name, tmp_path / "files").save_pretrained(base)
    length = {"sd3": 16, "flux": 16}.get(name)
    changes = {"resolution": 16, "tokenizer_max_length": length, "num_new_tokens_per_abstraction": count}
    config = configure(**TI, pretrained_model_name_or_path=str(base), **changes, validation_prompt="a <pet> dog")
    result = train(config)
    tensors = load_file(result.adapter_path)
    encoders = inspect_adapter(result.adapter_path).tokens["<pet>"]
    assert encoders == ["text_encoder", "text_encoder_2"][: 2 if name in ("sdxl", "sd3") else 1]
    pipe = open_pipeline(base)
    for encoder in encoders:
        table = getattr(pipe, encoder).get_input_embeddings().weight
        start = table[getattr(pipe, encoder.replace("text_encoder", "tokenizer"))("dog").input_ids[1]]
        assert not torch.allclose(tensors[f"tokens.0.{encoder}"], start.expand(count, -1), atol=1e-3), encoder
    loaded = load_adapter(pipe, result.adapter_path, "pet")
    assert loaded.applied == loaded.total == len(tensors)
    assert list((result.adapter_path.parent / "samples").glob("*.png"))
    delete_adapter(pipe, "pet")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "known": ({"instance_prompt": "a photo of sks dog"}, "'sks' is already a word of the tokenizer.* <sks>"),
    "no word": ({"instance_prompt": "a dog"}, "found no trigger to train"),
    "nowhere": ({"token_abstraction": ["<hat>"]}, "no caption contains the new token '<hat>'"),
    "inside": (
        {"token_abstraction": ["<pet>", "<pet>x"], "instance_prompt": "<pet> and <pet>x"}, "one contains the other"
    ),
    "alone": ({"train_text_encoder_ti": False}, "--token_lr needs --train_text_encoder_ti"),
    "fraction": ({"train_text_encoder_ti_frac": 1.5}, "is a fraction of the run"),
    "many": ({"num_new_tokens_per_abstraction": 65}, "=65 does not fit into the 16 tokens of a prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(changes: dict[str, Any], words: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=words):
        train(configure(**{**TI, **changes}))


def test_only_files_with_tokens_have_format_version_2(configure: Configure) -> None:
    with safe_open(train(configure(**TI)).adapter_path, "pt") as file:
        header = json.loads(file.metadata()["nora"])
    assert header["format_version"] == 2 and header["tokens"] == {"<pet>": ["text_encoder"]}
    with safe_open(train(configure(overwrite_output_dir=True)).adapter_path, "pt") as file:
        assert json.loads(file.metadata()["nora"])["format_version"] == 1


PROMPTS = (
    "a photo of <pet> dog", "<pet>", "<pet><pet>", "<pet> <pet>, <pet>", "a <pet>dog", "x<pet>y <petty>", "no token",
    "", "<Pet> dog", "<pet>'s ball", "a\n<pet>\tdog", "ünïcode <pet> 犬 🐕", "<petty> <pet>", "a " * 40 + "<pet>",
)  # fmt: skip


@pytest.mark.parametrize("vectors", [1, 2, 5])
@pytest.mark.parametrize("words", [["<pet>"], ["<pet>", "<petty>"]])
def test_the_length_of_a_prompt_counts_all_vectors_of_new_tokens(vectors: int, words: list[str], pipe: Any) -> None:
    """Before the tokens exist, the count is that of the tokenizer that has them."""
    from nora_diffusion.loaders.tokens import add_tokens, expanded
    from nora_diffusion.pipelines.components import components
    from nora_diffusion.training.data.prompts import truncated_prompts

    limits, counts = (5, 8, 12, 20, 60, 77, 90), dict.fromkeys(words, vectors)
    before = {p: [bool(truncated_prompts(pipe, [p], n, counts)) for n in limits] for p in PROMPTS}
    width = pipe.text_encoder.get_input_embeddings().embedding_dim
    add_tokens(pipe, components(pipe), "x", {word: {"text_encoder": torch.randn(vectors, width)} for word in words})
    for prompt in PROMPTS:
        (text,) = expanded(pipe, [prompt], pipe.tokenizer)
        real = len(pipe.tokenizer(text, truncation=False).input_ids)
        assert before[prompt] == [real > limit for limit in limits], prompt


def test_preflight_counts_them(configure: Configure) -> None:
    from nora_diffusion.training import check

    for vectors, is_cut in ((1, False), (14, True)):
        found = check(configure(**TI, num_new_tokens_per_abstraction=vectors))
        assert any("tokens, so their end is cut off" in finding.text for finding in found) == is_cut, vectors
    for vectors in (15, 10**9):
        with pytest.raises(UserError, match="does not fit into the 16 tokens of a prompt: choose at most 14"):
            check(configure(**TI, num_new_tokens_per_abstraction=vectors))
