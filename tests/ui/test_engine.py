"""The engine and the queue: stopping, memory, adapters that leave no trace, previews."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.adapters import NoraLayer
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.generation.latent_preview import LatentPreview
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.pipelines.components import components
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.device import Device
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.messages import OUT_OF_MEMORY
from nora_diffusion.ui.request import ActiveAdapter, Request
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


def request(*prompts: str, adapters: tuple[ActiveAdapter, ...] = (), seed: int = 0, **changes: Any) -> Request:
    return Request(tuple((p, seed + i) for i, p in enumerate(prompts)), Sampling(**{**SMALL, **changes}), adapters)


def run(device: Device, engine: Engine, order: Request, out: Path, watch: Any = None) -> Run:
    """Generate images; ``watch(run, progress)`` gets every snapshot."""
    made = Run(device, "images", lambda run: engine.make(order, out, run))
    for progress in made.follow():
        if watch is not None:
            watch(made, progress)
    made.join(WAIT)
    return made


def pixels(file: Path) -> str:
    with Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def test_images_contain_their_settings(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    dog = ActiveAdapter("dog", library / "dog" / "nora_adapter.safetensors", AdapterWeights(0.8, 0.5, {"mid": 0.5}))
    made = run(device, engine, request("a dog", "a cat", adapters=(dog,), seed=7), tmp_path)
    assert made.progress.state == "done"
    settings = [read_settings(file) for file in made.progress.files]
    assert [(s.prompt, s.seed) for s in settings] == [("a dog", 7), ("a cat", 8)]
    digest = hashlib.sha256(dog.path.read_bytes()).hexdigest()
    (adapter,) = settings[0].adapters
    assert (adapter["name"], adapter["weight"], adapter["te"]) == ("dog", 0.8, 0.5)
    assert (adapter["sha256"], adapter["blocks"]) == (digest, {"mid": 0.5})


def test_subjects_are_kept_apart_unless_switched_off(
    engine: Engine, device: Device, library: Path, tmp_path: Path
) -> None:
    """Only where the prompt names both; the image's settings have the words of each."""
    pair = tuple(ActiveAdapter(name, library / name / "nora_adapter.safetensors") for name in ("dog", "hat"))
    apart = request("a sks dog, a zwx hat", "a sks dog, a hat", adapters=pair)
    files = [
        run(device, engine, replace(apart, subjects_apart=switch), tmp_path).progress.files for switch in (True, False)
    ]
    assert [[pixels(one) == pixels(two)] for one, two in zip(*files, strict=True)] == [[False], [True]]
    words = [[adapter.get("words") for adapter in read_settings(file).adapters] for file in (*files[0], files[1][0])]
    assert words == [["sks dog", "zwx"], [None, None], [None, None]]


def test_a_removed_adapter_leaves_no_trace(
    base: Path, engine: Engine, device: Device, library: Path, tmp_path: Path
) -> None:
    never = run(device, Engine(BaseSource(str(base), "cpu")), request("a dog"), tmp_path / "never").progress.files[0]
    dog, hat = (ActiveAdapter(n, library / n / "nora_adapter.safetensors") for n in ("dog", "hat"))
    both = run(device, engine, request("a dog", adapters=(dog, hat)), tmp_path / "both").progress.files[0]
    one = run(device, engine, request("a dog", adapters=(hat,)), tmp_path / "one").progress.files[0]
    again = run(device, engine, request("a dog", adapters=(hat,)), tmp_path / "again").progress.files[0]
    none = run(device, engine, request("a dog"), tmp_path / "none").progress.files[0]
    zero = ActiveAdapter("dog", dog.path, AdapterWeights(0.0))
    off = run(device, engine, request("a dog", adapters=(zero,)), tmp_path / "off").progress.files[0]
    assert pixels(none) == pixels(never) == pixels(off)
    assert len({pixels(f) for f in (never, one, both)}) == 3
    assert pixels(one) == pixels(again)


