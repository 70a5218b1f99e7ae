"""The command line: results, and for every user error one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nora_diffusion import UserError, add_adapter, nora, open_pipeline, save_adapter
from nora_diffusion.cli import build_parser, main
from nora_diffusion.composition.mixing import mix_files
from nora_diffusion.composition.modes import Mode
from nora_diffusion.conversion.lora_layouts import Format
from nora_diffusion.demo import SUBJECT, run_demo
from nora_diffusion.evaluation.axes import Cell
from nora_diffusion.evaluation.settings import EvaluationConfig, GridConfig
from nora_diffusion.generation.addresses import parse_adapter, split_label
from nora_diffusion.generation.generate import GenerateConfig, save_new_image
from nora_diffusion.generation.image_settings import ImageSettings, read_settings
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.training import TrainConfig
from nora_diffusion.training.command import next_command
from nora_diffusion.training.settings.config import SaveDtype
from nora_diffusion.training.settings.defaults import embedded_defaults

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def dog(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with a visible effect."""
    pipe: Any = open_pipeline(tiny_base)
    add_adapter(pipe, nora(r=4, inner_r=2), "one", ("unet", "text_encoder"))
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("adapters") / "dog"
    save_adapter(pipe, folder, "one", info={"trigger": "sks"})
    return folder


def generate(base: Path, out: Path, *more: str) -> int:
    words = ["generate", "--base", str(base), "--out", str(out), "--width", "16", "--height", "16", "--steps", "2"]
    return main([*words, *more])


def test_generate_writes_images_with_their_settings(
    tiny_base: Path, dog: Path, tmp_path: Path, capsys: Capture
) -> None:
    common = ["--prompt", "a sks dog", "--num", "3", "--seed", "5"]
    assert generate(tiny_base, tmp_path / "one", *common, "--adapter", f"{dog}:0.8", "--batch", "2") == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [f.name for f in files] == ["0000-5.png", "0001-6.png", "0002-7.png"]
    settings = read_settings(files[2])
    assert (settings.prompt, settings.seed, settings.steps) == ("a sks dog", 7, 2)
    assert settings.adapters[0]["weight"] == 0.8
    assert settings.adapters[0]["trigger"] == "sks"
    # Another batch size gives the same image; without the adapter it differs.
    assert generate(tiny_base, tmp_path / "two", *common, "--adapter", f"{dog}:0.8", "--batch", "1") == 0
    assert (tmp_path / "two" / "0002-7.png").read_bytes() == files[2].read_bytes()
    assert generate(tiny_base, tmp_path / "three", *common) == 0
    assert (tmp_path / "three" / "0002-7.png").read_bytes() != files[2].read_bytes()
    # Nothing is overwritten.
    assert generate(tiny_base, tmp_path / "three", "--prompt", "a dog") == 0
    assert (tmp_path / "three" / "0003-0.png").is_file()


def test_images_of_several_writers_all_stay(tmp_path: Path) -> None:
    """Processes that generate into one folder, with the same seeds and others."""
    settings = ImageSettings("a dog", 0, 2, 2.0, 8, 8)

    def write(writer: int) -> list[Path]:
        image = Image.new("RGB", (8, 8), (writer, 0, 0))
        return [save_new_image(image, tmp_path, seed, settings) for seed in (5, 5, 6, writer) * 4]

    with ThreadPoolExecutor(6) as pool:
        files = [file for made in pool.map(write, range(6)) for file in made]
    assert len(set(files)) == 96 and sorted(tmp_path.iterdir()) == sorted(files)
    assert all(re.fullmatch(r"\d{4}-\d\.png", file.name) for file in files)
    odd = ("99999999999999999999-1.png", "١٢٣٤-1.png", "0200-.png", "0300-x.png")  # only "0300-x" and "0200-" count
    for name in odd:
        (tmp_path / name).touch()
    assert save_new_image(Image.new("RGB", (8, 8)), tmp_path, 1, settings).name == "0301-1.png"


