"""Faults injected into every command: full disks, refused and failing files, signals, odd values, names and consoles.

Whatever goes wrong outside the program, a command ends with one sentence and an exit code, without a stack trace, and
every file that it leaves is whole. The faults come from an audit hook, which Python calls before it opens, creates,
renames or links a file, so that they also reach the file access of other libraries.
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import result_files
import torch
from factories import tiny_clip, write_photos
from fake_ray import RayOfClients
from PIL import Image

import nora_diffusion.serving.http.server
import nora_diffusion.ui.server
from nora_diffusion import UserError, add_adapter, export_lora, nora, open_pipeline, save_adapter
from nora_diffusion.cli import COMMANDS, build_parser, main
from nora_diffusion.formats.pack_writing import create_pack
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.results.files import write_results
from nora_diffusion.serving.request import Request
from nora_diffusion.training.settings.config import settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="names and signals of POSIX")]
Capture = pytest.CaptureFixture[str]

ODD_NAME = os.fsdecode(b"caf\xe9 \xf0\x9f\x90\x95 12:30 'x' %s {}")
"""A folder's name that is not UTF-8, with an emoji, a colon, quotes and placeholders."""
SAMPLING = "--base {base} --steps 2 --width 16 --height 16"
TRAINING = (
    "train --instance_data_dir photos --pretrained_model_name_or_path {base} --rank 4 --inner_rank 2 --basis orthogonal"
    " --max_train_steps 2 --checkpointing_steps 1 --mixed_precision no --instance_prompt a+sks+dog --output_dir out/run"
)
CHEAP = {
    "inspect": "inspect dog --overlap hat --json",
    "methods": "methods --method nora --layout sd15",
    "mix": "mix dog:0.5 hat --output out/mix",
    "export": "export dog out/dog.safetensors --format kohya",
    "pack create": "pack create out/pets.nora_pack.safetensors dog other=dog",
    "pack add": "pack add pets.nora_pack.safetensors other=dog",
    "pack list": "pack list pets.nora_pack.safetensors",
    "pack extract": "pack extract pets.nora_pack.safetensors dog out/dog",
    "pack remove": "pack remove pets.nora_pack.safetensors third",
    "data": "data photos --out out/data --resolution 16",
    "leaderboard": "leaderboard results.json --out out",
    "app": "app --library out/library --port 0",
}
WITH_BASE = {
    "import": "import plain.safetensors out/imported --base {base} --rank 4 --inner_rank 2 --basis orthogonal",
    "generate": f"generate --prompt a+sks+dog --adapter dog --out out {SAMPLING}",
    "generate from an image": "generate --prompt a+dog --init_image start.png --mask white.png --strength 1"
    f" --out out {SAMPLING}",
    "grid": f"grid --x seed=1 --prompt a+dog --adapter dog --out out {SAMPLING}",
    "evaluate": "evaluate --adapters dog --subjects photos --prompts prompts.txt --seeds 1 --judge tiny --out out "
    + SAMPLING,
    "mix gated": "mix dog hat --mode gated --base {base} --images photos --steps 2 --mixed_precision no "
    "--output out/mix",
    "train": TRAINING,
    "serve": "serve --base {base} --subjects dog pets.nora_pack.safetensors --uploads out/uploads --port 0",
    "sweep": "sweep sweep.yaml --out out/sweep --at_once 2",
    "basis learn": "basis learn --base {base} --subjects 1 --steps 2 --images 1 --rank 2 --out out/basis",
    "federate": TRAINING.replace(
        "train --instance_data_dir photos", "federate --clients clients.yaml --rounds 1"
    ).replace(" --instance_prompt a+sks+dog", ""),
    "demo": "demo --out out/demo --max_train_steps 2",
}
ALL = CHEAP | WITH_BASE
LONG = ("sweep", "basis learn", "demo", "mix gated", "federate", "generate from an image")
"""Those that do what others do, several times over."""


