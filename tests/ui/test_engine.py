"""The engine and its line: stopping, memory, adapters that leave no trace, previews."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.adapters import NoraLayer
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.sampling import Sampling
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.pipelines.components import components
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.device import Device
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.messages import OUT_OF_MEMORY
from nora_diffusion.ui.preview import LatentPreview
from nora_diffusion.ui.request import Request, Wanted
from nora_diffusion.ui.runs import Progress, Run
from nora_diffusion.ui.state import App
from nora_diffusion.ui.tabs import inspect
from nora_diffusion.ui.weights import AdapterWeights

from .conftest import WAIT, until

SMALL = {"steps": 4, "guidance": 2.0, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return Engine(BaseSource(str(base), "cpu"))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "device.lock", max_waiting=2)


def request(*prompts: str, adapters: tuple[Wanted, ...] = (), seed: int = 0, **changes: Any) -> Request:
    return Request(tuple((p, seed + i) for i, p in enumerate(prompts)), Sampling(**{**SMALL, **changes}), adapters)


def run(device: Device, engine: Engine, order: Request, out: Path, watch: Any = None) -> Run:
    """Make pictures; ``watch(run, progress)`` sees every snapshot."""
    made = Run(device, "pictures", lambda run: engine.make(order, out, run))
    for progress in made.follow():
        if watch is not None:
            watch(made, progress)
    made.join(WAIT)
    return made


def pixels(file: Path) -> str:
    with Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def test_pictures_carry_their_settings(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    dog = Wanted("dog", library / "dog" / "nora_adapter.safetensors", AdapterWeights(0.8, 0.5, {"mid": 0.5}))
    made = run(device, engine, request("a dog", "a cat", adapters=(dog,), seed=7), tmp_path)
    assert made.progress.state == "done"
    settings = [read_settings(file) for file in made.progress.files]
    assert [(s.prompt, s.seed) for s in settings] == [("a dog", 7), ("a cat", 8)]
    digest = hashlib.sha256(dog.path.read_bytes()).hexdigest()
    (adapter,) = settings[0].adapters
    assert (adapter["name"], adapter["weight"], adapter["te"]) == ("dog", 0.8, 0.5)
    assert (adapter["sha256"], adapter["blocks"]) == (digest, {"mid": 0.5})


def test_a_removed_adapter_leaves_no_trace(
    base: Path, engine: Engine, device: Device, library: Path, tmp_path: Path
) -> None:
    never = run(device, Engine(BaseSource(str(base), "cpu")), request("a dog"), tmp_path / "never").progress.files[0]
    dog, hat = (Wanted(n, library / n / "nora_adapter.safetensors") for n in ("dog", "hat"))
    both = run(device, engine, request("a dog", adapters=(dog, hat)), tmp_path / "both").progress.files[0]
    one = run(device, engine, request("a dog", adapters=(hat,)), tmp_path / "one").progress.files[0]
    again = run(device, engine, request("a dog", adapters=(hat,)), tmp_path / "again").progress.files[0]
    none = run(device, engine, request("a dog"), tmp_path / "none").progress.files[0]
    zero = Wanted("dog", dog.path, AdapterWeights(0.0))
    off = run(device, engine, request("a dog", adapters=(zero,)), tmp_path / "off").progress.files[0]
    assert pixels(none) == pixels(never) == pixels(off)
    assert len({pixels(f) for f in (never, one, both)}) == 3
    assert pixels(one) == pixels(again)


def test_a_changed_file_is_loaded_anew(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    file = tmp_path / "changing.safetensors"
    digests = []
    for name in ("dog", "hat"):
        file.write_bytes((library / name / "nora_adapter.safetensors").read_bytes())
        made = run(device, engine, request("a dog", adapters=(Wanted("x", file),)), tmp_path / name)
        digests.append(read_settings(made.progress.files[0]).adapters[0]["sha256"])
    assert digests[0] != digests[1]
    file.unlink()
    gone = run(device, engine, request("a dog", adapters=(Wanted("x", file),)), tmp_path / "gone")
    assert gone.progress.state == "failed" and "gone" in gone.progress.message


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_by_part_and_block(engine: Engine, library: Path, compiled: bool) -> None:
    """A model that ``torch.compile`` wraps has the same blocks."""
    plain = engine.pipe.unet
    if compiled:
        engine.pipe.unet = torch.compile(plain, backend="eager")
    weights = AdapterWeights(0.5, 0.25, {"down": 0.0, "up": 2.0})
    engine.use([Wanted("dog", library / "dog" / "nora_adapter.safetensors", weights)])
    scales: dict[str, set[float]] = {}
    for part in ("unet", "text_encoder"):
        for path, layer in components(engine.pipe)[part].named_modules():
            for state in layer.states.values() if isinstance(layer, NoraLayer) else ():
                weight = state.scaling / state.native_scale
                scales.setdefault(f"{part}.{path.split('_block')[0]}"[:9], set()).add(weight)
    engine.use([])
    engine.pipe.unet = plain
    assert scales["unet.down"] == {0.0} and scales["unet.up"] == {1.0} and scales["text_enco"] == {0.25}
    for bad in ({"unet": float("nan")}, {"te": 1e9}, {"blocks": {"side": 1.0}}):
        with pytest.raises(UserError):
            AdapterWeights(**bad)


@contextmanager
def patient(engine: Engine, when: Callable[[Progress], bool]) -> Iterator[tuple[list[int], threading.Event]]:
    """Steps are counted, and those that start ``when`` it is so wait for the event, which says that somebody asked."""
    steps: list[int] = []
    asked = threading.Event()
    picture = engine.picture

    def slow(order: Request, prompt: str, seed: int, run: Run | None = None) -> Any:
        assert run is not None

        def check() -> None:
            steps.append(1)
            assert not when(run.progress) or asked.wait(WAIT)
            Run.check(run)

        run.check = check  # type: ignore[method-assign]
        return picture(order, prompt, seed, run)

    engine.picture = slow  # type: ignore[method-assign]
    try:
        yield steps, asked
    finally:
        del engine.picture  # type: ignore[method-assign]


def test_interrupt_ends_within_one_step(engine: Engine, device: Device, tmp_path: Path) -> None:
    def watch(made: Run, progress: Progress) -> None:
        if progress.step == 3:
            made.interrupt()
            asked.set()

    with patient(engine, lambda progress: progress.step == 3) as (steps, asked):
        made = run(device, engine, request("a dog", "a cat", steps=100), tmp_path, watch)
    assert made.progress.state == "stopped" and made.progress.files == ()
    assert len(steps) == 4  # asked after step 3, ended at the next
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_skip_leaves_one_picture_out(engine: Engine, device: Device, tmp_path: Path) -> None:
    def in_the_second(progress: Progress) -> bool:
        return progress.picture == 2 and progress.step == 1

    def watch(made: Run, progress: Progress) -> None:
        if in_the_second(progress):
            made.skip()
            asked.set()

    with patient(engine, in_the_second) as (_, asked):
        made = run(device, engine, request("a dog", "a cat", "a hat"), tmp_path, watch)
    assert made.progress.state == "done"
    assert [read_settings(f).prompt for f in made.progress.files] == ["a dog", "a hat"]


def test_skip_in_the_line_leaves_nothing_out(engine: Engine, device: Device, tmp_path: Path) -> None:
    before = device.join("another")
    assert before.wait(WAIT)
    made = Run(device, "pictures", lambda run: engine.make(request("a dog"), tmp_path, run))
    until(lambda: made.progress.ahead == 1)
    made.skip()
    before.leave()
    made.join(WAIT)
    assert made.progress.state == "done" and len(made.progress.files) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
def test_out_of_memory_is_said_and_survived(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipe.unet, "forward", fail)
        made = run(device, engine, request("a dog"), tmp_path)
    assert (made.progress.state, made.progress.message) == ("failed", OUT_OF_MEMORY)
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_other_errors_are_not_shown_but_survived(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.pipe.unet, "forward", lambda *_, **__: 1 / 0)
        made = run(device, engine, request("a dog"), tmp_path)
    assert made.progress.state == "failed" and "division" not in made.progress.message
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_a_batch_gives_each_row_its_own_adapter(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    dog, hat = (Wanted(n, library / n / "nora_adapter.safetensors") for n in ("dog", "hat"))
    order = Request((("a dog", 1), ("a dog", 1), ("a dog", 1)), Sampling(**SMALL), (dog, hat))
    rows = [[dog], [hat], []]
    made = Run(device, "batch", lambda run: engine.make_batch(order, rows, tmp_path / "batch", run))
    made.join(WAIT)
    assert made.progress.state == "done", made.progress
    single = [
        run(device, engine, request("a dog", adapters=tuple(row), seed=1), tmp_path / str(i)).progress.files[0]
        for i, row in enumerate(rows)
    ]
    for one, many in zip(single, made.progress.files, strict=True):
        a, b = (torch.tensor(list(Image.open(f).convert("RGB").tobytes())).float() for f in (one, many))
        assert (a - b).abs().max() <= 1  # one pass or three: rounding to 8 bits apart
    assert len({pixels(f) for f in made.progress.files}) == 3
    assert [[a["name"] for a in read_settings(f).adapters] for f in made.progress.files] == [["dog"], ["hat"], []]


def test_one_at_a_time_in_order(device: Device) -> None:
    order: list[str] = []
    gate, running = threading.Event(), []

    def work(name: str) -> Any:
        def body(run: Run) -> None:
            running.append(name)
            assert len(running) == 1
            if name == "first":
                gate.wait(WAIT)
            order.append(name)
            running.remove(name)

        return body

    runs = [Run(device, name, work(name)) for name in ("first", "second", "third")]
    with pytest.raises(UserError, match="queue is full"):
        Run(device, "fourth", work("fourth"))
    until(lambda: runs[2].progress.ahead == 2)
    assert (runs[2].progress.state, runs[2].progress.busy_with) == ("waiting", "first")
    runs[1].interrupt()
    runs[1].join(WAIT)
    assert runs[1].progress.state == "stopped"
    gate.set()
    for one in runs:
        one.join(WAIT)
    assert order == ["first", "third"]
    assert device.busy_with is None


def test_a_training_holds_the_device(tmp_path: Path) -> None:
    from nora_diffusion.io.files import FileLock

    device, training = Device(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert training.try_acquire()
    turn = device.join("pictures")
    assert not turn.wait(0.3)
    assert device.busy_with == "a training"
    training.release()
    assert turn.wait(WAIT)
    assert not training.try_acquire()
    turn.leave()
    assert training.try_acquire()
    training.release()


class Part(torch.nn.Module):
    """One tensor; on ``meta``, which stands for an accelerator, there may be no room for it."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.move("meta")

    def move(self, device: str) -> None:
        if self.full and device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.weight = torch.nn.Parameter(torch.ones(1, device=device))