def test_inspect(dog: Path, capsys: Capture) -> None:
    assert main(["inspect", str(dog)]) == 0
    assert "nora, r = 4, r' = 2" in capsys.readouterr().out
    assert main(["inspect", str(dog), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trigger"] == "sks"


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_export(dog: Path, tmp_path: Path, capsys: Capture, form: str) -> None:
    assert main(["export", str(dog), str(tmp_path / "dog.safetensors"), "--format", form]) == 0
    assert "rank 2" in capsys.readouterr().out
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "dog.safetensors").values())


MISTAKES = {
    "no such command": (["genrate"], "there is no command 'genrate': did you mean generate?"),
    "no such command, nor one like it": (["xyz"], "nora-diffusion --help"),
    "flag with a typo": (["generate", "--promt", "x", "--prompt", "x"], "did you mean --prompt"),
    "flag with a typo and nothing else": (["generate", "--promt", "x"], "did you mean --prompt"),
    "abbreviated flag": (["generate", "--guidanc", "3", "--prompt", "x"], "did you mean --guidance"),
    "unexpected argument": (["demo", "tiger"], "see nora-diffusion demo --help"),
    "no prompt": (["generate"], "--prompt"),
    "empty prompt": (["generate", "--prompt", " "], "no prompt"),
    "base in a folder that is not UTF-8": (
        ["generate", "--prompt", "x", "--base", os.fsdecode(b"./caf\xe9")],
        r"caf\udce9 is not UTF-8",
    ),
    "prompt with a NUL": (["generate", "--prompt", "a\0b"], "not text"),
    "half of an emoji": (["generate", "--prompt", "a \ud83d dog"], r"'\ud83d', which is not text"),
    "half of an emoji to avoid": (["generate", "--prompt", "x", "--negative_prompt", "\udc15"], "not text"),
    "prompt that is not UTF-8": (["grid", "--x", "seed=1", "--prompt", os.fsdecode(b"caf\xe9")], "not text"),
    "prompt of 25 kB": (["generate", "--prompt", "dog " * 6000], "more than 4000 characters"),
    "name of 25 kB": (["inspect", "dog " * 6000], "no adapter at dog"),
    "flag of 25 kB": (["generate", "--" + "dog" * 8000], "unknown flag"),
    "absurd steps": (["generate", "--prompt", "x", "--steps", "1000000000"], "out of range"),
    "size that is no multiple of 8": (["generate", "--prompt", "x", "--width", "63"], "multiple of 8"),
    "NaN weight": (["generate", "--prompt", "x", "--adapter", "dog:nan"], "not a number"),
    "weight out of range": (["generate", "--prompt", "x", "--adapter", "dog:101"], "out of range"),
    "tag that is not closed": (["generate", "--prompt", "x <lora:dog:0.8"], "not a complete tag"),
    "tag of an unknown adapter": (["generate", "--prompt", "x <lora:dog:0.8>"], "--library"),
    "nothing but a tag": (["generate", "--prompt", "<lora:dog>", "--adapter", "dog"], "no prompt besides"),
    "word as weight": (["generate", "--prompt", "x", "--adapter", "dog:big"], "not a number"),
    "absent base": (["generate", "--prompt", "x", "--base", "./nowhere"], "does not exist"),
    "base that is not on the hub": (
        ["generate", "--prompt", "x", "--base", "no/where"],
        "cannot load the pipeline 'no/where'",
    ),
    "unknown device": (["generate", "--prompt", "x", "--device", "cudaa"], "the device 'cudaa' cannot be used"),
    "unavailable device": (["generate", "--prompt", "x", "--device", "hpu"], "leave out --device"),
    "unavailable device for the app": (["app", "--device", "cudaa"], "leave out --device"),
    "absent adapter": (["inspect", "nowhere"], "no adapter at nowhere"),
    "absent adapter to generate with": (["generate", "--prompt", "x", "--adapter", "nowhere"], "no adapter at nowhere"),
    "two weights": (["generate", "--prompt", "x", "--adapter", "out/dog:0.8:3"], "is not a local path"),
    "unknown format": (["export", "a", "b", "--format", "onnx"], "onnx"),
    "absent subject": (["demo", "--subject", "unicorn"], "unicorn"),
    "training without photos": (["train", "--instance_data_dir", "nowhere", "--instance_prompt", "x"], "nowhere"),
    "training flag with a typo": (["train", "--instance_promt", "x"], "instance_prompt"),
}