def test_a_changed_file_is_reloaded(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    file = tmp_path / "changing.safetensors"
    digests = []
    for name in ("dog", "hat"):
        file.write_bytes((library / name / "nora_adapter.safetensors").read_bytes())
        made = run(device, engine, request("a dog", adapters=(ActiveAdapter("x", file),)), tmp_path / name)
        digests.append(read_settings(made.progress.files[0]).adapters[0]["sha256"])
    assert digests[0] != digests[1]
    file.unlink()
    gone = run(device, engine, request("a dog", adapters=(ActiveAdapter("x", file),)), tmp_path / "gone")
    assert gone.progress.state == "failed" and "gone" in gone.progress.message


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_by_component_and_block(engine: Engine, library: Path, compiled: bool) -> None:
    """Blocks are found in a model that ``torch.compile`` wraps, too."""
    plain = engine.pipe.unet
    if compiled:
        engine.pipe.unet = torch.compile(plain, backend="eager")
    weights = AdapterWeights(0.5, 0.25, {"down": 0.0, "up": 2.0})
    engine.use([ActiveAdapter("dog", library / "dog" / "nora_adapter.safetensors", weights)])
    scales: dict[str, set[float]] = {}
    for component in ("unet", "text_encoder"):
        for path, layer in components(engine.pipe)[component].named_modules():
            for state in layer.states.values() if isinstance(layer, NoraLayer) else ():
                weight = state.scaling / state.native_scale
                scales.setdefault(f"{component}.{path.split('_block')[0]}"[:9], set()).add(weight)
    engine.use([])
    engine.pipe.unet = plain
    assert scales["unet.down"] == {0.0} and scales["unet.up"] == {1.0} and scales["text_enco"] == {0.25}
    for bad in ({"unet": float("nan")}, {"te": 1e9}, {"blocks": {"side": 1.0}}):
        with pytest.raises(UserError):
            AdapterWeights(**bad)


@contextmanager
def patient(engine: Engine, when: Callable[[Progress], bool]) -> Iterator[tuple[list[int], threading.Event]]:
    """Count steps. A step for which ``when(progress)`` holds waits for the event, which the test sets."""
    steps: list[int] = []
    asked = threading.Event()
    generate = engine.generate

    def slow(order: Request, prompt: str, seed: int, run: Run) -> Any:

        def check() -> None:
            steps.append(1)
            assert not when(run.progress) or asked.wait(WAIT)
            Run.check(run)

        run.check = check  # type: ignore[method-assign]
        return generate(order, prompt, seed, run)

    engine.generate = slow  # type: ignore[method-assign]
    try:
        yield steps, asked
    finally:
        del engine.generate  # type: ignore[method-assign]


def test_interrupt_ends_within_one_step(engine: Engine, device: Device, tmp_path: Path) -> None:
    def watch(made: Run, progress: Progress) -> None:
        if progress.step == 3:
            made.interrupt()
            asked.set()

    with patient(engine, lambda progress: progress.step == 3) as (steps, asked):
        made = run(device, engine, request("a dog", "a cat", steps=100), tmp_path, watch)
    assert made.progress.state == "stopped" and made.progress.files == ()
    assert len(steps) in (3, 4)  # interrupted after step 3, stopped within the next one or at its end
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_skip_leaves_one_image_out(engine: Engine, device: Device, tmp_path: Path) -> None:
    def in_second_image(progress: Progress) -> bool:
        return progress.image == 2 and progress.step == 1

    def watch(made: Run, progress: Progress) -> None:
        if in_second_image(progress):
            made.skip()
            asked.set()

    with patient(engine, in_second_image) as (_, asked):
        made = run(device, engine, request("a dog", "a cat", "a hat"), tmp_path, watch)
    assert made.progress.state == "done"
    assert [read_settings(f).prompt for f in made.progress.files] == ["a dog", "a hat"]


def test_skip_while_waiting_skips_nothing(engine: Engine, device: Device, tmp_path: Path) -> None:
    before = device.join("another")
    assert before.wait(WAIT)
    made = Run(device, "images", lambda run: engine.make(request("a dog"), tmp_path, run))
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
def test_out_of_memory_is_reported_and_survived(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipe.unet, "forward", fail)
        made = run(device, engine, request("a dog"), tmp_path)
    assert (made.progress.state, made.progress.message) == ("failed", OUT_OF_MEMORY)
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_other_errors_are_hidden_and_survived(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.pipe.unet, "forward", lambda *_, **__: 1 / 0)
        made = run(device, engine, request("a dog"), tmp_path)
    assert made.progress.state == "failed" and "division" not in made.progress.message
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_a_batch_gives_each_row_its_own_adapter(engine: Engine, device: Device, library: Path, tmp_path: Path) -> None:
    dog, hat = (ActiveAdapter(n, library / n / "nora_adapter.safetensors") for n in ("dog", "hat"))
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
        assert (a - b).abs().max() <= 1  # one batch and three differ by rounding to 8 bits
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
    turn = device.join("images")
    assert not turn.wait(0.3)
    assert device.busy_with == "a training"
    training.release()
    assert turn.wait(WAIT)
    assert not training.try_acquire()
    turn.leave()
    assert training.try_acquire()
    training.release()


class FakeComponent(torch.nn.Module):
    """One tensor. The ``meta`` device stands for an accelerator, which may be ``full``."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.move("meta")

    def move(self, device: str) -> None:
        if self.full and device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.weight = torch.nn.Parameter(torch.ones(1, device=device))


class FakePipeline:
    """A pipeline on an accelerator; ``moves`` are the calls of ``to`` that changed the device."""

    def __init__(self) -> None:
        self.components = {"vae": FakeComponent(), "tokenizer": None, "unet": FakeComponent()}
        self.moves = list[str]()

    @property
    def modules(self) -> list[FakeComponent]:
        return [module for module in self.components.values() if module]

    @property
    def devices(self) -> list[str]:
        return [module.weight.device.type for module in self.modules]

    @property
    def device(self) -> torch.device:
        """As in diffusers: the device of the first module."""
        return self.modules[0].weight.device

    def to(self, device: str, silence_dtype_warnings: bool = False) -> None:
        if {*self.devices} == {device}:
            return
        for module in self.modules:
            module.move(device)
        self.moves.append(device)


def test_the_base_leaves_the_accelerator_to_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.ui.engine.set_weights", lambda *_: None)
    app = App(AppConfig(BaseSource(device="meta"), library=str(tmp_path)), tmp_path)
    app.make_room()  # nothing is loaded yet
    assert app.engine.offloaded
    pipe = app.engine._pipe = FakePipeline()
    images = app.device.join("images")
    assert images.wait(WAIT)
    app.make_room()
    assert app.device.position(app.device.join("another")) == 2 and not pipe.moves  # it waits for its turn
    images.leave()
    until(lambda: pipe.moves == ["cpu"])
    app.make_room()
    app.engine.offload()
    assert pipe.moves == ["cpu"]
    for _ in range(2):
        app.engine.use([])
    assert pipe.moves == ["cpu", "meta"]


def test_a_base_that_does_not_fit_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: a base that is half on the accelerator would fail for every later image."""
    monkeypatch.setattr("nora_diffusion.ui.engine.set_weights", lambda *_: None)
    app = App(AppConfig(BaseSource(device="meta"), library=str(tmp_path)), tmp_path)
    pipe = app.engine._pipe = FakePipeline()
    app.engine.offload()
    pipe.modules[1].full = True
    for _ in range(2):
        failed = Run(app.device, "images", lambda run: app.engine.use([]))
        failed.join(WAIT)
        assert (failed.progress.state, failed.progress.message) == ("failed", OUT_OF_MEMORY)
        assert pipe.devices == ["cpu", "cpu"] and app.engine.offloaded
    pipe.modules[1].full = False
    app.engine.use([])
    assert pipe.devices == ["meta", "meta"]
    pipe.modules[0].move("cpu")
    assert not app.engine.offloaded  # one module on the accelerator is enough
    app.engine.use([])
    assert pipe.devices == ["meta", "meta"]


def test_an_inspection_moves_the_base_to_its_device(
    base: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples with the base, which is on the CPU after a training."""
    app = App(AppConfig(BaseSource(str(base), "cpu"), library=str(library)), tmp_path)
    order: list[str] = []
    monkeypatch.setattr(app.engine, "use", lambda adapters: order.append(f"use {adapters}"))
    monkeypatch.setattr(inspect, "iter_spectra", lambda *_: iter(order.append("spectra") or ()))
    list(inspect.inspect_handler(app)("dog", False))
    assert order == ["use []", "spectra"]


def test_a_failed_preview_does_not_lose_the_image(
    engine: Engine, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.preview_uri(torch.zeros(4, 2, 2)).startswith("data:image/png")
    assert engine.preview_uri(torch.zeros(16, 7)) == ""  # latents of an unknown form
    monkeypatch.setattr(engine.preview, "weight", None)
    assert run(device, engine, request("a dog"), tmp_path).progress.state == "done"


def test_a_closed_page_stops_its_run(engine: Engine, device: Device, tmp_path: Path) -> None:
    closed = threading.Event()

    def work(run: Run) -> None:
        assert closed.wait(WAIT)
        engine.make(request("a dog"), tmp_path, run)

    made = Run(device, "images", work)
    follower = made.follow()
    next(follower)
    follower.close()
    closed.set()
    made.join(WAIT)
    assert made.progress.state == "stopped"


def quickest(work: Callable[[], object], times: int) -> float:
    """CPU seconds of this thread, the minimum of several tries, so that other processes do not count."""
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


def test_the_preview_is_close_and_cheap() -> None:
    """Compared with the embedded base's decoder: the linear map explains most of the color, at a small cost."""
    from nora_diffusion import load_base

    pipe = load_base()
    preview = LatentPreview.fit(pipe.vae)
    generator = torch.Generator().manual_seed(5)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5, generator=generator), (64, 64), mode="bicubic")
    image = image.clamp(0, 1)
    with torch.no_grad():
        latents = pipe.vae.encode(image * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        step = quickest(lambda: pipe.unet(latents.repeat(2, 1, 1, 1), 500, torch.zeros(2, 32, 160)), 5)
    small = torch.nn.functional.interpolate(image, (16, 16), mode="area")[0]
    error = (preview.rgb(latents[0]) - small).square().mean()
    assert error < 0.2 * small.var(), (error, small.var())
    assert preview.data_uri(latents[0]).startswith("data:image/png;base64,")
    cost = quickest(lambda: preview.data_uri(latents[0]), 20)
    # With 20 steps there is one preview for every third step: it must cost less than a tenth of the time.
    assert cost / 3 < 0.1 * step, (cost, step)
