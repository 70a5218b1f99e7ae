"""The drawn world is deterministic, and nothing held out leaks into training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nora_diffusion.tiny_sd.examples import demo_prompts, write_subject
from nora_diffusion.tiny_sd.recipe.configs import CONTEXT
from nora_diffusion.tiny_sd.recipe.tokenizer import build_tokenizer, caption_words
from nora_diffusion.tiny_sd.world import vocabulary as world
from nora_diffusion.tiny_sd.world.render import render, sample
from nora_diffusion.tiny_sd.world.scenes import random_scene

EXAMPLES = Path(__file__).parents[2] / "examples" / "subjects"


def test_a_scene_depends_only_on_seed_and_index() -> None:
    for index in range(50):
        first, caption = sample(3, index)
        again, same = sample(3, index)
        assert caption == same and np.array_equal(first, again)
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert not np.array_equal(sample(3, 0)[0], sample(4, 0)[0])


def test_training_scenes_have_no_held_out_object_or_name() -> None:
    heldout = {e.name for e in world.EMOJI if e.heldout}
    variants = set(world.HELDOUT_VARIANTS.values())
    names = heldout | set(world.HELDOUT_VARIANTS)
    assert not names & set(caption_words())
    for index in range(3000):
        scene = random_scene(0, index)
        assert not {item.sprite for item in scene.objects} & (heldout | variants)
        assert not names & set(scene.caption.split())


def test_every_class_has_three_members_in_training() -> None:
    for word in world.CLASS_WORDS:
        members = [e for e in world.training_emoji() if e.class_word == word] or list(world.VARIANTS[word])
        assert len(members) >= 3, word
    classes = {world.class_word_of(name) for name, _ in world.SUBJECTS.values()}
    assert len(classes) >= 16


def test_caption_words_are_single_tokens_and_captions_fit_the_context(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.model_max_length == CONTEXT
    for word in caption_words():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    for index in range(1000):
        ids = tokenizer(random_scene(0, index).caption).input_ids
        assert len(ids) <= CONTEXT and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.eos_token_id not in tokenizer("Zürich 雪 🙂 x").input_ids[:-1]


def test_random_scenes_cover_all_backgrounds_and_accessories() -> None:
    scenes = [random_scene(1, i) for i in range(1500)]
    assert {s.background.kind for s in scenes} == set(world.SCENES) | set(world.PATTERNS)
    assert {s.accessory for s in scenes} == {"", *world.ACCESSORIES}
    crowned = next(s for s in scenes if s.accessory == "crown")
    assert not np.array_equal(render(crowned), render(replace(crowned, accessory="")))


@pytest.mark.parametrize("slug", sorted(world.SUBJECTS))
def test_example_files_are_reproducible(slug: str, tmp_path: Path) -> None:
    write_subject(slug, tmp_path)
    paths = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(paths) == 6 * 2 + 8 * 2 + 1
    for path in paths:
        written, shipped = tmp_path / path, EXAMPLES / slug / path
        if path.suffix == ".png":
            assert np.array_equal(np.asarray(Image.open(written)), np.asarray(Image.open(shipped))), path
        else:
            assert written.read_text() == shipped.read_text(), path


@pytest.mark.parametrize("slug", sorted(world.SUBJECTS))
def test_demo_prompts_are_not_in_the_training_captions(slug: str) -> None:
    info = json.loads((EXAMPLES / slug / "subject.json").read_text())
    captions = [(EXAMPLES / slug / f"{i}.txt").read_text() for i in range(6)]
    backgrounds = {c.strip().removeprefix(info["instance_prompt"]).strip() for c in captions}
    assert info["demo_prompts"] == demo_prompts(slug) and len(info["demo_prompts"]) == 6
    for prompt in info["demo_prompts"]:
        assert "{}" in prompt and not any(prompt.endswith(b) for b in backgrounds)
    assert not any("wearing" in c for c in captions)