def test_a_finished_training_prints_the_next_command() -> None:
    ours = TrainConfig(instance_prompt="a sks dog")
    assert next_command(ours, Path("my dog")) == "nora-diffusion generate --adapter 'my dog' --prompt 'a sks dog'"
    other = TrainConfig(instance_prompt="x", pretrained_model_name_or_path="some/model")
    expected = "nora-diffusion generate --adapter dog --prompt x --base some/model"
    assert next_command(other, Path("dog")) == expected
    other = replace(other, variant="fp16", revision="v2")
    assert next_command(other, Path("dog")) == f"{expected} --variant fp16 --revision v2"


def test_help_shows_every_default(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = {}
    for command in ("generate", "demo"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        text[command] = " ".join(capsys.readouterr().out.split())
    assert "1 to 1000 (default: that of the base)" in text["generate"] and "count up (default: 0)" in text["generate"]
    assert (
        f"(default: {SUBJECT})" in text["demo"]
        and f"(default: {embedded_defaults('nora')['max_train_steps']})" in text["demo"]
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(
    mistake: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1300
    assert "Traceback" not in err
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "x"],
        ["grid", "--prompt", "x", "--x", "seed=1"],
        ["evaluate", "--subjects", "{tiger}", "--adapters", "{dog}"],
    ],
)
def test_images_are_made_on_the_best_device_by_default(
    words: list[str], dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The best device is patched to one that does not exist."""
    tiger = Path(__file__).parents[2] / "examples/subjects/tiger"
    monkeypatch.setattr("nora_diffusion.pipelines.base.best_device", lambda: "cudaa")
    words = [word.format(tiger=tiger, dog=dog) for word in words]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "the device 'cudaa' cannot be used" in capsys.readouterr().err


def test_a_mistyped_path_is_not_a_hub_id(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path in an existing folder is never looked up on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "dog").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    assert main(["generate", "--prompt", "x", "--adapter", "out/dgo"]) == 2
    assert "no adapter at out/dgo" in (error := capsys.readouterr().err) and "did you mean out/dog?" in error
    assert main(["generate", "--prompt", "x", "--base", "out/dgo"]) == 2
    assert "out/dgo" in capsys.readouterr().err


def test_adapter_for_another_base_is_refused(dog: Path, tmp_path: Path, capsys: Capture) -> None:
    from factories import tiny_random_pipeline

    other = tiny_random_pipeline(tmp_path / "other", seed=4)
    assert generate(other, tmp_path / "out", "--prompt", "x", "--adapter", str(dog)) == 2
    assert "was made for the base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    assert generate(tiny_base, tmp_path / "file" / "out", "--prompt", "x") == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out/dog", ("out/dog", 1.0)),
        ("out/dog:0.8", ("out/dog", 0.8)),
        ("user/dog:-1", ("user/dog", -1.0)),
        ("C:\\dog", ("C:\\dog", 1.0)),
        ("C:\\dog:0.5", ("C:\\dog", 0.5)),
    ],
)
def test_parse_adapter(text: str, expected: tuple[str, float]) -> None:
    assert parse_adapter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out/12:30", ("out/12:30", 1.0)),
        ("out/12:30:0.5", ("out/12:30", 0.5)),
        ("out/12:30:-1", ("out/12:30", -1.0)),
        ("a:b", ("a:b", 1.0)),
        ("a:b:2", ("a:b", 2.0)),
        ("out/lr=1e-3:5", ("out/lr=1e-3:5", 1.0)),
        ("p:1.nora_pack.safetensors#dog", ("p:1.nora_pack.safetensors#dog", 1.0)),
        ("p:1.nora_pack.safetensors#dog:0.5", ("p:1.nora_pack.safetensors#dog", 0.5)),
        ("dog:0.5", ("dog", 0.5)),
        ("gone:0.5", ("gone", 0.5)),
        ("x" * 300 + ":0.5", ("x" * 300, 0.5)),
        ("a\0b:0.5", ("a\0b", 0.5)),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="no colons in names")
def test_folders_with_a_colon_can_be_named(
    text: str, expected: tuple[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out/12:30", "a:b", "out/lr=1e-3:5", "dog"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "p:1.nora_pack.safetensors").touch()
    assert parse_adapter(text) == expected
    (tmp_path / "dog:0.8").mkdir()
    with pytest.raises(UserError, match=r"write dog:0\.8:1 for the name"):
        parse_adapter("dog:0.8")
    assert (parse_adapter("dog:0.8:1"), parse_adapter("dog:0.80")) == (("dog:0.8", 1.0), ("dog", 0.8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nora=out/dog", ("nora", "out/dog")),
        ("nora=out/lr=1/dog:0.5", ("nora", "out/lr=1/dog:0.5")),
        ("out/lr=1/dog", ("", "out/lr=1/dog")),
        ("out/lr=1/{subject}:0.5", ("", "out/lr=1/{subject}:0.5")),
        ("lr=1", ("", "lr=1")),
        ("lr=1:0.5", ("", "lr=1:0.5")),
        ("lr=2", ("lr", "2")),
        ("out/dog", ("", "out/dog")),
        ("C:\\lr=1\\dog", ("", "C:\\lr=1\\dog")),
    ],
)
def test_an_equals_sign_in_a_path_is_not_a_label(
    text: str, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert split_label(text) == expected


@pytest.mark.parametrize(
    ("words", "owner", "renamed"),
    [
        ("generate", GenerateConfig, {}),
        ("evaluate --adapters a --subjects b", EvaluationConfig, {}),
        ("grid --x seed=1", GridConfig, {}),
        ("grid --x seed=1", Cell, {}),
        ("generate", BaseSource, {}),
        ("generate", Sampling, {}),
        ("mix a --output b", mix_files, {}),
        ("import a b", nora, {"r": "rank", "inner_r": "inner_rank"}),
        ("demo", run_demo, {"slug": "subject"}),
    ],
)
def test_flags_have_the_defaults_of_the_python_api(words: str, owner: Any, renamed: dict[str, str]) -> None:
    """They are stated twice, so that ``--help`` does not import torch. ``import --basis`` has its own default."""
    flags = vars(build_parser().parse(words.split()))
    for name, parameter in signature(owner).parameters.items():
        flag, default = renamed.get(name, name), parameter.default
        if isinstance(default, int | float | str) and flag in flags and (owner, flag) != (nora, "basis"):
            assert flags[flag] == default, flag


@pytest.mark.parametrize(
    ("words", "flag", "choices"),
    [
        ("mix a --output b", "--mode", Mode),
        ("export a b", "--format", Format),
        ("export a b", "--dtype", SaveDtype),
    ],
)
def test_flags_have_all_choices(words: str, flag: str, choices: Any) -> None:
    for choice in get_args(choices):
        assert getattr(build_parser().parse([*words.split(), flag, choice]), flag[2:]) == choice


def test_hyphens_in_flags_are_underscores() -> None:
    values = build_parser().parse(["generate", "--negative-prompt=a-b", "--prompt", "a-b"])
    assert (values.negative_prompt, values.prompt) == ("a-b", ["a-b"])
    assert build_parser().parse(["app", "--allow-changes"]).allow_changes


def test_the_module_runs_and_help_does_not_import_torch() -> None:
    code = "import sys; from nora_diffusion.cli import main; main(['--help'])"
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "nora_diffusion", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("nora-diffusion ")