def test_every_command_is_here() -> None:
    assert {name.split()[0] for name in ALL} == {*COMMANDS, "train", "federate"}


@pytest.fixture(scope="module", autouse=True)
def embedded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tiny base and judge instead of the embedded ones, with which the demo takes minutes."""
    weights = tmp_path_factory.mktemp("weights")
    shutil.copytree(tiny_base, weights / "pipeline")
    tiny_clip(weights / "judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nora_diffusion.pipelines.base.EMBEDDED_WEIGHTS", weights)
        patch.setattr("nora_diffusion.scoring.judges.EMBEDDED_WEIGHTS", weights)
        patch.setattr("nora_diffusion.pipelines.base.EMBEDDED_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    pipe: Any = open_pipeline(tiny_base)
    for name in ("dog", "hat", "third"):
        add_adapter(pipe, nora(r=4, inner_r=2), name, ("unet",))
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=0.5)
        save_adapter(pipe, folder / name, name, info={"trigger": "sks", "class_word": "dog"})
    create_pack(folder / "pets.nora_pack.safetensors", [str(folder / "dog"), str(folder / "third")])
    export_lora(folder / "hat", folder / "plain.safetensors")
    write_results(result_files.example(), folder / "results.json")
    write_photos(folder / "photos", 2)
    for name in ("start", "white"):
        Image.new("RGB", (24, 24), "white").save(folder / f"{name}.png")
    (folder / "prompts.txt").write_text("{} on the beach\n")
    own = {"instance_data_dir": "photos", "instance_prompt": "a sks dog", "basis": "orthogonal", "inner_rank": "2"}
    common = {**own, "max_train_steps": "2", "checkpointing_steps": "1", "rank": "4"}
    (folder / "sweep.yaml").write_text(json.dumps({"settings": common, "axes": {"seed": ["0", "1"]}}))
    clients = [
        {"name": name, "instance_data_dir": "photos", "instance_prompt": "a sks dog"} for name in ("home", "office")
    ]
    (folder / "clients.yaml").write_text(json.dumps(clients))
    return folder


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """``place()`` makes a fresh working folder with the inputs, and enters it."""
    count = 0

    def fresh() -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"{ODD_NAME} {count}"
        folder.mkdir()
        for source in inputs.rglob("*"):
            copy = folder / source.relative_to(inputs)
            copy.mkdir(exist_ok=True) if source.is_dir() else copy.write_bytes(source.read_bytes())
        monkeypatch.chdir(folder)
        return folder

    monkeypatch.setattr(nora_diffusion.ui.server, "wait", lambda ended: None)
    monkeypatch.setattr(nora_diffusion.ui.server, "clean_environment", lambda files: None)
    monkeypatch.setattr(nora_diffusion.ui.server, "_served", served)
    monkeypatch.setattr(nora_diffusion.serving.http.server, "wait", lambda: None)
    monkeypatch.setattr(nora_diffusion.serving.http.server, "served", answered)
    monkeypatch.setattr(nora_diffusion.ui.state.App, "warm_up", lambda app: None)
    monkeypatch.setitem(sys.modules, "ray", RayOfClients())
    return fresh


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Instead of a web server: whatever the app reads from its library."""
    app.library.hash_all(app.library.entries())
    app.jobs.list()
    yield "http://localhost"


@contextmanager
def answered(state: Any) -> Iterator[str]:
    """Instead of a web server: one picture of the engine."""
    sampling = Sampling(2, 4.0, width=16, height=16)
    state.submit(Request("a sks dog <lora:dog>", sampling)).pictures()
    yield "http://localhost"


def words(command: str, base: Path) -> list[str]:
    return [word.replace("+", " ").format(base=base) for word in command.split()]


