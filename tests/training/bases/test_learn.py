"""Learning a basis from pseudo-subjects: objects, the whole command, and resuming it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nora_diffusion import UserError, add_adapter, inspect_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.adapters import nora_input
from nora_diffusion.cli import main
from nora_diffusion.pipelines.base import load_base
from nora_diffusion.tiny_sd.world.vocabulary import EMOJI, HELDOUT_VARIANTS, known_objects
from nora_diffusion.training.bases import pseudo_subjects as shop_module
from nora_diffusion.training.bases.objects import COMMON, KnownObject, drawn_by_lot, parse_objects, read_objects
from nora_diffusion.training.bases.pseudo_subjects import pseudo_subjects


def test_objects_are_a_phrase_and_a_class_word(tmp_path: Path) -> None:
    assert KnownObject.parse("golden retriever: dog") == KnownObject("golden retriever", "dog")
    assert KnownObject.parse("an orange cat") == KnownObject("an orange cat", "cat")
    (tmp_path / "objects.txt").write_text("red mug\n\nowl: bird\nowl: bird\n")
    assert [known.phrase for known in read_objects(tmp_path / "objects.txt")] == ["red mug", "owl"]
    subject = pseudo_subjects([KnownObject("owl", "bird")], seed=0)[0]
    assert subject.prompt(0) == "an owl in the snow" and subject.caption(0) == "a sks bird in the snow"
    for line in (": dog", "a cat: two words", "x" * 201, "a\0b"):
        with pytest.raises(UserError):
            KnownObject.parse(line)
    (tmp_path / "empty.txt").write_text("\n")
    for file in ("empty.txt", "absent.txt"):
        with pytest.raises(UserError, match="objects"):
            read_objects(tmp_path / file)


def test_every_object_is_drawn_before_one_comes_again() -> None:
    objects = parse_objects(COMMON, "the list")
    chosen = drawn_by_lot(objects, len(objects) + 3, seed=1)
    assert set(chosen[: len(objects)]) == set(objects) and len(chosen) == len(objects) + 3
    assert drawn_by_lot(objects, 5, 1) == chosen[:5] != drawn_by_lot(objects, 5, 2)


def test_the_embedded_base_never_learns_from_held_out_subjects() -> None:
    phrases = {line.split(":")[0] for line in known_objects()}
    assert not phrases & {emoji.name for emoji in EMOJI if emoji.heldout}
    assert len(phrases) > 50 and HELDOUT_VARIANTS
    tokenizer = load_base().tokenizer
    assert all(tokenizer.unk_token not in tokenizer.tokenize(phrase) for phrase in phrases)


WORDS = ["--subjects", "3", "--images", "1", "--steps", "1", "--rank", "4", "--lora_rank", "2", "--at_once", "2"]


@pytest.mark.slow
def test_the_command_learns_a_basis_that_adapters_share(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted after the first group, it continues with the rest, and gives the basis of one run."""
    (tmp_path / "more.yaml").write_text("sample_steps: 1\ntrain_batch_size: 1\nmixed_precision: no\n")
    words = ["basis", "learn", "--base", str(tiny_base), "--config", str(tmp_path / "more.yaml"), *WORDS]
    train, trained = shop_module.train_subjects, list[str]()

    def failing(config: Any) -> Any:
        if len(trained) == 2:  # after the probe and the first group
            raise UserError("stopped")
        trained.append(config.output_dir)
        return train(config)

    monkeypatch.setattr(shop_module, "train_subjects", failing)
    assert main([*words, "--out", str(tmp_path / "one")]) == 2
    finished = [*(tmp_path / "one" / "subjects").glob("*.safetensors")]
    assert len(finished) == 2
    times = {file: file.stat().st_mtime_ns for file in finished}
    assert main([*words, "--out", str(tmp_path / "one"), "--lora_rank", "3"]) == 2
    assert "with other lora_rank" in capsys.readouterr().err
    monkeypatch.setattr(shop_module, "train_subjects", train)
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == times
    out = capsys.readouterr().out
    assert "1 pseudo-subjects x 1 steps x " in out and "3 of 3" in out and "--basis_from" in out
    assert main([*words, "--out", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / name / "nora_adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], value) for key, value in two.items())
    _check_use(open_pipeline(tiny_base), tmp_path, one, [nora, nora_input])


def _check_use(pipe: Any, folder: Path, basis: dict[str, torch.Tensor], presets: Sequence[Any]) -> None:
    """Adapters on the learned basis have its frozen factors: orthonormal, and nothing changes before training."""
    for preset in presets:
        for number, targets in enumerate((["attn"], ["to_q"])):
            name = f"{preset.__name__}{number}"
            add_adapter(
                pipe, preset(r=4, inner_r=2, basis="learned", target_modules=targets), name, basis_from=folder / "one"
            )
            saved = load_file(save_adapter(pipe, folder / name, name, basis="own"))
            frozen = [key for key in saved if key.endswith(("A_out", "B_out"))]
            assert frozen and all(torch.equal(saved[key], basis[key]) for key in frozen)
            down = saved[next(key for key in frozen if key.endswith("A_out"))].float()
            torch.testing.assert_close(down @ down.T, torch.eye(4), atol=2e-3, rtol=0)
    assert inspect_adapter(folder / "one").extra["learned_basis"]["steps"] == 1


def test_a_learned_basis_needs_its_file(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="make one with `nora-diffusion basis learn`"):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="learned"), "one")
    words = ["train", "--instance_data_dir", "examples/subjects/tiger", "--instance_prompt", "a sks cat"]
    assert main([*words, "--basis", "learned"]) == 2
    assert "--basis learned needs --basis_from" in capsys.readouterr().err
