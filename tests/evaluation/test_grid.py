"""Grids: each cell equals the image of a single run, finished cells are reused, the pipeline is left unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from PIL import Image

from nora_diffusion import UserError, add_adapter, inspect_adapter, lora, nora, open_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.evaluation.axes import Cell, axis, checkpoint, parse_axis
from nora_diffusion.evaluation.grid import Grid, run_grid
from nora_diffusion.evaluation.settings import GridConfig
from nora_diffusion.generation.generate import GenerateConfig, generate
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.scoring.judges import load_judge

SMALL = Sampling(2, 7.5, width=16, height=16)


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dog-nora`` and ``dog-lora``, and a run folder ``run`` with checkpoints at steps 10, 20 and a copy."""
    folder = tmp_path_factory.mktemp("adapters")
    makers = {"dog-nora": nora(r=4, inner_r=2, basis="svd"), "dog-lora": lora(r=2)}
    for number, (name, config) in enumerate(makers.items()):
        pipe: Any = open_pipeline(tiny_base)
        torch.manual_seed(number)
        add_adapter(pipe, config, "one")
        for parameter in trainable_parameters(pipe, "one").values():
            parameter.data.normal_(std=0.5)
        save_adapter(pipe, folder / name, "one", info={"trigger": "sks", "step": 30})
    for step, name in (("10", "dog-nora"), ("20", "dog-lora"), ("5-copy", "dog-nora")):
        shutil.copytree(folder / name, folder / "run" / "checkpoints" / f"step-{step}")
    shutil.copy(folder / "dog-nora" / "nora_adapter.safetensors", folder / "run")
    return folder


def config(base: Path, out: Path, *axes: str, **cell: Any) -> GridConfig:
    parsed = dict(zip(("x", "y", "z"), map(parse_axis, axes), strict=False))
    return GridConfig(
        Cell(SMALL, **{"prompt": "a sks dog", **cell}), **parsed, source=BaseSource(str(base)), out=str(out)
    )


def single(base: Path, out: Path, cell: Cell) -> Path:
    """The image of ``nora-diffusion generate`` with the same settings."""
    adapters = [] if cell.path is None else [f"{cell.path}:{cell.weight}"]
    return generate(
        GenerateConfig([cell.prompt], cell.sampling, BaseSource(str(base)), adapters, seed=cell.seed, out=str(out))
    )[0]