class Faults:
    """``strike`` is called before the ``at``-th access (or from it on, if ``lasting``) below ``folder``."""

    def __init__(self) -> None:
        self.strike: Callable[[str], None] | None = None
        self.folder, self.writes, self.at, self.lasting, self.seen = "", True, 0, False, 0
        sys.addaudithook(self._hook)

    @contextmanager
    def armed(self, strike: Callable[[str], None], folder: Path, at: int, **options: bool) -> Iterator[None]:
        self.folder, self.at, self.seen = str(folder), at, 0
        self.writes, self.lasting = options.get("writes", True), options.get("lasting", False)
        self.strike = strike
        try:
            yield
        finally:
            self.strike = None

    @property
    def struck(self) -> bool:
        return self.seen >= self.at

    def _hook(self, event: str, values: tuple[Any, ...]) -> None:
        if self.strike is None or event not in ("open", "os.mkdir", "os.rename", "os.link"):
            return
        writes = event != "open" or bool(values[2] & (os.O_WRONLY | os.O_RDWR))
        if writes != self.writes or isinstance(values[0], int):
            return
        path = os.path.abspath(os.fsdecode(values[0]))  # noqa: PTH100
        if not path.startswith(self.folder):
            return
        self.seen += 1
        if self.seen == self.at or (self.lasting and self.struck):
            strike, self.strike = self.strike, None  # what it does itself is no access of the command
            try:
                strike(path)
            finally:
                self.strike = strike


FAULTS = Faults()


def fails(number: int) -> Callable[[str], None]:
    def strike(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return strike


def sends(number: signal.Signals) -> Callable[[str], None]:
    return lambda _: signal.raise_signal(number)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_stop(number: signal.Signals, code: int, folder: Path, capsys: Capture, about: object) -> str:
    """Done, or one sentence and the signal's exit code, and no temporary file is left. Returns the output."""
    err = capsys.readouterr().err
    sentences = [line for line in err.split("\n") if line.startswith("stopped ")]
    assert code in (0, 128 + number) and "Traceback" not in err and len(sentences) == (code != 0), (about, code, err)
    assert not [file for file in folder.rglob(".*") if re.fullmatch(r"\..*\.[0-9a-f]{8}", file.name)], about
    check_files(folder, about)
    return err


def check_end(code: int, capsys: Capture, about: object) -> None:
    """Exit code 0, or 2 with one sentence."""
    err = capsys.readouterr().err
    errors = [line for line in err.split("\n") if line.startswith("error: ")]
    as_it_should = code in (0, 2) and "Traceback" not in err and len(errors) == (code == 2)
    assert as_it_should, ascii((about, code, err))


def check_files(folder: Path, about: object) -> None:
    """Every file is whole, apart from hidden ones, which are temporary."""
    for file in folder.rglob("*"):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix == ".safetensors":
            TensorFile(file).close()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".png":
            with Image.open(file) as image:
                image.load()
        elif file.suffix == ".jsonl":
            [json.loads(line) for line in file.read_text().splitlines()]
        else:
            assert file.stat().st_size or file.parent.name == "photos", (about, file)


def positions(command: str) -> Iterator[int]:
    """Which accesses fail: all of the cheap commands, and ever fewer of the others."""
    at = 1
    while at < 400:
        yield at
        at += 1 if command in CHEAP or at < 3 else at * (2 if command in LONG else 1)


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("fault", ["full disk", "no permission", "broken disk", "signal"])
def test_the_nth_access_fails(
    command: str, fault: str, place: Callable[[], Path], tiny_base: Path, capsys: Capture
) -> None:
    """Writes fail, for good or once; reads fail; or Ctrl-C and SIGTERM, in turn, arrive at that moment."""
    for at in positions(command):
        strike, options = {
            "full disk": (fails(errno.ENOSPC), {"lasting": True}),
            "no permission": (fails(errno.EACCES), {}),
            "broken disk": (fails(errno.EIO), {"writes": False}),
            "signal": (sends(SIGNALS[at % 2]), {}),
        }[fault]
        folder = place()
        about = (command, fault, at)
        with FAULTS.armed(strike, folder, at, **options):
            code = main(words(ALL[command], tiny_base))
        if fault == "signal":
            check_stop(SIGNALS[at % 2], code, folder, capsys, about)
        else:
            check_end(code, capsys, about)
            check_files(folder, about)
        if not FAULTS.struck:
            assert code == 0, about
            return


@contextmanager
def at_call(at: int, strike: Callable[[str], None]) -> Iterator[None]:
    """Call ``strike`` before the ``at``-th call of a module of any model, so while a command computes."""
    calls = itertools.count(1)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: strike("") if next(calls) == at else None
    )
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("command", WITH_BASE)
def test_a_signal_while_it_computes(command: str, place: Callable[[], Path], tiny_base: Path, capsys: Capture) -> None:
    """The same command can be given again; a training goes on from its checkpoint if the message says so."""
    for at, number in zip((1, 700, 1500), itertools.cycle(SIGNALS), strict=False):
        folder, about = place(), (command, at)
        with at_call(at, sends(number)):
            code = main(words(WITH_BASE[command], tiny_base))
        err = check_stop(number, code, folder, capsys, about)
        if code:
            resumed = ["--resume_from_checkpoint", "latest"] if "--resume_from_checkpoint latest" in err else []
            assert main([*words(WITH_BASE[command], tiny_base), *resumed]) == 0, about
            check_files(folder, about)


