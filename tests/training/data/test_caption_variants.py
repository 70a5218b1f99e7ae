"""Caption variants: shuffled tags and caption dropout."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from runs import Configure

from nora_diffusion.data import find_images
from nora_diffusion.data.caption_files import read_captions
from nora_diffusion.data.caption_variants import CaptionVariants, tag_orders
from nora_diffusion.errors import UserError
from nora_diffusion.training import train
from nora_diffusion.training.data.prompts import PromptEmbeddings


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_orders_keep_the_first_tags_and_lose_none() -> None:
    caption = "sks dog, on grass,  red collar, sunny, close-up"
    tags = [tag.strip() for tag in caption.split(",")]
    found = tag_orders(caption, 8, 1, source())
    assert len(set(found)) == len(found) == 8
    for text in found:
        assert text.split(", ")[0] == tags[0] and sorted(text.split(", ")) == sorted(tags)
    assert tag_orders(caption, 8, 1, source()) == found


def test_few_tags_have_few_orders() -> None:
    assert set(tag_orders("a, b, c", 16, 1, source())) == {"a, b, c", "a, c, b"}
    assert tag_orders("a photo of sks dog", 16, 1, source()) == ["a photo of sks dog"]
    assert tag_orders("sks dog, grass", 16, 1, source()) == ["sks dog, grass"]


def test_variants_are_equally_frequent_and_dropout_has_its_rate() -> None:
    variants = CaptionVariants([["one", "two"], ["three"]], dropout=0.25)
    assert variants.all() == ["one", "two", "three", ""]
    drawn = Counter(variants.draw([0] * 4000, source()))
    assert drawn[""] == pytest.approx(1000, abs=90) and drawn["one"] == pytest.approx(1500, abs=100)
    plain = CaptionVariants([["one"], ["three"]])
    assert plain.all() == ["one", "three"] and plain.draw([1, 0, 1], source()) == ["three", "one", "three"]


def test_metadata_replaces_missing_sidecars(tmp_path: Path) -> None:
    paths = find_images(write_photos(tmp_path, 3))
    rows = [{"file_name": "0.png", "text": "listed 0"}, {"file_name": "1.png", "text": "listed 1"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "1.txt").write_text("beside 1")
    assert read_captions(paths, "prompt", sidecars=True).texts == ["listed 0", "beside 1", "prompt"]


def test_a_run_trains_only_variants_of_its_captions(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "tagged", 2)
    for name, text in {"0": "sks dog, snow, red, hat", "1": "sks dog, beach, toy"}.items():
        (folder / f"{name}.txt").write_text(text)
    seen: list[str] = []
    original = PromptEmbeddings.__call__

    def call(self: PromptEmbeddings, prompts: Any) -> Any:
        seen.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(PromptEmbeddings, "__call__", call)
    changes = {"shuffle_tags": 4, "caption_dropout": 0.4, "use_captions": True, "instance_data_dir": str(folder)}
    config = configure(max_train_steps=12, **changes)
    train(config)
    known = {frozenset(("sks dog", "snow", "red", "hat")), frozenset(("sks dog", "beach", "toy")), frozenset(("",))}
    assert {frozenset(text.split(", ")) for text in seen} == known
    assert len(set(seen)) > 4 and all(text.startswith("sks dog") for text in seen if text)
    first = list(seen)
    seen.clear()
    train(configure(max_train_steps=12, overwrite_output_dir=True, **changes))
    assert seen == first


def test_dropout_must_be_a_share(configure: Configure) -> None:
    with pytest.raises(UserError, match=r"caption_dropout=1.5 must be a share"):
        train(configure(caption_dropout=1.5))