def test_each_cell_is_the_single_run(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    """Bit for bit on the CPU, whatever was sampled before with the same pipeline, and with the same settings."""
    names = f"adapter=none,{adapters}/dog-nora:0.5,{adapters}/dog-lora"
    requested = config(tiny_base, tmp_path / "grid", names, "prompt=a dog|a sks dog on the beach", seed=3)
    folder = run_grid(requested)
    report = json.loads((folder / "grid.json").read_text())
    assert {k: a["labels"] for k, a in report["axes"].items()} == {
        "x": ["none", "dog-nora:0.5", "dog-lora"], "y": ["a dog", "a sks dog on the beach"],
    }  # fmt: skip
    for cell, (position, settings) in zip(report["cells"], requested.cells(), strict=True):
        assert (cell["x"], cell["y"], cell["z"]) == position
        alone = single(tiny_base, tmp_path / "single", settings)
        assert Image.open(folder / cell["file"]).tobytes() == Image.open(alone).tobytes()
        assert read_settings(folder / cell["file"]) == read_settings(alone)
    images = {Image.open(folder / c["file"]).tobytes() for c in report["cells"]}
    assert len(images) == 6  # the axes have an effect


def test_cells_without_an_adapter_ignore_the_weight(tiny_base: Path, adapters: Path, pipe: Any) -> None:
    axes = (f"adapter=none,{adapters}/dog-nora", "weight=0.5,1")
    files = Grid(config(tiny_base, Path("nowhere"), *axes), pipe).files
    assert len(files) == 4 and len(set(files.values())) == 3


def test_finished_cells_are_reused_and_broken_ones_made_again(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    first = Grid(config(tiny_base, tmp_path, "seed=1,2", adapter=str(adapters / "dog-nora")))
    steps = first.make()
    assert [next(steps), next(steps)] == [(0, 2), (1, 2)]
    steps.close()  # interrupted
    finished = [f for f in first.files.values() if f.exists()]
    assert len(finished) == 1
    before = finished[0].read_bytes()
    finished[0].touch()
    larger = Grid(config(tiny_base, tmp_path, "seed=1..3", adapter=str(adapters / "dog-nora")), first.pipe)
    assert list(larger.make()) == [(1, 3), (2, 3), (3, 3)]
    assert finished[0].read_bytes() == before
    finished[0].write_bytes(before[:-40])
    assert list(larger.make()) == [(2, 3), (3, 3)]
    assert finished[0].read_bytes() == before


def test_a_renamed_cell_is_made_again(tiny_base: Path, tmp_path: Path, pipe: Any) -> None:
    first, second = config(tiny_base, tmp_path, "seed=1,2"), config(tiny_base, tmp_path, "prompt=a dog|a cat")
    for grid in (Grid(first, pipe), Grid(second, pipe)):
        assert list(grid.make())[-1] == (2, 2)
        one, other = grid.files.values()
        shutil.copy(one, other)
        assert len(grid.missing()) == 1


def test_a_renamed_checkpoint_is_refused(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapters / "run", tmp_path / "run")
    (run / "checkpoints" / "step-10" / "manifest.json").write_text("{}")  # a checkpoint, whose adapter has step 30
    grid = config(tiny_base, tmp_path, "step=10,30", adapter=str(run))
    with pytest.raises(UserError, match=r"step-10 was renamed: it holds the adapter of step 30; rename it back"):
        grid.adapters()


def test_a_changed_adapter_makes_another_cell(tiny_base: Path, adapters: Path, tmp_path: Path, pipe: Any) -> None:
    """The hash of the adapter's content, not its name, is part of the cell's file name."""
    folder = tmp_path / "dog"
    found = set()
    for name in ("dog-nora", "dog-lora"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapters / name, folder)
        found |= set(Grid(config(tiny_base, tmp_path, "seed=1", adapter=str(folder)), pipe).files.values())
    assert len(found) == 2


def test_the_pipeline_is_left_untouched(tiny_base: Path, adapters: Path, tmp_path: Path, pipe: Any) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    grid = Grid(config(tiny_base, tmp_path, "weight=0.5,1", adapter=str(adapters / "dog-nora")), pipe)

    def interrupt(step: int, latents: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(grid.make(interrupt))
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def test_method_and_step_select_adapters(tiny_base: Path, adapters: Path, tmp_path: Path, pipe: Any) -> None:
    by_method = config(tiny_base, tmp_path, "method=nora,lora", adapter=str(adapters / "dog-{method}"))
    assert [inspect_adapter(c.path or "").method for _, c in by_method.cells()] == ["nora", "lora"]
    by_step = config(tiny_base, tmp_path, "step=10,20,30", adapter=str(adapters / "run"))
    assert [str(c.path) for _, c in by_step.cells()] == [
        *(str(adapters / "run" / "checkpoints" / f"step-{s}") for s in (10, 20)), str(adapters / "run"),
    ]  # fmt: skip
    assert len(set(Grid(by_step, pipe).files.values())) == 2  # the last adapter is a copy of the first
    with pytest.raises(UserError, match=r"no adapter of step 15: it has 10, 20$"):
        checkpoint(adapters / "run", 15)


def test_scores_are_those_of_the_judge(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nora_diffusion.evaluation import grid

    texts_seen: list[Any] = []
    features = {"text": torch.tensor([[0.6, 0.8]]), "image": torch.tensor([[1.0, 0.0]])}
    monkeypatch.setattr(grid, "text_features", lambda judge, texts: texts_seen.append(texts) or features["text"])
    monkeypatch.setattr(grid, "image_features", lambda judge, images: features["image"])
    image, judge, references = Image.new("RGB", (8, 8)), object(), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prompt, triggers = "a sks dog, skska and a <rex> cat", ["sks", "", "<rex>"]
    assert grid.score(judge, image, prompt, triggers, references) == {"prompt": 0.6, "subject": 0.5}
    assert grid.score(judge, image, "a dog", [], None) == {"prompt": 0.6}
    assert texts_seen == [["a dog, skska and a cat"], ["a dog"]]


def test_features_of_references_are_computed_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.evaluation import grid

    seen: list[int] = []
    original = grid.image_features
    monkeypatch.setattr(
        grid, "image_features", lambda judge, images: (seen.append(len(images)), original(judge, images))[1]
    )
    run_grid(config(tiny_base, tmp_path, "seed=1..2"), load_judge(), [Image.new("RGB", (8, 8))] * 3)
    assert seen == [3, 1, 1]


def test_the_sheet_shows_every_cell(tiny_base: Path, tmp_path: Path) -> None:
    sheets = []
    for count in (1, 3):
        folder = run_grid(config(tiny_base, tmp_path / str(count), f"seed=1..{count}", "guidance=1,5"))
        with Image.open(folder / "grid.png") as sheet:
            sheets.append(sheet.copy())
    small, large = sheets
    assert large.width > 2.5 * small.width and large.height == small.height


@pytest.fixture
def command(tiny_base: Path, tmp_path: Path) -> Iterator[Any]:
    def call(*words: str) -> int:
        small = ["--width", "16", "--height", "16", "--steps", "2", "--base", str(tiny_base)]
        return main(["grid", *words, *small, "--out", str(tmp_path / "grid")])

    yield call
    assert not list(tmp_path.glob("**/.*.png*"))


def test_the_command(command: Any, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "photos", 2)
    assert command("--x", f"adapter=none,{adapters}/dog-nora:0.8", "--y", "seed=1..2", "--prompt", "a sks dog") == 0
    assert "4 cells" in capsys.readouterr().out
    cells = json.loads((tmp_path / "grid" / "grid.json").read_text())["cells"]
    assert [(c["settings"]["seed"], [a["weight"] for a in c["settings"]["adapters"]]) for c in cells] == [
        (1, []), (1, [0.8]), (2, []), (2, [0.8]),
    ]  # fmt: skip


MISTAKES = {
    "no axis": (["--prompt", "x"], "--x"),
    "unknown axis": (["--x", "color=red", "--prompt", "x"], "no axis 'color'"),
    "no values": (["--x", "seed=", "--prompt", "x"], "is not an axis"),
    "word as number": (["--x", "weight=big", "--prompt", "x"], "not a number"),
    "NaN": (["--x", "weight=nan", "--prompt", "x", "--adapter", "a"], "out of range"),
    "backward range": (["--x", "seed=4..1", "--prompt", "x"], "range"),
    "huge range": (["--x", "seed=1..9999999", "--prompt", "x"], "range"),
    "too many": (["--x", "seed=1..100", "--y", "steps=1..100", "--prompt", "x"], "more than 1000"),
    "same axis twice": (["--x", "seed=1", "--y", "seed=2", "--prompt", "x"], "may appear once"),
    "weight set twice": (["--x", "adapter=none,a:0.8", "--y", "weight=0,1", "--prompt", "x"], "both set the weight"),
    "no prompt": (["--x", "seed=1"], "no prompt"),
    "tag in the prompt": (["--x", "seed=1", "--prompt", "x <lora:dog:1>"], "tags"),
    "method without placeholder": (["--x", "method=nora,lora", "--prompt", "x", "--adapter", "a"], "{method}"),
    "step without adapter": (["--x", "step=10", "--prompt", "x"], "needs an adapter"),
    "absent adapter": (["--x", "adapter=nowhere", "--prompt", "x"], "no adapter at nowhere"),
    "references without judge": (["--x", "seed=1", "--prompt", "x", "--references", "."], "--judge"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(
    mistake: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = MISTAKES[mistake]
    assert command(*words) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert not (tmp_path / "grid").exists()


def test_axes_from_text() -> None:
    assert parse_axis("prompt= a dog, running | a cat ").labels == ("a dog, running", "a cat")
    assert parse_axis("weight=0,0.5").changes == ({"weight": 0.0}, {"weight": 0.5})
    samplers = parse_axis("sampler=euler_a, DPM++ 2M Karras")
    assert samplers.labels == ("Euler a", "DPM++ 2M Karras")
    assert samplers.changes == ({"sampler": "euler_a"}, {"sampler": "dpmpp_2m_karras"})
    with pytest.raises(UserError, match="the sampler 'magic' is unknown"):
        parse_axis("sampler=magic")
    assert axis("adapter", ["none", "out/dog:0.8"]).changes == (
        {"adapter": None},
        {"adapter": "out/dog", "weight": 0.8},
    )
