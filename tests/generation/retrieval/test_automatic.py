"""``generate --auto``: adapters for prompts without tags, how they act, and settings that repeat the image."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from nora_diffusion import UserError, add_adapter, delete_adapter, lora, mor, open_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.formats.adapter_file import inspect_adapter
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.generation.generate import GenerateConfig, generate
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.library import NamedAdapter, list_library
from nora_diffusion.generation.retrieval import retriever as retrieval
from nora_diffusion.generation.retrieval.automatic import Choice, choose, with_triggers
from nora_diffusion.generation.retrieval.retriever import Retriever
from nora_diffusion.generation.retrieval.settings import Auto
from nora_diffusion.generation.retrieval.usable import usable
from nora_diffusion.generation.retrieval.words import is_content, phrases
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.base import BaseSource


def save_random(pipe: Any, folder: Path, config: Any, **info: Any) -> None:
    add_adapter(pipe, config, "fresh", ("unet",))
    for parameter in trainable_parameters(pipe, "fresh").values():
        parameter.data.normal_(std=0.3)
    save_adapter(pipe, folder, "fresh", info=info)
    delete_adapter(pipe, "fresh")


class WordVectors:
    """Texts as counts of their content words: what suits a prompt must not depend on random weights."""

    def __init__(self, pipe: Any) -> None:
        self.size = 512

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), self.size)
        for row, text in zip(rows, texts, strict=True):
            for phrase in phrases(text):
                for word in filter(is_content, phrase.words):
                    row[zlib.crc32(word.encode()) % self.size] += phrase.weight
        return torch.nn.functional.normalize(rows, dim=1)

    def key(self) -> str:
        return "counts of words"


@pytest.fixture(scope="module", autouse=True)
def words() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "TextEmbedding", WordVectors)
        yield


@pytest.fixture(scope="module")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two subjects, one with a router, one of another base, one of another tool and a broken file."""
    folder = tmp_path_factory.mktemp("library")
    pipe: Any = open_pipeline(tiny_base)
    save_random(pipe, folder / "rex", lora(r=2), trigger="sks", class_word="dog", prompts=["a sks dog on the beach"])
    save_random(pipe, folder / "tom", lora(r=2), trigger="sks", class_word="cat", prompts=["a sks cat in snow"])
    save_random(pipe, folder / "hat", mor(r=2), trigger="zwx", class_word="hat", prompts=["a zwx hat"])
    other: Any = tiny_pipeline("sd2", tmp_path_factory.mktemp("other"))
    save_random(other, folder / "stranger", lora(r=2), class_word="dog")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for name, inputs in (("red_toy", 16), ("wide_toy", 24)):
        factors = {f"{layer}.lora_A.weight": torch.randn(2, inputs), f"{layer}.lora_B.weight": torch.randn(8, 2)}
        save_file(factors, folder / f"{name}.safetensors", {"ss_tag_frequency": '{"3_toy": {"red toy": 3, "toy": 5}}'})
    save_file({"emb_params": torch.randn(1, 16)}, folder / "word.safetensors")
    (folder / "broken.safetensors").write_bytes(b"<html>")
    return folder


@pytest.fixture(scope="module")
def fitting(opened: Any, library: Path) -> list[NamedAdapter]:
    return usable(opened, list_library(library))[0]


@pytest.fixture(scope="module")
def retriever(opened: Any) -> Retriever:
    return Retriever(opened)


def make(base: Path, out: Path, *prompts: str, **more: Any) -> list[Path]:
    sampling = Sampling(1, 7.5, width=16, height=16)
    return generate(GenerateConfig(list(prompts), sampling, BaseSource(str(base)), seed=3, out=str(out), **more))


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def test_adapters_that_the_base_cannot_use_are_left_out(opened: Any, library: Path) -> None:
    found, notes = usable(opened, list_library(library))
    assert {adapter.name: adapter.info and adapter.info.kind for adapter in found} == {
        "rex": "nora", "tom": "nora", "hat": "nora", "red_toy": "diffusers LoRA",
    }  # fmt: skip
    reasons = dict(note.split(" is left out: ", 1) for note in notes)
    assert set(reasons) == {"stranger", "wide_toy", "word", "broken"}
    assert "different" in reasons["stranger"] and "24 inputs, this base's has 16" in reasons["wide_toy"]
    assert "has its token" in reasons["word"]
    assert {a.name: a.info.prompts for a in found if a.info and not a.info.is_ours} == {"red_toy": ["toy, red toy"]}


def test_the_whole_library_is_of_another_base(library: Path, tmp_path: Path) -> None:
    named = [a for a in list_library(library) if a.name in ("rex", "tom")]
    found, notes = usable(tiny_pipeline("sdxl", tmp_path), named)
    assert found == [] and len(notes) == 3 and notes[-1].startswith("no adapter of the library was made for ")


def test_weights_of_the_modes(retriever: Retriever, fitting: list[NamedAdapter]) -> None:
    def weights(mode: Any, prompt: str, k: int = 2) -> dict[str, float]:
        choice = choose(retriever, Auto(k, mode), fitting, prompt)
        assert all(tag.unet == tag.te for tag in choice.active.values())
        return {adapter.name: tag.unet for adapter, tag in choice.active.items()}

    both = "a cat and a dog"
    assert weights("mixture", both) == weights("fusion", both) == {"tom": 0.5, "rex": 0.5}
    assert weights("mixture", both, 1) in ({"tom": 1}, {"rex": 1})
    assert weights("selection", both) == weights("mixture", both, 1)
    assert weights("mixture", "a cat, a hat") == {"tom": 0.5, "hat": 0.5}
    assert weights("fusion", "a hat", 1) == {"hat": 1}
    with pytest.raises(UserError, match=r"hat, one of the chosen adapters, has a router .* --auto_mode mixture"):
        weights("fusion", "a cat, a hat")