class Placed:
    """What stands for a pipeline on an accelerator; ``moves`` are those that changed something."""

    def __init__(self) -> None:
        self.components = {"vae": Part(), "tokenizer": None, "unet": Part()}
        self.moves = list[str]()

    @property
    def parts(self) -> list[Part]:
        return [part for part in self.components.values() if part]

    @property
    def places(self) -> list[str]:
        return [part.weight.device.type for part in self.parts]

    @property
    def device(self) -> torch.device:
        """As diffusers has it: that of the first part."""
        return self.parts[0].weight.device

    def to(self, device: str, silence_dtype_warnings: bool = False) -> None:
        if {*self.places} == {device}:
            return
        for part in self.parts:
            part.move(device)
        self.moves.append(device)


def test_the_base_leaves_the_accelerator_to_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.ui.engine.set_weights", lambda *_: None)
    app = App(AppConfig(BaseSource(device="meta"), library=str(tmp_path)), tmp_path)
    app.make_room()  # nothing is loaded yet
    assert app.engine.rests
    placed = app.engine._pipe = Placed()
    pictures = app.device.join("pictures")
    assert pictures.wait(WAIT)
    app.make_room()
    assert app.device.position(app.device.join("another")) == 2 and not placed.moves  # only once it is its turn
    pictures.leave()
    until(lambda: placed.moves == ["cpu"])
    app.make_room()
    app.engine.rest()
    assert placed.moves == ["cpu"]
    for _ in range(2):
        app.engine.use([])
    assert placed.moves == ["cpu", "meta"]


