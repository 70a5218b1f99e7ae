"""Whatever happens to files, clocks and clients: an accepted request ends in its picture, or in a sentence."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from solo_runs import NAMES, Alone, ask, gray_levels_apart, write_library

from nora_diffusion import UserError, create_pack, open_pipeline
from nora_diffusion.generation.library import list_library, subjects_of_pack
from nora_diffusion.serving.engine import Engine
from nora_diffusion.serving.tickets import Ticket

PACK = "all.nora_pack.safetensors"


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    return open_pipeline(tiny_base)


@pytest.fixture(scope="module")
def library(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tiny_base, tmp_path_factory.mktemp("library"))


@pytest.fixture
def pack(library: Path, tmp_path: Path) -> Path:
    """A pack of two subjects, which are the same adapter under two names."""
    return create_pack(tmp_path / PACK, {"one": library / "dog", "two": library / "dog"})


def image(ticket: Ticket) -> Any:
    (picture,) = ticket.pictures()
    return picture.image


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "empty", "header"])
def test_a_pack_that_breaks_while_it_serves(pipe: Any, pack: Path, damage: str) -> None:
    intact = pack.read_bytes()
    with Engine(pipe, subjects_of_pack(pack), at_once=1) as engine:
        first = engine.submit(ask("a sks dog <lora:one>", steps=40))
        waiting = engine.submit(ask("a sks dog <lora:two>"))
        next(event for event in first.events() if event.kind == "step")
        changed = {
            "cut": intact[: len(intact) // 2], "garbage": random.Random(0).randbytes(len(intact)), "empty": b"",
            "header": (2**62).to_bytes(8, "little") + intact[8:], "gone": b"",
        }[damage]  # fmt: skip
        pack.write_bytes(changed)
        if damage == "gone":
            pack.unlink()
        image(first)  # it is in memory
        with pytest.raises(UserError, match=PACK):
            image(waiting)
        with pytest.raises(UserError, match=PACK):
            image(engine.submit(ask("a sks dog <lora:two>")))
        image(engine.submit(ask("a red car")))
        pack.write_bytes(intact)
        image(engine.submit(ask("a sks dog <lora:two>")))


def test_new_content_of_a_pack_is_served(tiny_base: Path, library: Path, pipe: Any, tmp_path: Path) -> None:
    old = create_pack(tmp_path / PACK, {"one": library / "dog"})
    new = create_pack(tmp_path / "new" / PACK, {"one": library / "mug"})
    with Engine(pipe, subjects_of_pack(old)) as engine:
        before = image(engine.submit(ask("a sks dog <lora:one>")))
        shutil.copytree(new.parent / "bases", old.parent / "bases", dirs_exist_ok=True)
        new.replace(old)
        after = image(engine.submit(ask("a sks dog <lora:one>")))
    alone = Alone(tiny_base, library)
    for found, name in ((before, "dog"), (after, "mug")):
        (expected,) = alone.images(ask(f"a sks dog <lora:{name}>"))
        assert gray_levels_apart(found, expected) <= 1


def test_a_file_that_is_deleted_while_it_serves(library: Path, pipe: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(library, tmp_path / "copy")
    with Engine(pipe, list_library(copied), at_once=1) as engine:
        tickets = [engine.submit(ask(f"a picture <lora:{name}>", steps=20)) for name in NAMES]
        next(event for event in tickets[0].events() if event.kind == "step")
        shutil.rmtree(copied)
        image(tickets[0])
        for ticket in tickets[1:]:
            with pytest.raises(UserError, match="no adapter at"):
                image(ticket)
        with pytest.raises(UserError, match="no adapter at"):
            engine.submit(ask("a picture <lora:dog>"))
        image(engine.submit(ask("a red car")))


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_the_wall_clock_may_jump(pipe: Any, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    with Engine(pipe) as engine:
        ticket = engine.submit(ask("a red car", steps=10, timeout=3600.0))
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        image(ticket)
        image(engine.submit(ask("a red car", timeout=3600.0)))
