"""The DreamBooth protocol: scores against their definitions, resuming, reports, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_clip, tiny_dino, write_photos
from PIL import Image

from nora_diffusion import UserError, add_adapter, lora, nora, open_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.data import read_source
from nora_diffusion.data.captions import fill, with_article
from nora_diffusion.data.transforms import Transform
from nora_diffusion.evaluation.contenders import parse_contender
from nora_diffusion.evaluation.prompts import EXTENDED, KINDS, PROMPTS, read_templates
from nora_diffusion.evaluation.protocol import evaluate
from nora_diffusion.evaluation.report import page, write_reports
from nora_diffusion.evaluation.results import as_results
from nora_diffusion.evaluation.scoreboard import Scoreboard, compare, summarize
from nora_diffusion.evaluation.settings import EvaluationConfig
from nora_diffusion.evaluation.subjects import read_subject
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import load_adapter, trainable_parameters
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.results.files import read_results, write_results
from nora_diffusion.scoring.judges import image_features, load_judge, load_vision, prompt_score, subject_score
from nora_diffusion.training.measuring.heldout_loss import encode_photos, heldout_losses
from nora_diffusion.training.step.denoiser import encode_prompts
from nora_diffusion.training.step.objective import Objective

SMALL = Sampling(2, 2.0, width=16, height=16)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects, ``rex`` with a description and ``tom`` without, two adapters of each, judges and prompts."""
    folder = tmp_path_factory.mktemp("protocol")
    tiny_clip(folder / "clip")
    tiny_dino(folder / "dino")
    write_photos(folder / "rex", 3, (32, 32), seed=1)
    write_photos(folder / "tom", 2, (32, 32), seed=2)
    words = {"instance_prompt": "a sks dog", "class_prompt": "a dog", "heldout": ["1.png", "2.png"]}
    (folder / "rex" / "subject.json").write_text(json.dumps(words))
    (folder / "prompts.txt").write_text("{} on the beach\na red {noun}\n\n")
    for number, (name, word) in enumerate((("rex", "dog"), ("tom", "cat"))):
        for method, config in (("nora", nora(r=4, inner_r=2, basis="svd")), ("lora", lora(r=2))):
            pipe: Any = open_pipeline(tiny_base)
            torch.manual_seed(number)
            add_adapter(pipe, config, "one")
            for parameter in trainable_parameters(pipe, "one").values():
                parameter.data.normal_(std=0.5)
            save_adapter(pipe, folder / f"{name}-{method}", "one", info={"trigger": "sks", "class_word": word})
    return folder