def test_a_base_that_finds_no_room_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it on the accelerator would look at home, and every later picture would fail."""
    monkeypatch.setattr("nora_diffusion.ui.engine.set_weights", lambda *_: None)
    app = App(AppConfig(BaseSource(device="meta"), library=str(tmp_path)), tmp_path)
    placed = app.engine._pipe = Placed()
    app.engine.rest()
    placed.parts[1].full = True
    for _ in range(2):
        failed = Run(app.device, "pictures", lambda run: app.engine.use([]))
        failed.join(WAIT)
        assert (failed.progress.state, failed.progress.message) == ("failed", OUT_OF_MEMORY)
        assert placed.places == ["cpu", "cpu"] and app.engine.rests
    placed.parts[1].full = False
    app.engine.use([])
    assert placed.places == ["meta", "meta"]
    placed.parts[0].move("cpu")
    assert not app.engine.rests  # one part is enough to be in a training's way
    app.engine.use([])
    assert placed.places == ["meta", "meta"]


def test_an_inspection_brings_the_base_home(
    base: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples with the base, which rests on the CPU after a training."""
    app = App(AppConfig(BaseSource(str(base), "cpu"), library=str(library)), tmp_path)
    order: list[str] = []
    monkeypatch.setattr(app.engine, "use", lambda adapters: order.append(f"use {adapters}"))
    monkeypatch.setattr(inspect, "iter_spectra", lambda *_: iter(order.append("spectra") or ()))
    list(inspect.inspector(app)("dog", False))
    assert order == ["use []", "spectra"]


