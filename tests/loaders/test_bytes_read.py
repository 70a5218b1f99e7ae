"""What loading reads from disk: each file once, and a basis only if no loaded adapter has it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nora_diffusion import add_adapter, create_pack, delete_adapter, load_adapter, nora, save_adapter
from nora_diffusion.io.files import sha256
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import nora_layers

SHARED = ("dog", "cat")
PACK = "pets.nora_pack.safetensors"


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with a shared basis, a pack of both, and one with a basis of its own."""
    from nora_diffusion import open_pipeline

    folder, pipe = tmp_path_factory.mktemp("shelf"), open_pipeline(tiny_base)
    for name in SHARED:
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_()
        save_adapter(pipe, folder / name, name, basis="shared")
    save_adapter(pipe, folder / "own", SHARED[0])
    create_pack(folder / PACK, [(name, folder / name) for name in SHARED])
    return folder


class Disk:
    """Counts the bytes that are read from each file, and keeps their ranges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[Path] = Counter()
        self.ranges: list[tuple[int, int]] = []
        plain_open, plain_read = Path.open, TensorFile.read

        def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
            self.opened[path.resolve()] += 1
            return plain_open(path, *args, **kwargs)

        def read(file: TensorFile, start: int, stop: int) -> bytearray:
            self.ranges.append((start, stop))
            return plain_read(file, start, stop)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(TensorFile, "read", read)

    def bytes_in(self, first: int, last: int) -> int:
        return sum(max(0, min(stop, last) - max(start, first)) for start, stop in self.ranges)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def frozen(pipe: Any, name: str) -> list[Tensor]:
    return [b for layer in nora_layers(pipe.unet, name).values() for b in layer.delta(name).buffers()]


def trained_bytes(pipe: Any, name: str) -> int:
    return sum(4 * parameter.numel() for parameter in trainable_parameters(pipe, name).values())


def test_each_file_is_read_once_and_hashed_on_the_way(pipe: Any, shelf: Path, disk: Disk) -> None:
    file = shelf / "own" / "nora_adapter.safetensors"
    info = load_adapter(pipe, file, "dog").info
    assert disk.opened == {file: 1}
    assert disk.bytes_in(0, 2**40) == file.stat().st_size == info.bytes
    assert info.sha256 == sha256(file)


def test_with_a_resident_basis_only_header_and_trained_parameters_are_read(
    pipe: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_adapter(pipe, shelf / "dog", "dog")
    disk, file = Disk(monkeypatch), shelf / "cat" / "nora_adapter.safetensors"
    load_adapter(pipe, file, "cat")
    assert disk.opened == {file: 1}
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert disk.bytes_in(0, header) == header
    assert disk.bytes_in(header, 2**40) == trained_bytes(pipe, "cat")
    assert all(one is other for one, other in zip(frozen(pipe, "dog"), frozen(pipe, "cat"), strict=True))


def test_of_a_pack_only_the_row_of_the_subject_is_read(pipe: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_adapter(pipe, shelf / "dog", "dog")
    disk = Disk(monkeypatch)
    load_adapter(pipe, f"{shelf / PACK}#cat", "cat")
    assert disk.opened == {shelf / PACK: 1}
    with TensorFile(shelf / PACK) as reader:
        stack = reader.entries["stack.0"]
    assert disk.bytes_in(stack.start, stack.stop) == trained_bytes(pipe, "cat")


def test_a_resident_basis_that_has_changed_is_read_again(
    pipe: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_adapter(pipe, shelf / "dog", "dog")
    kept = [factor.clone() for factor in frozen(pipe, "dog")]
    frozen(pipe, "dog")[0].add_(1)
    disk = Disk(monkeypatch)
    load_adapter(pipe, shelf / "cat", "cat")
    assert [path.parent.name for path in disk.opened] == ["cat", "bases"]
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(kept, frozen(pipe, "cat"), strict=True))


def test_a_deleted_adapter_leaves_no_basis(pipe: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_adapter(pipe, shelf / "dog", "dog")
    delete_adapter(pipe, "dog")
    disk = Disk(monkeypatch)
    load_adapter(pipe, shelf / "cat", "cat")
    assert len(disk.opened) == 2
