"""New tokens in a pipeline: exact, fully removed, and in files of this toolkit and of other tools."""

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
from nora_diffusion.pipelines.components import components

WIDTH = 16


def random_tokens(pipe: Any, tokens: dict[str, int], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """``{token: {encoder: vectors}}`` with ``tokens[token]`` random vectors for each CLIP encoder."""
    source = torch.Generator().manual_seed(seed)
    components = [
        component for component in ("text_encoder", "text_encoder_2") if getattr(pipe, component, None) is not None
    ]
    return {
        w: {component: torch.randn(n, WIDTH, generator=source) for component in components} for w, n in tokens.items()
    }


def put(pipe: Any, name: str, tokens: dict[str, int], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Add an adapter with random factors in the denoiser and random new tokens."""
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
    source = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(pipe, name).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    vectors = random_tokens(pipe, tokens, seed)
    add_tokens(pipe, components(pipe), name, vectors)
    return vectors


def embeddings_of(pipe: Any, prompt: str) -> list[torch.Tensor]:
    """All text embeddings that the pipeline computes for a prompt."""
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        return [value for value in pipe.encode_prompt(prompt=prompt, **asked) if value is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def save_with_tokens(pipe: Any, folder: Path, tokens: dict[str, int], seed: int = 0, **options: Any) -> Path:
    put(pipe, "one", tokens, seed)
    save_adapter(pipe, folder, "one", **options)
    delete_adapter(pipe, "one")
    return folder


def test_prompts_equal_textual_inversion(pipe: Any, tiny_base: Path) -> None:
    """The reference is diffusers' textual inversion, which extends the embedding table."""
    vectors = put(pipe, "dog", {"<pet>": 3, "<toy>": 1})
    stock = open_pipeline(tiny_base)
    for word, own in vectors.items():
        stock.load_textual_inversion({word: own["text_encoder"]}, token=word)
    for prompt in ("a photo of <pet> dog", "<toy>, <pet>", "a dog"):
        assert torch.allclose(embeddings_of(pipe, prompt)[0], embeddings_of(stock, prompt)[0], atol=1e-6), prompt
    assert not torch.equal(embeddings_of(pipe, "a <pet>")[0], embeddings_of(open_pipeline(tiny_base), "a <pet>")[0])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_deleting_restores_the_encoders_and_tokenizers(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path)
    components = [
        component for component in ("text_encoder", "text_encoder_2") if getattr(pipe, component, None) is not None
    ]
    state = {component: dict(getattr(pipe, component).state_dict()) for component in components}
    tokenizers = [getattr(pipe, component.replace("text_encoder", "tokenizer")) for component in components]
    tables = [getattr(pipe, component).get_input_embeddings() for component in components]
    prompts = ["a <pet> dog", "<toy>"]
    before = [embeddings_of(pipe, prompt) for prompt in prompts]
    put(pipe, "dog", {"<pet>": 2}), put(pipe, "cat", {"<cat>": 1, "<toy>": 2}, 1), put(pipe, "hat", {"<hat>": 1}, 2)
    cat, hat = embeddings_of(pipe, "<toy> <cat>"), embeddings_of(pipe, "<hat>")
    assert not same(embeddings_of(pipe, prompts[0]), before[0])
    delete_adapter(pipe, "dog")  # the ids of the other tokens change
    assert same(embeddings_of(pipe, "<toy> <cat>"), cat) and same(embeddings_of(pipe, "<hat>"), hat)
    assert same(embeddings_of(pipe, prompts[0]), before[0])
    pipe.delete_adapters("cat")  # diffusers' function, which does not remove tokens
    put(pipe, "cat", {"<toy>": 1})
    delete_adapter(pipe, "cat"), delete_adapter(pipe, "hat")
    assert [getattr(pipe, component.replace("text_encoder", "tokenizer")) for component in components] == tokenizers
    assert all(
        t is getattr(pipe, component).get_input_embeddings() for t, component in zip(tables, components, strict=True)
    )
    for component in components:
        after = getattr(pipe, component).state_dict()
        assert after.keys() == state[component].keys()
        assert all(torch.equal(value, state[component][key]) for key, value in after.items())
    assert all(same(embeddings_of(pipe, prompt), values) for prompt, values in zip(prompts, before, strict=True))


def test_end_of_prompt_with_legacy_configs(tmp_path: Path) -> None:
    """SDXL's encoders have ``eos_token_id=2``: CLIP then pools at the largest id, which a new token would have."""
    pipe = tiny_pipeline("sdxl", tmp_path)
    pooled = [m for m in pipe.text_encoder_2.modules() if hasattr(m, "eos_token_id")]
    for module in pooled:
        module.eos_token_id = 2
    plain = embeddings_of(pipe, "a photo of a dog")
    vectors = put(pipe, "dog", {"<pet>": 1})
    assert same(embeddings_of(pipe, "a photo of a dog"), plain)
    table, word = pipe.text_encoder_2.get_input_embeddings().weight, pipe.tokenizer("cat").input_ids[1]
    before = embeddings_of(pipe, "a <pet> on the beach")[-1]
    delete_adapter(pipe, "dog")
    assert {module.eos_token_id for module in pooled} == {2}
    for component in ("text_encoder", "text_encoder_2"):  # put the vector on an existing token instead
        getattr(pipe, component).get_input_embeddings().weight.data[word] = vectors["<pet>"][component][0]
    assert table.data_ptr() == pipe.text_encoder_2.get_input_embeddings().weight.data_ptr()
    assert torch.allclose(embeddings_of(pipe, "a cat on the beach")[-1], before, atol=1e-6)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path / "base")
    vectors = put(pipe, "one", {"<pet>": 2, "<toy>": 1})
    before = embeddings_of(pipe, "<pet> and <toy>")
    save_adapter(pipe, tmp_path / "dog", "one", info={"trigger": "<pet>"})
    delete_adapter(pipe, "one")
    info = inspect_adapter(tmp_path / "dog")
    assert info.tokens == {word: list(own) for word, own in vectors.items()}
    loaded = load_adapter(pipe, tmp_path / "dog", "again")
    assert loaded.applied == loaded.total and same(embeddings_of(pipe, "<pet> and <toy>"), before)
    set_adapters(pipe, [])  # tokens have no weight
    assert same(embeddings_of(pipe, "<pet> and <toy>"), before)
    save_adapter(pipe, tmp_path / "copy", "again")
    first, second = (load_file(tmp_path / folder_name / FILE_NAME) for folder_name in ("dog", "copy"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_hotswap(pipe: Any, tmp_path: Path) -> None:
    one, other = (save_with_tokens(pipe, tmp_path / str(seed), {"<pet>": 2}, seed) for seed in (1, 2))
    load_adapter(pipe, other, "dog")
    before = embeddings_of(pipe, "<pet>")
    delete_adapter(pipe, "dog")
    load_adapter(pipe, one, "dog")
    assert not same(embeddings_of(pipe, "<pet>"), before)
    load_adapter(pipe, other, "dog", hotswap=True)
    assert same(embeddings_of(pipe, "<pet>"), before)
    delete_adapter(pipe, "dog")
    for number, (tokens, message) in enumerate(
        (({"<cat>": 2}, "its new tokens are <cat>"), ({"<pet>": 1}, r"is \[1, 16\]"), ({}, "are none"))
    ):
        elsewhere = save_with_tokens(pipe, tmp_path / f"other{number}", tokens)
        load_adapter(pipe, one, "dog")
        before = embeddings_of(pipe, "<pet>")
        with pytest.raises(UserError, match=message):
            load_adapter(pipe, elsewhere, "dog", hotswap=True)
        assert same(embeddings_of(pipe, "<pet>"), before)
        delete_adapter(pipe, "dog")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_exports_are_a_lora_and_textual_inversions(name: str, tmp_path: Path) -> None:
    """A plain diffusers pipeline that loads both generates the same image."""
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
    for token, file in zip(("<pet>", "<toy>"), report.embeddings, strict=True):
        vectors = load_file(file)
        assert set(vectors) == ({"emb_params"} if name == "sd1" else {"clip_l", "clip_g"})
        for key, tail in zip(("emb_params",) if name == "sd1" else ("clip_l", "clip_g"), ("", "_2"), strict=False):
            stock.load_textual_inversion(
                {token: vectors[key]}, token=token, text_encoder=getattr(stock, f"text_encoder{tail}"),
                tokenizer=getattr(stock, f"tokenizer{tail}"),
            )  # fmt: skip
        assert inspect_adapter(file).kind == "textual inversion"
    found = stock(prompt, generator=torch.Generator().manual_seed(0), **settings).images
    assert abs(found - wanted).max() < 1e-4
    folder = export_lora(tmp_path / "dog", tmp_path / "peft", format="peft")
    assert all(file.is_file() and file.parent == tmp_path / "peft" for file in folder.embeddings)


def test_packs_store_tokens_and_mixes_refuse_them(pipe: Any, tmp_path: Path) -> None:
    dog = save_with_tokens(pipe, tmp_path / "dog", {"<pet>": 2}, basis="shared", info={"trigger": "<pet>"})
    cat = save_with_tokens(pipe, tmp_path / "cat", {}, 1, basis="shared")
    pack = create_pack(tmp_path / "pets.nora_pack.safetensors", [dog, cat])
    load_adapter(pipe, dog, "dog")
    before = embeddings_of(pipe, "a <pet>")
    delete_adapter(pipe, "dog")
    assert load_adapter(pipe, f"{pack}#dog", "dog").info.tokens == {"<pet>": ["text_encoder"]}
    assert same(embeddings_of(pipe, "a <pet>"), before)
    assert load_adapter(pipe, f"{pack}#cat", "cat").info.tokens == {}
    first, second = load_file(dog / FILE_NAME), load_file(extract_from_pack(pack, "dog", tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(UserError, match=r"'dog' has new tokens \(<pet>\), which cannot be mixed"):
        mix(pipe, {"dog": 0.5, "cat": 0.5})
    with pytest.raises(UserError, match="has new tokens"):
        mix_files([(dog, 0.5), (cat, 0.5)], tmp_path / "mix")
    assert 0 <= overlap_files(dog, cat).score <= 1


def test_tokens_are_unique(pipe: Any, tiny_base: Path, tmp_path: Path) -> None:
    dog = save_with_tokens(pipe, tmp_path / "dog", {"<pet>": 2})
    load_adapter(pipe, dog, "one")
    with pytest.raises(UserError, match="the pipeline already has the token '<pet>'"):
        load_adapter(pipe, dog, "two")
    with pytest.raises(UserError, match="one contains the other"):
        put(pipe, "two", {"<pet>_1x": 1})
    delete_adapter(pipe, "two")
    pipe.load_textual_inversion({"<toy>": torch.randn(WIDTH)}, token="<toy>")
    before = embeddings_of(pipe, "<pet> <toy>")
    with pytest.raises(
        UserError, match="textual inversion was added to or removed from the text_encoder after the new tokens"
    ):
        delete_adapter(pipe, "one")
    assert same(embeddings_of(pipe, "<pet> <toy>"), before)  # unchanged
    fresh = open_pipeline(tiny_base)
    fresh.load_textual_inversion({"<toy>": torch.randn(WIDTH)}, token="<toy>")
    before = embeddings_of(fresh, "<pet> <toy>")
    load_adapter(fresh, dog, "one")
    assert not same(embeddings_of(fresh, "<pet> <toy>"), before)
    delete_adapter(fresh, "one")
    assert same(embeddings_of(fresh, "<pet> <toy>"), before)


def test_files_with_wrong_headers_are_refused(pipe: Any, tmp_path: Path) -> None:
    folder = save_with_tokens(pipe, tmp_path / "dog", {"<pet>": 2})
    from safetensors import safe_open

    with safe_open(folder / FILE_NAME, "pt") as reader:
        header = reader.metadata()["nora"]
    tensors = load_file(folder / FILE_NAME)
    key, good = "tokens.0.text_encoder", '{"<pet>":["text_encoder"]}'
    headers = {
        header.replace(good, '{"a b":["text_encoder"]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":["unet"]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":[]}'): "tokens has an invalid value",
        header.replace(good, '{"<pet>":["text_encoder_2"]}'): "its own description at tokens.0",
        header.replace(good, '{"<pet>":["text_encoder"],"<x>":["text_encoder"]}'): "its own description at tokens.1",
        header.replace(f'"tokens":{good},', ""): "its own description at tokens.0",
        header.replace(good, '{"dog":["text_encoder"]}'): "is already a word of the tokenizer",
        header.replace('"format_version":2', '"format_version":3'): "newer|upgrade",
    }
    for text, message in headers.items():
        assert text != header
        save_file(tensors, folder / FILE_NAME, {"nora": text})
        with pytest.raises(UserError, match=message):
            load_adapter(pipe, folder, "dog")
    renamed = {name.replace(key, "tokens.0.text_encoder_2"): value for name, value in tensors.items()}
    save_file(renamed, folder / FILE_NAME, {"nora": header.replace(good, '{"<pet>":["text_encoder_2"]}')})
    with pytest.raises(UserError, match="'text_encoder_2' is not a component of"):
        load_adapter(pipe, folder, "dog")
    shapes = {
        "wide": (torch.zeros(2, 8), "made for the base"), "flat": (torch.zeros(16), "its own description"),
        "none": (torch.zeros(0, 16), "1 to 64 vectors"), "many": (torch.zeros(65, 16), "1 to 64 vectors"),
        "nan": (torch.full((2, 16), float("nan")), "holds NaN"),
    }  # fmt: skip
    for value, message in shapes.values():
        save_file({**tensors, key: value}, folder / FILE_NAME, {"nora": header})
        with pytest.raises(UserError, match=message):
            load_adapter(pipe, folder, "dog")
    assert "<pet>" not in pipe.tokenizer.get_vocab()


def test_start_vectors(pipe: Any) -> None:
    table, ids = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer("red hat with dog").input_ids[1:-1]
    noise = torch.randn(2, WIDTH)
    assert torch.equal(
        start_vectors(pipe.text_encoder, pipe.tokenizer, 3, "red hat", noise), table[[ids[0], ids[1], ids[0]]]
    )
    halves = torch.stack([table[ids[:2]].mean(0), table[ids[2:]].mean(0)])
    assert torch.allclose(start_vectors(pipe.text_encoder, pipe.tokenizer, 2, "red hat with dog", noise), halves)
    assert torch.allclose(start_vectors(pipe.text_encoder, pipe.tokenizer, 2, None, noise), noise * table.std())


def test_commands(pipe: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_with_tokens(pipe, tmp_path / "dog", {"<pet>": 2}, info={"trigger": "<pet>"}))
    assert main(["inspect", folder]) == 0
    assert "new tokens       <pet> (text_encoder)" in capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "out" / "dog.safetensors")]) == 0
    assert "<pet> in dog_emb_pet.safetensors" in capsys.readouterr().out
    small = ["--base", str(tiny_base), "--width", "16", "--height", "16", "--steps", "2", "--adapter", folder]
    assert main(["generate", "--prompt", "a <pet> on the beach", *small, "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
