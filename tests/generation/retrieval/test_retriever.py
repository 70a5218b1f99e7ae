"""Retrieval on the embedded base: the example subjects by prompts without triggers, and scores by the formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_pipeline
from retrieval_prompts import HELD_OUT, HELD_OUT_PAIRS, TUNED, TUNED_PAIRS, UNSUITABLE

from nora_diffusion import add_adapter, delete_adapter, load_base, lora
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.generation.library import NamedAdapter
from nora_diffusion.generation.retrieval import retriever as retrieval
from nora_diffusion.generation.retrieval.embedding import TextEmbedding
from nora_diffusion.generation.retrieval.retriever import (
    GENERIC,
    MAX_PROMPTS,
    MIN_SCORE,
    Retriever,
    describe,
    name_words,
    suggest,
)
from nora_diffusion.generation.retrieval.words import phrases
from nora_diffusion.io import tensor_cache
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.tiny_sd.examples import TRIGGER, instance_prompt, subject_object, training_scenes
from nora_diffusion.tiny_sd.world.vocabulary import SUBJECTS

Prompts = Mapping[str, tuple[str, ...]]


def example(slug: str, name: str = "") -> NamedAdapter:
    """An adapter of an example subject, as far as its metadata go."""
    info = AdapterInfo(
        {}, trigger=TRIGGER, class_word=subject_object(slug).class_word, instance_prompt=instance_prompt(slug),
        prompts=[scene.caption for scene in training_scenes(slug)],
    )  # fmt: skip
    return NamedAdapter(name or slug, slug, info=info)


LIBRARY = [example(slug) for slug in SUBJECTS]


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    return Retriever(load_base())


def share(retriever: Retriever, library: list[NamedAdapter], prompts: Prompts, by_class: bool = False) -> float:
    """Share of prompts whose first choice is the right adapter, or one of the right class."""
    found = {p: retriever.scores(library, p)[0][0].path for own in prompts.values() for p in own}
    key: Any = (lambda slug: subject_object(slug).class_word) if by_class else str
    right = [key(found[prompt]) == key(slug) for slug, own in prompts.items() for prompt in own]
    return sum(right) / len(right)


def test_first_choices_among_25_subjects(retriever: Retriever) -> None:
    """100% and 96% of the prompts; 100% by class also if names say nothing."""
    assert len(LIBRARY) == 25 and all(TRIGGER not in p for own in (*TUNED.values(), *HELD_OUT.values()) for p in own)
    assert share(retriever, LIBRARY, TUNED) == 1
    assert share(retriever, LIBRARY, HELD_OUT) >= 0.96
    unnamed = [replace(adapter, name=f"run-{number}") for number, adapter in enumerate(LIBRARY)]
    assert share(retriever, unnamed, HELD_OUT, by_class=True) == 1


@pytest.mark.parametrize("pairs", [TUNED_PAIRS, HELD_OUT_PAIRS], ids=["tuned", "held out"])
def test_each_subject_of_a_prompt_is_found(retriever: Retriever, pairs: Any) -> None:
    found = [{adapter.name for adapter, _ in retriever.scores(LIBRARY, prompt)[:2]} for prompt, _ in pairs]
    assert sum(got == wanted for got, (_, wanted) in zip(found, pairs, strict=True)) >= len(pairs) - 1


def test_only_what_suits_a_prompt_is_suggested(retriever: Retriever) -> None:
    assert [retriever.suggest(LIBRARY, prompt, 3) for prompt in UNSUITABLE] == [[]] * len(UNSUITABLE)
    suggested = [
        any(adapter.name == slug for adapter, _ in retriever.suggest(LIBRARY, prompt, 3))
        for prompts in (TUNED, HELD_OUT)
        for slug, own in prompts.items()
        for prompt in own
    ]
    assert sum(suggested) >= 0.96 * len(suggested)
    small = [adapter for adapter in LIBRARY if adapter.name in ("tiger", "boba")]
    assert [a.name for a, _ in retriever.suggest(small, "a striped orange cat in the snow", 2)] == ["tiger"]
    assert retriever.suggest(small, "a red car on the road", 2) == []
    assert [a.name for a, _ in retriever.suggest(small[:1], "a cat", 2)] == [small[0].name][: small[0].name == "tiger"]


def test_scores_by_the_formula(pipe: Any) -> None:
    """Each word of these prompts is one token of the tiny base, whose first token is the start."""

    def states(text: str) -> torch.Tensor:
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        assert ids.shape[1] == len(text.split()) + 2
        return pipe.text_encoder(ids).last_hidden_state[0, 1:-1].double()

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    with torch.no_grad():
        caption, thing = states("a cat on the beach"), states("a photo of a cat")
        named, other = states("a photo of a red toy"), states("a photo of a dog")
        one = unit(caption[1] + 0.5 * caption[4]) + unit(thing[4])
        one = unit(unit(one) + 0.5 * unit(named[4] + named[5]))
        two = unit(other[4])  # of its name alone
        center = torch.cat([torch.stack([one, two]), TextEmbedding(pipe)(GENERIC).double()]).mean(0)
        first, second, whole = states("a toy")[1], states("in snow")[1], states("a toy in snow")
        queries = [(1, unit(first)), (0.5, unit(second)), (1, unit(whole[1] + 0.5 * whole[3]))]
        expected = [
            max(a * float(unit(v - center) @ unit(q - center)) for a, q in queries) for v in (one, two)
        ]  # fmt: skip
    info = AdapterInfo({}, trigger="sks", class_word="cat", prompts=["a sks cat on the beach"])
    adapters = [NamedAdapter("red_toy", "", info=info), NamedAdapter("pets#dog-v2", "", info=AdapterInfo({}))]
    found = {a.name: score for a, score in suggest(pipe, adapters, "a toy in snow <lora:x:1>", 2, -1)}
    assert [found["red_toy"], found["pets#dog-v2"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    """The mean of the cosines of its CLIPs; of the T5 of PixArt, which has no CLIP."""
    pipe = tiny_pipeline(architecture, tmp_path)
    embed = TextEmbedding(pipe)
    count = {"sdxl": 2, "sd3": 2}.get(architecture, 1)
    vectors = embed(["a dog", "a red hat", "the"])
    assert vectors.shape == (3, 16 * count) and not vectors[2].any()
    encoders = [pipe.text_encoder, pipe.text_encoder_2][:count] if count > 1 else [pipe.text_encoder]
    with torch.no_grad():
        words = [[0, 0], [0, 0]]
        for row, text in enumerate(("a dog", "a red hat")):
            ids = pipe.tokenizer(text, return_tensors="pt").input_ids
            start = int(ids[0, 0] == pipe.tokenizer.bos_token_id)
            words[row] = [e(ids).last_hidden_state[0, start + 1 : -1].mean(0) for e in encoders]
        cosines = [torch.cosine_similarity(one, two, dim=0) for one, two in zip(*words, strict=True)]
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(sum(cosines)) / count, abs=1e-5)
    adapters = [NamedAdapter(name, name, info=AdapterInfo({})) for name in ("dog", "hat")]
    assert len(Retriever(pipe).scores(adapters, "a dog in the snow")) == 2


def test_loaded_adapters_change_nothing(pipe: Any) -> None:
    before, key = TextEmbedding(pipe)(["a dog"]), TextEmbedding(pipe).key()
    add_adapter(pipe, lora(r=2), "one", ("unet", "text_encoder"))
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data.normal_()
    assert torch.equal(TextEmbedding(pipe)(["a dog"]), before) and TextEmbedding(pipe).key() == key
    delete_adapter(pipe, "one")
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[0] += 1
    assert TextEmbedding(pipe).key() != key


def test_vectors_are_kept(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk, by what they depend on; without a disk cache in memory."""
    monkeypatch.setenv("NORA_CACHE", str(tmp_path))
    adapters = [NamedAdapter("dog", "", info=AdapterInfo({}, class_word="dog")), NamedAdapter("hat", "")]
    fresh = Retriever(pipe).scores(adapters, "a dog")
    assert len(list(tmp_path.glob("retrieval-*.safetensors"))) == 2
    counted: list[int] = []
    compute = Retriever._compute
    monkeypatch.setattr(Retriever, "_compute", lambda self, *texts: counted.append(1) or compute(self, *texts))
    assert Retriever(pipe).scores(adapters, "a dog") == fresh and not counted
    changed = [replace(adapters[0], info=AdapterInfo({}, class_word="cat")), adapters[1]]
    Retriever(pipe).scores(changed, "a dog")
    assert len(counted) == 1
    monkeypatch.setenv("NORA_CACHE", "off")
    assert tensor_cache.folder() is None
    again = Retriever(pipe)
    assert again.scores(adapters, "a dog") == again.scores(adapters, "a dog") == fresh and len(counted) == 3