def test_images_repeat_without_auto(tiny_base: Path, library: Path, tmp_path: Path) -> None:
    """A prompt with tags keeps exactly these; the settings of a file name prompt, adapters and weights."""
    told: list[Choice] = []
    tagged = "a dog <lora:hat:0.3>"
    one, two = make(
        tiny_base, tmp_path / "auto", "a cat and a dog", tagged, library=str(library), auto=Auto(2), report=told.append,
    )  # fmt: skip
    assert [choice.prompt for choice in told] == ["a sks cat and a sks dog"]
    assert "tom (score 0." in str(told[0]) and "weight 0.5" in str(told[0])
    settings = read_settings(one)
    assert settings.prompt == told[0].prompt
    assert {(a["name"], a["weight"]) for a in settings.adapters} == {("tom", 0.5), ("rex", 0.5)}
    written = settings.prompt + "".join(f" <lora:{a['name']}:{a['weight']}>" for a in settings.adapters)
    again, same, plain = make(tiny_base, tmp_path / "again", written, tagged, told[0].prompt, library=str(library))
    assert pixels(one) == pixels(again) != pixels(plain) and pixels(two) == pixels(same)


def test_mean_of_outputs(opened: Any, tiny_base: Path, library: Path, tmp_path: Path) -> None:
    """A mixture with a router acts as its adapters at 1/2 each, given by path."""
    (auto,) = make(tiny_base, tmp_path / "auto", "a cat, a hat", library=str(library), auto=Auto(2))
    settings = read_settings(auto)
    given = [f"{library / values['name']}:0.5" for values in settings.adapters]  # the order matters for rounding
    assert {values["name"] for values in settings.adapters} == {"hat", "tom"}
    (same,) = make(tiny_base, tmp_path / "given", settings.prompt, adapters=given)
    (best,) = make(tiny_base, tmp_path / "best", "a cat", library=str(library), auto=Auto(2, "selection"))
    assert pixels(auto) == pixels(same) and [a["weight"] for a in read_settings(best).adapters] == [1]


def test_given_adapters_act_as_well(tiny_base: Path, library: Path, tmp_path: Path) -> None:
    found = make(
        tiny_base, tmp_path / "out", "a cat", "a photo", library=str(library), adapters=[f"{library / 'hat'}:0.2"],
        auto=Auto(1),
    )  # fmt: skip
    names = [{a["name"]: a["weight"] for a in read_settings(file).adapters} for file in found]
    assert names == [{"hat": 0.2, "tom": 1}, {"hat": 0.2}]


def test_command(
    tiny_base: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    out_folder = str(tmp_path / "out")
    small = ["--base", str(tiny_base), "--steps", "1", "--width", "16", "--height", "16", "--out", out_folder]
    with caplog.at_level(logging.WARNING):
        code = main(
            ["generate", "--prompt", "a dog in snow", "--prompt", "a photo", "--library", str(library), "--auto", "2",
             *small]
        )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0 and len(out.splitlines()) == 2  # files only, for scripts
    assert "chosen for 'a sks dog in snow': rex (score 0." in err
    assert "no adapter of the library suits 'a photo': it is generated without one" in err
    assert "stranger is left out" in caplog.text
    for flags, message in (
        (["--auto", "2"], "--auto chooses among the adapters of a library: give its folder as --library"),
        (["--auto", "0", "--library", str(library)], "auto"),
    ):
        assert main(["generate", "--prompt", "a dog", *small, *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a Dog and a cat", "a sks Dog and a cat"),
        ("a sks dog", "a sks dog"),
        ("dogs in snow", "dogs in snow"),
        ("", ""),
    ],
)
def test_triggers_stand_before_class_words(prompt: str, expected: str) -> None:
    infos = [
        AdapterInfo({}, trigger="sks", class_word="dog"), AdapterInfo({}, trigger="zwx"), AdapterInfo({}),
        AdapterInfo({}, trigger="a, b", class_word="cat, dog"),
    ]  # fmt: skip
    assert with_triggers(prompt, infos) == expected
    assert with_triggers(prompt, [*infos, *infos]) == expected


def test_two_subjects_with_one_trigger_and_odd_characters() -> None:
    infos = [AdapterInfo({}, trigger=r"\1", class_word="c++"), AdapterInfo({}, trigger=r"\1", class_word="cat")]
    assert with_triggers("a c++ book with a cat", infos) == r"a \1 c++ book with a \1 cat"


def test_another_tools_damaged_tags(tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(8, 2)}
    for number, text in enumerate(("{", "[]", '{"a": {"b": "c"}}', '{"a": {"b": NaN}}', '{"a": 3}')):
        metadata = {"ss_tag_frequency": text, "modelspec.usage_hint": "a red\ntoy"}
        save_file(factors, file := tmp_path / f"{number}.safetensors", metadata)
        assert inspect_adapter(file).prompts == ["a red toy"]