def test_a_preview_that_fails_costs_no_picture(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.look(torch.zeros(4, 2, 2)).startswith("data:image/png")
    assert engine.look(torch.zeros(16, 64)) == ""  # as Flux packs its latents
    monkeypatch.setattr(engine.preview, "weight", None)
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_a_closed_page_stops_its_run(engine: Engine, device: Device, tmp_path: Path) -> None:
    closed = threading.Event()

    def work(run: Run) -> None:
        assert closed.wait(WAIT)
        engine.make(request("a dog"), tmp_path, run)

    made = Run(device, "pictures", work)
    follower = made.follow()
    next(follower)
    follower.close()
    closed.set()
    made.join(WAIT)
    assert made.progress.state == "stopped"


def quickest(work: Callable[[], object], times: int) -> float:
    """Seconds of this thread, at the best of several tries: what else the machine does is no part of it."""
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


def test_the_preview_is_close_and_cheap() -> None:
    """Against the embedded base's own decoder: the linear map explains most of the color, at a small cost."""
    from nora_diffusion import load_base

    pipe = load_base()
    preview = LatentPreview.fit(pipe.vae)
    generator = torch.Generator().manual_seed(5)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5, generator=generator), (64, 64), mode="bicubic")
    picture = picture.clamp(0, 1)
    with torch.no_grad():
        latents = pipe.vae.encode(picture * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        step = quickest(lambda: pipe.unet(latents.repeat(2, 1, 1, 1), 500, torch.zeros(2, 32, 160)), 5)
    small = torch.nn.functional.interpolate(picture, (16, 16), mode="area")[0]
    error = (preview.rgb(latents[0]) - small).square().mean()
    assert error < 0.2 * small.var(), (error, small.var())
    assert preview.data_uri(latents[0]).startswith("data:image/png;base64,")
    cost = quickest(lambda: preview.data_uri(latents[0]), 20)
    # One preview for every third of 20 steps (and fewer, relatively, for more): under a tenth of the time.
    assert cost / 3 < 0.1 * step, (cost, step)