def test_prompts_and_libraries_without_anything_to_compare(retriever: Retriever) -> None:
    assert retriever.scores([], "a cat") == [] and retriever.scores(LIBRARY, "a photo of the <lora:tiger:1>") == []
    assert retriever.suggest(LIBRARY, "a cat", 0) == []
    silent = NamedAdapter("v2-final_0001", "", info=AdapterInfo({}))
    scores = dict(retriever.scores([silent, *LIBRARY], "a cat"))
    assert scores[silent] < MIN_SCORE and max(scores, key=scores.__getitem__).name == "tiger"


def test_what_is_known_about_an_adapter() -> None:
    info = AdapterInfo(
        {}, trigger="sks, <toy>", tokens={"<toy>": ["text_encoder"]}, class_word="cat", instance_prompt="a sks cat",
        prompts=["a sks cat in <lora:x:1> the snow", "sks", "a <toy> on a table", "a sks cat"],
    )  # fmt: skip
    texts, class_word, name = describe(NamedAdapter("pets#OldBlue_mug-v2", "", info=info))
    assert texts == ["a cat in the snow", "a on a table", "a cat"]
    assert (class_word, name) == ("cat", "old blue mug")
    many = AdapterInfo({}, prompts=[f"a dog in place {chr(97 + n)}x" for n in range(20)])
    assert len(describe(NamedAdapter("x", "", info=many))[0]) <= MAX_PROMPTS
    other = AdapterInfo({}, trigger="blue mug")
    assert describe(NamedAdapter("x", "", info=other))[0] == ["blue mug"]
    assert [name_words(n) for n in ("cyclops-purple", "lora_sdxl_v1.0", "Ärger1", "狐")] == [
        "cyclops purple", "", "ärger", "狐",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red mug and a cat in the snow", [("a red mug", 1), ("and a cat", 1), ("in the snow", 0.5)]),
        ("on the beach, a dog wearing a hat", [("on the beach", 0.5), ("a dog", 1), ("wearing a hat", 0.5)]),
        ("", []),
        (" , ,", []),
    ],
)
def test_phrases(text: str, expected: list[tuple[str, float]]) -> None:
    assert [(phrase.text, phrase.weight) for phrase in phrases(text)] == expected
    assert retrieval.has_content("in the snow") and not retrieval.has_content("a photo of the")
