"""Tags in the prompts of `generate`: which adapter acts on which image, its weight, and the settings in the file."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nora_diffusion import UserError, add_adapter, create_pack, lora, nora, open_pipeline, save_adapter
from nora_diffusion.formats.adapter_file import given_name
from nora_diffusion.formats.packs import SUFFIX
from nora_diffusion.generation.apart import kept_apart
from nora_diffusion.generation.generate import GenerateConfig, generate
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.library import NamedAdapter, find_adapter, list_library, name_adapters
from nora_diffusion.generation.sampling import check_lengths
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.generation.tags import Tag
from nora_diffusion.loaders import delete_adapter, trainable_parameters
from nora_diffusion.pipelines.base import BaseSource


@pytest.fixture(scope="module")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the adapters ``dog`` (a folder) and ``my hat`` (a file), both on UNet and text encoder."""
    pipe: Any = open_pipeline(tiny_base)
    folder = tmp_path_factory.mktemp("library")
    for name in ("dog", "hat"):
        add_adapter(pipe, lora(r=2), name, ("unet", "text_encoder"))
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=0.5)
        file = save_adapter(pipe, folder / name, name, info={"trigger": "sks"})
        delete_adapter(pipe, name)
    shutil.copy(file, folder / "my hat.safetensors")
    shutil.rmtree(folder / "hat")
    return folder


def images(base: Path, out: Path, *prompts: str, **more: Any) -> list[Path]:
    sampling = Sampling(1, 7.5, width=16, height=16)
    return generate(GenerateConfig(list(prompts), sampling, BaseSource(str(base)), seed=3, out=str(out), **more))


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def test_each_prompt_gets_the_adapters_it_names(tiny_base: Path, library: Path, tmp_path: Path) -> None:
    """A prompt with tags gives the same image as --adapter with these weights, whatever was generated before it."""
    tagged = images(
        tiny_base, tmp_path / "tags", "a dog <lora:dog:0.8> in snow", "a dog in snow",
        "<lora:my hat:0.5> a dog <lora:dog:0.8> in snow", "a dog in snow <lora:dog:unet=0.8:te=0.1>",
        library=str(library), num=2,
    )  # fmt: skip
    dog, hat = f"{library / 'dog'}:0.8", f"{library / 'my hat.safetensors'}:0.5"
    alone = [
        images(tiny_base, tmp_path / "alone", "a dog in snow", adapters=adapters, num=2)
        for adapters in ([dog], [], [dog, hat])
    ]
    assert [pixels(f) for f in tagged[:6]] == [pixels(f) for files in alone for f in files]
    assert len({pixels(f) for f in tagged}) == 8
    settings = [read_settings(f) for f in tagged[::2]]
    assert [s.prompt for s in settings] == ["a dog in snow"] * 4
    weights = [[(a["name"], a["weight"], a.get("te")) for a in s.adapters] for s in settings]
    assert weights == [[("dog", 0.8, None)], [], [("my hat", 0.5, None), ("dog", 0.8, None)], [("dog", 0.8, 0.1)]]
    assert all(len(a["sha256"]) == 64 and a["trigger"] == "sks" for s in settings for a in s.adapters)
    with Image.open(tagged[6]) as image:
        first = image.text["parameters"].splitlines()[0]  # type: ignore[attr-defined]
    assert first == "a dog in snow <lora:dog:unet=0.8:te=0.1>"


