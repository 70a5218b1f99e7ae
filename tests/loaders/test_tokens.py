"""New tokens in a pipeline: exact, gone without a trace, and in files of ours and of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from safetensors.torch import load_file, save_file

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    inspect_adapter,
    load_adapter,
    mix,
    mix_files,
    open_pipeline,
    overlap_files,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import nora
from nora_diffusion.cli import main
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.formats.pack_writing import create_pack, extract_from_pack
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.loaders.tokens import add_tokens, start_vectors

WIDTH = 16


def random_words(pipe: Any, words: dict[str, int], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """``{word: {encoder: vectors}}`` of ``words[word]`` vectors for the encoders that learn words."""
    source = torch.Generator().manual_seed(seed)
    parts = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    return {w: {part: torch.randn(n, WIDTH, generator=source) for part in parts} for w, n in words.items()}


def put(pipe: Any, name: str, words: dict[str, int], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter with random factors that moves the denoiser and brings random words."""
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
    source = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(pipe, name).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    vectors = random_words(pipe, words, seed)
    add_tokens(pipe, name, vectors)
    return vectors


def said(pipe: Any, prompt: str) -> list[torch.Tensor]:
    """All that the pipeline tells its denoiser of a prompt."""
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        return [value for value in pipe.encode_prompt(prompt=prompt, **asked) if value is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def written(pipe: Any, folder: Path, words: dict[str, int], seed: int = 0, **options: Any) -> Path:
    put(pipe, "one", words, seed)
    save_adapter(pipe, folder, "one", **options)
    delete_adapter(pipe, "one")
    return folder


def test_a_prompt_means_what_a_table_with_these_rows_says(pipe: Any, tiny_base: Path) -> None:
    """The oracle is diffusers' own textual inversion, which makes the table larger."""
    vectors = put(pipe, "dog", {"<pet>": 3, "<toy>": 1})
    stock = open_pipeline(tiny_base)
    for word, own in vectors.items():
        stock.load_textual_inversion({word: own["text_encoder"]}, token=word)
    for prompt in ("a photo of <pet> dog", "<toy>, <pet>", "a dog"):
        assert torch.allclose(said(pipe, prompt)[0], said(stock, prompt)[0], atol=1e-6), prompt
    assert not torch.equal(said(pipe, "a <pet>")[0], said(open_pipeline(tiny_base), "a <pet>")[0])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_deleting_leaves_no_trace(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path)
    parts = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    before = {part: dict(getattr(pipe, part).state_dict()) for part in parts}
    tokenizers = [getattr(pipe, part.replace("text_encoder", "tokenizer")) for part in parts]
    tables = [getattr(pipe, part).get_input_embeddings() for part in parts]
    prompts = ["a <pet> dog", "<toy>"]
    told = [said(pipe, prompt) for prompt in prompts]
    put(pipe, "dog", {"<pet>": 2}), put(pipe, "cat", {"<cat>": 1, "<toy>": 2}, 1), put(pipe, "hat", {"<hat>": 1}, 2)
    cat, hat = said(pipe, "<toy> <cat>"), said(pipe, "<hat>")
    assert not same(said(pipe, prompts[0]), told[0])
    delete_adapter(pipe, "dog")  # from under the others, whose ids move
    assert same(said(pipe, "<toy> <cat>"), cat) and same(said(pipe, "<hat>"), hat)
    assert same(said(pipe, prompts[0]), told[0])
    pipe.delete_adapters("cat")  # by diffusers' verb, which knows no words
    put(pipe, "cat", {"<toy>": 1})
    delete_adapter(pipe, "cat"), delete_adapter(pipe, "hat")
    assert [getattr(pipe, part.replace("text_encoder", "tokenizer")) for part in parts] == tokenizers
    assert all(t is getattr(pipe, part).get_input_embeddings() for t, part in zip(tables, parts, strict=True))
    for part in parts:
        after = getattr(pipe, part).state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(value, before[part][key]) for key, value in after.items())
    assert all(same(said(pipe, prompt), values) for prompt, values in zip(prompts, told, strict=True))