@pytest.mark.parametrize("command", [*CHEAP, "generate", "train"])
@pytest.mark.parametrize("limit", [0, 100, 3000, 30_000])
def test_the_disk_takes_no_more_bytes(
    command: str, limit: int, place: Callable[[], Path], tiny_base: Path, capsys: Capture
) -> None:
    """A limit on the size of files, which also stops the native code of other libraries."""
    import resource

    folder = place()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(words(ALL[command], tiny_base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_end(code, capsys, (command, limit))
    check_files(folder, (command, limit))


@pytest.mark.parametrize("command", CHEAP)
def test_the_temporary_folder_is_full(
    command: str, place: Callable[[], Path], tiny_base: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place()
    (folder / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    with FAULTS.armed(fails(errno.ENOSPC), folder / "temporary", 1, lasting=True):
        code = main(words(ALL[command], tiny_base))
    check_end(code, capsys, command)
    assert code == (2 if command == "app" else 0)


class Console(io.TextIOWrapper):
    """A console with a code page, whose reader may have gone or whose disk may be full."""

    def __init__(self, encoding: str, error: OSError | None = None) -> None:
        self.content = io.BytesIO()
        self.error, self.printed = error, False
        super().__init__(self.content, encoding, "strict")

    def flush(self) -> None:
        if self.error and self.printed:
            raise self.error
        super().flush()

    def write(self, text: str) -> int:
        self.printed = True
        return super().write(text)


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_name_on_any_console(
    command: str, encoding: str, place: Callable[[], Path], tiny_base: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In a folder whose name is not UTF-8, given by absolute paths, every command does its work and prints it."""
    folder, console = place(), Console(encoding)
    for name in os.listdir(folder / "photos"):  # noqa: PTH208
        (folder / "photos" / name).rename(folder / "photos" / f"{ODD_NAME} {name}")
    subjects = {"pack extract": ["dog"], "pack remove": ["third"]}.get(command, [])
    names = {"out", *(path.name for path in folder.iterdir())} - set(subjects)
    absolute = [
        str(folder / word) if word.split("/")[0].split(":")[0] in names else word
        for word in words(ALL[command], tiny_base)
    ]
    monkeypatch.setattr(sys, "stdout", console)
    code = main(absolute)
    err = capsys.readouterr().err
    if command == "basis learn":  # it lists its images in a YAML file, which is UTF-8
        assert code == 2 and "is not a UTF-8 name" in err and not (folder / "out").exists(), ascii(err)
        return
    assert (code, "Traceback" in err) == (0, False), ascii(err)
    console.flush()
    assert (b"\\udce9" in console.content.getvalue()) == (command not in ("methods", "pack list", "app", "serve"))
    check_files(folder, command)
    assert command in ("inspect", "methods", "pack add", "pack list", "pack remove") or any((folder / "out").iterdir())


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize(("number", "expected"), [(errno.EPIPE, 141), (errno.ENOSPC, 2)])
def test_the_output_cannot_be_written(
    command: str, number: int, expected: int, place: Callable[[], Path], tiny_base: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The reader has gone, as in ``| head``, or the output goes to a full disk. The work is done nevertheless."""
    folder = place()
    console = Console("utf-8", OSError(number, os.strerror(number)))
    monkeypatch.setattr(sys, "stdout", console)
    code = main(words(ALL[command], tiny_base))
    console.error = None
    err = capsys.readouterr().err
    assert code == expected and "Traceback" not in err and ("error: cannot write the output" in err) == (code == 2)
    check_files(folder, command)
    assert command in ("inspect", "methods", "pack add", "pack list", "pack remove") or any((folder / "out").iterdir())


ODD_VALUES = (
    "", " ", "nan", "inf", "-1", "0", "1e400", "9" * 5000, "x" * 300, "x" * 25_000, "a/" * 3000, "a\0b", "\ud83d",
    "/proc", ".", "..", "~nobody/x", "/dev/null/x", "dog:nan", "{x}", "%s", "\N{DOG}\n\x1b[2J", ODD_NAME, "é\u2028",
)  # fmt: skip
"""None leads to a folder outside the test's that root could write to."""
STUB = "the base would be opened now"


def odd_lines(command: str, base: Path) -> Iterator[list[str]]:
    """The command with each flag and each argument in turn set to odd values, by turns, as all would take minutes."""
    given, step = words(ALL[command], base), 2 if command in CHEAP else 4
    for number, (before, flag, after) in enumerate(odd_places(command, given)):
        yield from ([*before, flag + value, *after] for value in ODD_VALUES[number % step :: step])


def odd_places(command: str, given: list[str]) -> Iterator[tuple[list[str], str, list[str]]]:
    if command == "train":
        yield from ((given, f"--{setting.name}=", []) for setting in settings())
        return
    parser: argparse.ArgumentParser = build_parser()
    for name in command.split():
        verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        parser = parser if verbs is None else verbs.choices[name]  # "gated" is a mode of "mix"
    flags = [action.option_strings[-1] for action in parser._actions if action.option_strings and action.nargs != 0]
    yield from ((given, f"{flag}=", []) for flag in flags)
    for index, word in enumerate(given):
        if index >= len(command.split()) and not word.startswith("--"):
            yield given[:index], "", given[index + 1 :]


@pytest.mark.parametrize("command", ALL)
def test_odd_values(
    command: str, place: Callable[[], Path], tiny_base: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the point where the base is opened."""

    def opened(*_: object, **__: object) -> None:
        raise UserError(STUB)

    monkeypatch.setattr("nora_diffusion.pipelines.base._from_pretrained", opened)
    monkeypatch.setattr("nora_diffusion.training.planning.opening.open_pipeline", opened, raising=False)
    place()
    bugs = []
    for line in odd_lines(command, tiny_base):
        try:
            check_end(main(line), capsys, [word[:50] for word in line])
        except Exception as error:
            bugs.append(ascii((line[-1][:60], repr(error)[:300])))
    assert not bugs, "\n".join(bugs)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("nora_diffusion", "inspect nowhere"),
        ("nora_diffusion.tiny_sd.examples", "--out /dev/null/x"),
        ("nora_diffusion.tiny_sd.sprites", "--font nowhere.ttf"),
        ("nora_diffusion.tiny_sd.evaluate", "--weights nowhere"),
        ("nora_diffusion.tiny_sd.comparing", "--weights nowhere"),
        ("nora_diffusion.tiny_sd.train", "--stage vae --out /dev/null/x --steps 1"),
        ("nora_diffusion.ui.jobs.worker", "nowhere"),
    ],
)
def test_every_program_has_the_edge(module: str, arguments: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert done.stderr.split("\n")[-2].startswith("error: ")