def test_a_tag_overrides_the_weight_of_a_given_adapter(tiny_base: Path, library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = images(
        tiny_base, out, "a dog", "a dog <lora:dog:0.3>", adapters=[f"{library / 'dog'}:0.8"], library=str(library)
    )
    assert [read_settings(f).adapters[0]["weight"] for f in files] == [0.8, 0.3]
    again = images(tiny_base, out, "a dog", adapters=[f"{library / 'dog'}:0.3"])
    assert pixels(files[1]) == pixels(again[0]) != pixels(files[0])


def test_a_textual_inversion_acts_where_a_prompt_has_its_token(tiny_base: Path, library: Path, tmp_path: Path) -> None:
    word = tmp_path / "qqq.safetensors"
    save_file({"emb_params": 5 * torch.randn(1, 16)}, word)
    given = [str(word), f"{library / 'dog'}:0.8"]
    with_word, without = images(tiny_base, tmp_path / "one", "a qqq", "a dog", adapters=given)
    plain, same = images(tiny_base, tmp_path / "two", "a qqq", "a dog", adapters=given[1:])
    assert pixels(without) == pixels(same) and pixels(with_word) != pixels(plain)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:dgo:1>", "<lora:dgo:1> names no known adapter: there is dog"),
        ("a <lora:dog:x>", "'x' in <lora:dog:x> is not a number"),
        ("<lora:dog:1>", "no prompt besides the tags"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(library: Path, tmp_path: Path, prompt: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        images(tmp_path / "no such base", tmp_path / "out", "fine", prompt, library=str(library))
    assert message in str(caught.value)


def test_a_tag_without_any_adapter_says_where_adapters_come_from() -> None:
    with pytest.raises(UserError, match="none was given"):
        find_adapter(Tag("dog"), [])


def test_subjects_of_packs_are_named_as_in_the_app(tiny_base: Path, tmp_path: Path, caplog: Any) -> None:
    pipe: Any = open_pipeline(tiny_base)
    for seed, name in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
        torch.manual_seed(seed)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=5.0)
        save_adapter(pipe, tmp_path / "made" / name, name, basis="shared")
        delete_adapter(pipe, name)
    shelf = tmp_path / "shelf"
    pack = create_pack(shelf / f"pets{SUFFIX}", [tmp_path / "made" / name for name in ("dog", "cat")])
    (shelf / f"broken{SUFFIX}").write_bytes(b"\0" * 100)
    known = list_library(shelf)
    assert [adapter.name for adapter in known] == ["pets#cat", "pets#dog"] and "broken" in caplog.text
    assert find_adapter(Tag("cat"), known) == find_adapter(Tag("pets#cat"), known) == known[0]
    assert find_adapter(Tag("cat"), [*known, NamedAdapter("cat", "a")]).path == "a"
    with pytest.raises(UserError, match="may mean"):
        find_adapter(Tag("cat"), [*known, NamedAdapter("zoo#cat", "a")])
    with pytest.raises(UserError, match="name the same adapter"):
        images(tiny_base, tmp_path / "no", "a <lora:dog:1> <lora:pets#dog:1>", library=str(shelf))
    long, short, none = images(
        tiny_base, tmp_path / "tags", "a dog <lora:pets#dog:0.8>", "a dog <lora:dog:0.8>", "a dog", library=str(shelf)
    )
    (alone,) = images(tiny_base, tmp_path / "alone", "a dog", adapters=[f"{pack}#dog:0.8"])
    assert pixels(long) == pixels(short) == pixels(alone) != pixels(none)


def test_names_of_adapters(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("out/dog", "user/dog", "out/dog.safetensors", library / "dog" / "nora_adapter.safetensors"):
        assert given_name(path) == "dog"
    assert given_name("pets.nora_pack.safetensors#cat") == "cat"
    monkeypatch.chdir(library / "dog")
    for path in (".", "nora_adapter.safetensors", "../dog", "../dog/nora_adapter.safetensors"):
        assert given_name(path) == "dog"
    assert [adapter.name for adapter in name_adapters([("user/a<b>:c", 1.0)])] == ["a_b__c"]
    assert [adapter.name for adapter in list_library(library)] == ["dog", "my hat"]
    with pytest.raises(UserError, match="is not a folder"):
        list_library(tmp_path / "nowhere")
    with pytest.raises(UserError, match="both named 'dog'"):
        name_adapters([("a/dog", 1.0), ("b/dog", 0.5)])
    with pytest.raises(UserError, match="may mean a or b"):
        find_adapter(Tag("dog"), [NamedAdapter("dog", "a"), NamedAdapter("dog", "b")])
    with pytest.raises(UserError, match="--library"):
        find_adapter(Tag("dog"), [])


@pytest.mark.parametrize("part", ["prompt", "negative"])
def test_a_prompt_that_no_encoder_reads_to_its_end_is_refused(tiny_base: Path, tmp_path: Path, part: str) -> None:
    """A pipeline would cut it off silently, and the file would claim all of it."""
    limit = open_pipeline(tiny_base).tokenizer.model_max_length - 2
    whole, long = "a " * limit, "a " * limit + "dog"
    assert len(images(tiny_base, tmp_path, whole)) == 1
    prompt, negative = (long, "") if part == "prompt" else ("a", long)
    config = GenerateConfig(
        ["a", prompt], Sampling(1, 7.5, negative, 16, 16), BaseSource(str(tiny_base)), out=str(tmp_path / "n")
    )
    with pytest.raises(UserError, match=rf"longer than the {limit} tokens that this base reads.*'dog'"):
        generate(config)
    assert not (tmp_path / "n").exists()


def test_the_encoder_that_reads_most_counts(tiny_base: Path) -> None:
    pipe = open_pipeline(tiny_base)
    pipe.text_encoder_2, pipe.tokenizer_2 = pipe.text_encoder, copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer_2.model_max_length = 200
    check_lengths(pipe, ["a " * 198])
    with pytest.raises(UserError, match="longer than the 198 tokens"):
        check_lengths(pipe, ["a " * 199])


def test_subjects_that_a_prompt_names_are_kept_apart(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two subjects by their triggers; not with the switch off, nor where the prompt names only one of them."""
    pipe: Any = open_pipeline(tiny_base)
    for name, trigger in (("dog", "sks"), ("hat", "toy")):
        add_adapter(pipe, lora(r=2), name)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=0.5)
        save_adapter(pipe, tmp_path / "library" / name, name, info={"trigger": trigger, "class_word": name})
        delete_adapter(pipe, name)
    prompts = ["a sks dog, a toy hat <lora:dog> <lora:hat>", "a sks dog, a hat <lora:dog> <lora:hat>"]
    apart, plain = (
        images(tiny_base, tmp_path / "out", *prompts, library=str(tmp_path / "library"), subjects_apart=switch)
        for switch in (True, False)
    )
    assert pixels(apart[0]) != pixels(plain[0])
    assert pixels(apart[1]) == pixels(plain[1])
    words = [[adapter.get("words") for adapter in read_settings(file).adapters] for file in (*apart, plain[0])]
    assert words == [["sks dog", "toy hat"], [None, None], [None, None]]
    with kept_apart(pipe, {"dog": "sks dog", "hat": "toy hat"}, prompts[:1]) as kept:
        assert not kept
    assert "the subjects may blend into each other: 'dog' is no adapter" in caplog.text