DESCRIPTIONS = {
    "a list": "[]", "a heldout name": '{"heldout": "0.png"}', "no heldout": '{"heldout": null}',
    "numbers as prompts": '{"demo_prompts": [5]}', "a text as prompts": '{"demo_prompts": "a b"}',
    "a number as words": '{"instance_prompt": 5, "class_prompt": 5}', "a key twice": '{"heldout": [], "heldout": []}',
    "too deep": "[" * 5000, "another folder": '{"heldout": ["../tom/0.png"]}', "a root": '{"heldout": ["/etc/x.png"]}',
    "half of the words": '{"instance_prompt": "a"}', "no text": '{"name": "\\ud83d", "heldout": 1}',
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_is_checked(name: str, tmp_path: Path) -> None:
    """Every value by its type: a text is no list of its letters."""
    write_photos(tmp_path / "rex", 1, (32, 32))
    (tmp_path / "rex" / "subject.json").write_text(DESCRIPTIONS[name])
    with pytest.raises(UserError) as error:
        read_subject(tmp_path / "rex")
    assert str(tmp_path / "rex" / "subject.json") in str(error.value) and "\n" not in str(error.value)


def config(base: Path, folder: Path, out: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "adapters": [f"{folder}/{{subject}}-nora", f"small={folder}/{{subject}}-lora:0.5"],
        "subjects": [str(folder / "rex"), str(folder / "tom")],
        "prompts": str(folder / "prompts.txt"), "judge": str(folder / "clip"), "dino": str(folder / "dino"),
        "source": BaseSource(str(base)), "sampling": SMALL, "seeds": 2, "out": str(out),
    }  # fmt: skip
    return EvaluationConfig(**values | changes)


@pytest.fixture(scope="module")
def board(tiny_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scoreboard:
    return evaluate(config(tiny_base, folder, tmp_path_factory.mktemp("board") / "out", weight_noise=[0.0, 0.3]))


def test_scores_equal_those_of_images_made_one_by_one(board: Scoreboard, tiny_base: Path, folder: Path) -> None:
    """Subject tom, second prompt, adapter at half weight: sampled and scored here by the definitions."""
    row = next(r for r in board.of("small") if r.subject == "tom" and "red" in r.prompt)
    assert row.prompt == "a red sks cat"  # the phrase is the adapter's: tom has no description
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, folder / "tom-lora", "one", weight=0.5)
    images = [sample_images(pipe, [row.prompt], [seed], SMALL)[0] for seed in (0, 1)]
    clip, dino = load_judge(folder / "clip"), load_vision(folder / "dino")
    real = [Image.open(folder / "tom" / f"{i}.png").convert("RGB") for i in range(2)]
    a, b = image_features(dino, images)
    expected = {
        "clip_i": subject_score(clip, images, real), "dino": subject_score(dino, images, real),
        "clip_t": prompt_score(clip, images, ["a red cat"] * 2), "diversity": 1 - float(a @ b),
    }  # fmt: skip
    assert row.scores == pytest.approx(expected, abs=1e-5)


def test_real_images_are_compared_with_each_other(board: Scoreboard, folder: Path) -> None:
    held_out = [Image.open(folder / "rex" / name).convert("RGB") for name in ("1.png", "2.png")]
    a, b = image_features(load_vision(folder / "dino"), held_out)
    assert board.real["rex"]["dino"] == pytest.approx(float(a @ b), abs=1e-5)


def test_the_table_has_means_inside_their_intervals(board: Scoreboard) -> None:
    assert board.labels == ["base", "nora", "small"] and len(board.scored) == 3 * 2 * 2
    table = summarize(board)
    for label, values in table.items():
        scores = [row.scores["clip_t"] for row in board.of(label)]
        assert values["clip_t"]["mean"] == pytest.approx(sum(scores) / 4)
        assert all(v["low"] <= v["mean"] <= v["high"] for v in values.values())
    gap = compare(board)["small - nora"]["dino"]["mean"]
    assert gap == pytest.approx(table["small"]["dino"]["mean"] - table["nora"]["dino"]["mean"])


def test_the_heldout_loss_is_that_of_the_images_not_trained_on(
    board: Scoreboard, tiny_base: Path, folder: Path
) -> None:
    """Of rex, at half the adapter's weight; tom has no held-out images."""
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, folder / "rex-lora", "one", weight=0.5)
    images = [read_source(folder / "rex" / name) for name in ("1.png", "2.png")]
    encoded, words = encode_photos(pipe, images, Transform([(16, 16)])), encode_prompts(pipe, ["a sks dog"] * 2)
    losses = heldout_losses(pipe, Objective.of(pipe.scheduler), encoded, words, torch.float32).mean(1)
    assert list(board.heldout["small"]) == ["rex"]
    assert board.heldout["small"]["rex"] == pytest.approx(losses.tolist(), rel=1e-4)
    assert board.metrics[-1] == "heldout_loss"
    assert summarize(board)["small"]["heldout_loss"]["mean"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert board.noisy["small"]["0"] == [pytest.approx(float(losses.mean()), rel=1e-4)]
    assert board.noisy["small"]["0.3"] != board.noisy["small"]["0"] and list(board.noisy) == board.labels


def test_an_adapter_against_itself_differs_by_nothing(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    """Differences are paired by prompt, so the interval is a point however much the prompts differ."""
    one = f"{folder}/rex-nora"
    twins = config(tiny_base, folder, tmp_path, adapters=[f"a={one}", f"b={one}"], subjects=[str(folder / "rex")])
    assert compare(evaluate(twins))["b - a"]["clip_i"] == {"mean": 0, "low": 0, "high": 0}


def test_a_second_run_makes_only_the_new_images(
    board: Scoreboard, tiny_base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.evaluation import grid

    made: list[Any] = []
    original = grid.sample_images
    monkeypatch.setattr(grid, "sample_images", lambda *args: made.append(args[2]) or original(*args))
    again = evaluate(config(tiny_base, folder, board.folder))
    assert not made and summarize(again) == summarize(board)
    evaluate(config(tiny_base, folder, board.folder, seeds=3, subjects=[str(folder / "rex")]))
    assert made == [[2]] * 6  # the third seed of two prompts in three rows


def test_the_reports(board: Scoreboard, folder: Path) -> None:
    html = write_reports(board).read_text()
    document = json.loads((board.folder / "evaluation.json").read_text())
    assert document["table"] == json.loads(json.dumps(summarize(board)))
    assert all((board.folder / file).is_file() for cell in document["cells"] for file in cell["files"])
    assert (document["judge"], document["seeds"]) == (str(folder / "clip"), 2)
    for text in ("DINO ↑", "small - nora", "By subject", "a red sks cat", "an upper limit"):
        assert text in html
    assert 'href="subjects/001-rex.html"' in html and "By kind of prompt" not in html
    assert html.count("data:image/png;base64,") == 12 and "<script" not in html


def test_the_page_of_a_subject(board: Scoreboard) -> None:
    write_reports(board)
    rex, tom = ((board.folder / f"subjects/{name}.html").read_text() for name in ("001-rex", "002-tom"))
    assert rex.count("<img") == 2 + 3 * 2 * 2 and tom.count("<img") == 2 + 3 * 2 * 2  # held-out and real ones
    assert "a red sks dog" in rex and "a red sks dog" not in tom and "<script" not in rex + tom
    row = next(row for row in board.of("small") if row.subject == "tom")
    assert f"CLIP-I {row.scores['clip_i']:.3f} DINO {row.scores['dino']:.3f}" in tom


def test_the_results_file(board: Scoreboard, tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    results = as_results(board, "nora-diffusion evaluate")
    assert read_results(write_results(results, tmp_path / "results.json")) == results
    rows = {(row.method, row.subject): row for row in results.rows}
    assert {*rows} == {(label, name) for label in board.labels for name in ("rex", "tom")}
    expected = [row.scores["dino"] for row in board.of("small") if row.subject == "tom"]
    small = rows["small", "tom"]
    assert small.scores["dino"] == pytest.approx(sum(expected) / 2) and "heldout_loss" not in small.scores
    assert rows["small", "rex"].scores["heldout_loss"] == pytest.approx(sum(board.heldout["small"]["rex"]) / 2)
    assert results.methods["small"] == {"method": "lora", "rank": 2, "inner_rank": 1, "weight": 0.5}
    assert results.scores["heldout_loss"] == "lower" and results.scores["clip_t"] == "higher"
    assert not rows["base", "rex"].is_trained and small.trained_parameters > 0 and small.rate is None
    assert results.data["photos"]["tom"]["scoring"].images == 2
    assert results.protocol["seeds"] == 2 and {*results.judges} == {"clip_i", "dino"}
    assert results.base.name == tiny_base.name  # without its folders
    again = evaluate(config(tiny_base, folder, board.folder, judge=str(folder / "clip"), seeds=1))
    assert again.hashes == board.hashes and as_results(again, "").protocol != results.protocol


def test_extended_prompts(board: Scoreboard) -> None:
    kinds = [
        f"{kind}, {level}"
        for kind in ("photorealistic", "style", "imaginative")
        for level in ("easy", "medium", "hard")
    ]
    assert [*EXTENDED] == kinds and KINDS["a pencil sketch of {}"] == "style, easy"
    assert read_templates("extended") == PROMPTS["extended"] and len({*PROMPTS["extended"]}) == 18
    assert all("{}" in template or "{noun}" in template for template in PROMPTS["extended"])
    rows = [replace(row, kind=kinds["red" in row.prompt]) for row in board.scored]
    red = [row.scores["clip_t"] for row in board.of("small") if "red" in row.prompt]
    text = page(replace(board, scored=rows))
    line = text[text.index("medium: small") :]  # of the red ones
    assert f"{sum(red) / 2:.3f}" in line[: line.index("</tr>")]


def test_without_dino_and_with_one_seed(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    small = config(tiny_base, folder, tmp_path, dino=None, seeds=1, subjects=[str(folder / "rex")])
    found = evaluate(small)
    assert found.metrics == ["clip_i", "clip_t", "heldout_loss"]
    assert "not measured" in write_reports(found).read_text()


def test_prompt_templates() -> None:
    assert [len(PROMPTS[name]) for name in ("object", "live")] == [25, 25]
    assert fill("a red {noun}", "an owl") == "a red owl" and fill("{} in it", "the owl") == "the owl in it"
    assert (with_article("owl"), with_article("sks owl")) == ("an owl", "a sks owl")


def test_labels_of_contenders() -> None:
    assert parse_contender("out/{subject}-lora").label == "lora"
    assert parse_contender("out/{subject}").label == "out"
    assert parse_contender("mine=out/dog:0.7").weight == 0.7


def test_mistakes_are_found_before_any_image_is_made(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    unnamed = write_photos(tmp_path / "unnamed", 1)
    (tmp_path / "bare.txt").write_text("a dog\n")
    adapter = f"{folder}/rex-nora"
    for changes, words in (
        ({"judge": None}, "measuring needs --judge"),
        ({"seeds": 0}, "out of range"),
        ({"adapters": ["none"]}, "is always evaluated"),
        ({"adapters": [f"a={adapter}", f"a={adapter}"]}, "two adapters are named 'a'"),
        ({"adapters": [f"base={adapter}"]}, "another label"),
        ({"adapters": [str(folder / "nowhere")]}, "no adapter"),
        ({"subjects": []}, "no subject"),
        ({"subjects": [str(folder / "nobody")]}, "no subject at"),
        ({"prompts": str(tmp_path / "bare.txt")}, "no placeholder for the subject"),
        ({"prompts": "objects"}, "'object', 'live' or 'extended'"),
        ({"judge": str(folder / "dino")}, "cannot load the judge"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(config(tiny_base, folder, tmp_path / "out", **changes))
    subject = read_subject(unnamed)
    with pytest.raises(UserError, match="has no trigger and class word"):
        subject.phrases([])
    assert subject.references[0] is not subject.references[0]  # decoded when needed and not kept
    assert not (tmp_path / "out").exists()
    assert read_templates("live")[0] == "{} in the jungle"


def test_the_command(tiny_base: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"""evaluate --adapters {folder}/rex-nora --subjects {folder}/rex --prompts {folder}/prompts.txt --seeds 1
        --judge {folder}/clip --base {tiny_base} --steps 1 --width 16 --height 16 --out {tmp_path}/out"""
    assert main(words.split()) == 0
    output = capsys.readouterr().out
    assert "rex-nora" in output and "clip_t" in output and (tmp_path / "out" / "report.html").is_file()
    results = read_results(tmp_path / "out/results.json")
    assert (
        results.command.startswith("nora-diffusion evaluate --adapters rex-nora")
        and str(tmp_path) not in results.command
    )