def test_the_end_of_a_prompt_is_found_by_old_configs_too(tmp_path: Path) -> None:
    """SDXL's encoders say ``eos_token_id=2``, by which CLIP pools at the largest id: a new token's, if there is one."""
    pipe = tiny_pipeline("sdxl", tmp_path)
    pooled = [m for m in pipe.text_encoder_2.modules() if hasattr(m, "eos_token_id")]
    for module in pooled:
        module.eos_token_id = 2
    plain = said(pipe, "a photo of a dog")
    vectors = put(pipe, "dog", {"<pet>": 1})
    assert same(said(pipe, "a photo of a dog"), plain)
    table, word = pipe.text_encoder_2.get_input_embeddings().weight, pipe.tokenizer("cat").input_ids[1]
    told = said(pipe, "a <pet> on the beach")[-1]
    delete_adapter(pipe, "dog")
    assert {module.eos_token_id for module in pooled} == {2}
    for part in ("text_encoder", "text_encoder_2"):  # an old word in the new one's place
        getattr(pipe, part).get_input_embeddings().weight.data[word] = vectors["<pet>"][part][0]
    assert table.data_ptr() == pipe.text_encoder_2.get_input_embeddings().weight.data_ptr()
    assert torch.allclose(said(pipe, "a cat on the beach")[-1], told, atol=1e-6)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_file_brings_its_words(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path / "base")
    vectors = put(pipe, "one", {"<pet>": 2, "<toy>": 1})
    told = said(pipe, "<pet> and <toy>")
    save_adapter(pipe, tmp_path / "dog", "one", info={"trigger": "<pet>"})
    delete_adapter(pipe, "one")
    info = inspect_adapter(tmp_path / "dog")
    assert info.tokens == {word: list(own) for word, own in vectors.items()}
    loaded = load_adapter(pipe, tmp_path / "dog", "again")
    assert loaded.applied == loaded.total and same(said(pipe, "<pet> and <toy>"), told)
    set_adapters(pipe, [])  # a word has no weight
    assert same(said(pipe, "<pet> and <toy>"), told)
    save_adapter(pipe, tmp_path / "copy", "again")
    first, second = (load_file(tmp_path / place / FILE_NAME) for place in ("dog", "copy"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_numbers_are_swapped_in_place(pipe: Any, tmp_path: Path) -> None:
    one, other = (written(pipe, tmp_path / str(seed), {"<pet>": 2}, seed) for seed in (1, 2))
    load_adapter(pipe, other, "dog")
    told = said(pipe, "<pet>")
    delete_adapter(pipe, "dog")
    load_adapter(pipe, one, "dog")
    assert not same(said(pipe, "<pet>"), told)
    load_adapter(pipe, other, "dog", hotswap=True)
    assert same(said(pipe, "<pet>"), told)
    delete_adapter(pipe, "dog")
    for number, (words, sentence) in enumerate(
        (({"<cat>": 2}, "its new tokens are <cat>"), ({"<pet>": 1}, r"is \[1, 16\]"), ({}, "are none"))
    ):
        elsewhere = written(pipe, tmp_path / f"other{number}", words)
        load_adapter(pipe, one, "dog")
        told = said(pipe, "<pet>")
        with pytest.raises(UserError, match=sentence):
            load_adapter(pipe, elsewhere, "dog", hotswap=True)
        assert same(said(pipe, "<pet>"), told)
        delete_adapter(pipe, "dog")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_exports_are_a_lora_and_textual_inversions(name: str, tmp_path: Path) -> None:
    """A stock pipeline that loads both is told, and makes, the same."""
    pipe = tiny_pipeline(name, tmp_path / "base")
    pipe.save_pretrained(tmp_path / "base")
    put(pipe, "one", {"<pet>": 2, "<toy>": 1})
    prompt = "<pet> with <toy>"
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    wanted = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images
    save_adapter(pipe, tmp_path / "dog", "one")
    report = export_lora(tmp_path / "dog", tmp_path / "out" / "dog_lora.safetensors")
    assert [file.name for file in report.embeddings] == ["dog_lora_emb_pet.safetensors", "dog_lora_emb_toy.safetensors"]
    assert "<pet> in dog_lora_emb_pet.safetensors" in report.note
    stock = open_pipeline(tmp_path / "base")
    stock.load_lora_weights(report.path)
    for word, file in zip(("<pet>", "<toy>"), report.embeddings, strict=True):
        vectors = load_file(file)
        assert set(vectors) == ({"emb_params"} if name == "sd1" else {"clip_l", "clip_g"})
        for key, tail in zip(("emb_params",) if name == "sd1" else ("clip_l", "clip_g"), ("", "_2"), strict=False):
            stock.load_textual_inversion(
                {word: vectors[key]}, token=word, text_encoder=getattr(stock, f"text_encoder{tail}"),
                tokenizer=getattr(stock, f"tokenizer{tail}"),
            )  # fmt: skip
        assert inspect_adapter(file).kind == "textual inversion"
    found = stock(prompt, generator=torch.Generator().manual_seed(0), **settings).images
    assert abs(found - wanted).max() < 1e-4
    folder = export_lora(tmp_path / "dog", tmp_path / "peft", format="peft")
    assert all(file.is_file() and file.parent == tmp_path / "peft" for file in folder.embeddings)


def test_packs_hold_words_and_mixes_refuse_them(pipe: Any, tmp_path: Path) -> None:
    dog = written(pipe, tmp_path / "dog", {"<pet>": 2}, basis="shared", info={"trigger": "<pet>"})
    cat = written(pipe, tmp_path / "cat", {}, 1, basis="shared")
    pack = create_pack(tmp_path / "pets.nora_pack.safetensors", [dog, cat])
    load_adapter(pipe, dog, "dog")
    told = said(pipe, "a <pet>")
    delete_adapter(pipe, "dog")
    assert load_adapter(pipe, f"{pack}#dog", "dog").info.tokens == {"<pet>": ["text_encoder"]}
    assert same(said(pipe, "a <pet>"), told)
    assert load_adapter(pipe, f"{pack}#cat", "cat").info.tokens == {}
    first, second = load_file(dog / FILE_NAME), load_file(extract_from_pack(pack, "dog", tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(UserError, match=r"'dog' has new tokens \(<pet>\), which cannot be mixed"):
        mix(pipe, {"dog": 0.5, "cat": 0.5})
    with pytest.raises(UserError, match="has new tokens"):
        mix_files([(dog, 0.5), (cat, 0.5)], tmp_path / "mix")
    assert 0 <= overlap_files(dog, cat).score <= 1


def test_a_word_is_there_once(pipe: Any, tiny_base: Path, tmp_path: Path) -> None:
    dog = written(pipe, tmp_path / "dog", {"<pet>": 2})
    load_adapter(pipe, dog, "one")
    with pytest.raises(UserError, match="the word '<pet>' is in the pipeline already"):
        load_adapter(pipe, dog, "two")
    with pytest.raises(UserError, match="one is part of the other"):
        put(pipe, "two", {"<pet>_1x": 1})
    delete_adapter(pipe, "two")
    pipe.load_textual_inversion({"<toy>": torch.randn(WIDTH)}, token="<toy>")
    told = said(pipe, "<pet> <toy>")
    with pytest.raises(UserError, match="got or lost a textual inversion after the new tokens"):
        delete_adapter(pipe, "one")
    assert same(said(pipe, "<pet> <toy>"), told)  # all as it was
    fresh = open_pipeline(tiny_base)
    fresh.load_textual_inversion({"<toy>": torch.randn(WIDTH)}, token="<toy>")
    told = said(fresh, "<pet> <toy>")
    load_adapter(fresh, dog, "one")
    assert not same(said(fresh, "<pet> <toy>"), told)
    delete_adapter(fresh, "one")
    assert same(said(fresh, "<pet> <toy>"), told)


def test_files_that_lie_about_their_words_are_refused(pipe: Any, tmp_path: Path) -> None:
    folder = written(pipe, tmp_path / "dog", {"<pet>": 2})
    from safetensors import safe_open

    with safe_open(folder / FILE_NAME, "pt") as reader:
        header = reader.metadata()["nora"]
    tensors = load_file(folder / FILE_NAME)
    key, good = "tokens.0.text_encoder", '{"<pet>":["text_encoder"]}'
    lies = {
        header.replace(good, '{"a b":["text_encoder"]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":["unet"]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":[]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":["text_encoder_2"]}'): "'text_encoder_2' is not a component of",
        header.replace(good, '{"<pet>":["text_encoder"],"<x>":["text_encoder"]}'): "its own description at tokens.1",
        header.replace(f'"tokens":{good},', ""): "its own description at tokens.0",
        header.replace(good, '{"dog":["text_encoder"]}'): "is a word that the tokenizer has already",
        header.replace('"format_version":2', '"format_version":3'): "newer|upgrade",
    }
    for text, sentence in lies.items():
        assert text != header
        save_file(tensors, folder / FILE_NAME, {"nora": text})
        with pytest.raises(UserError, match=sentence):
            load_adapter(pipe, folder, "dog")
    shapes = {
        "wide": (torch.zeros(2, 8), "made for the base"), "flat": (torch.zeros(16), "its own description"),
        "none": (torch.zeros(0, 16), "1 to 64 vectors"), "many": (torch.zeros(65, 16), "1 to 64 vectors"),
        "nan": (torch.full((2, 16), float("nan")), "holds NaN"),
    }  # fmt: skip
    for value, sentence in shapes.values():
        save_file({**tensors, key: value}, folder / FILE_NAME, {"nora": header})
        with pytest.raises(UserError, match=sentence):
            load_adapter(pipe, folder, "dog")
    assert "<pet>" not in pipe.tokenizer.get_vocab()


def test_words_start_from_what_they_are_like(pipe: Any) -> None:
    table, ids = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer("red hat with dog").input_ids[1:-1]
    noise = torch.randn(2, WIDTH)
    assert torch.equal(start_vectors(pipe, "text_encoder", 3, "red hat", noise), table[[ids[0], ids[1], ids[0]]])
    halves = torch.stack([table[ids[:2]].mean(0), table[ids[2:]].mean(0)])
    assert torch.allclose(start_vectors(pipe, "text_encoder", 2, "red hat with dog", noise), halves)
    assert torch.allclose(start_vectors(pipe, "text_encoder", 2, None, noise), noise * table.std())


def test_the_commands(pipe: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(written(pipe, tmp_path / "dog", {"<pet>": 2}, info={"trigger": "<pet>"}))
    assert main(["inspect", folder]) == 0
    assert "new tokens       <pet> (text_encoder)" in capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "out" / "dog.safetensors")]) == 0
    assert "<pet> in dog_emb_pet.safetensors" in capsys.readouterr().out
    small = ["--base", str(tiny_base), "--width", "16", "--height", "16", "--steps", "2", "--adapter", folder]
    assert main(["generate", "--prompt", "a <pet> on the beach", *small, "--out", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
