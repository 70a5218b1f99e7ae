"""The library: one header read per file, names that are not paths, checked imports, deletion with undo."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.io.images import decode
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.ui import entries as reading
from nora_diffusion.ui import library as module
from nora_diffusion.ui.device import Device
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.jobs.worker import publish
from nora_diffusion.ui.layout.cards import cards, details
from nora_diffusion.ui.library import Library, safe_name
from nora_diffusion.ui.request import ActiveAdapter, Request
from nora_diffusion.ui.runs import Run

from .conftest import WAIT, save_random


@pytest.fixture
def shelf(library: Path, tmp_path: Path) -> Library:
    shutil.copytree(library, tmp_path / "library")
    return Library(tmp_path / "library")


def names(entries: Any) -> set[str]:
    return {entry.name for entry in entries}


def test_listing_and_search(shelf: Library) -> None:
    assert names(shelf.entries()) == {"dog", "hat", "stranger", "broken", "<img src=x onerror=alert(1)>"}
    assert names(shelf.find("sks")) == {"dog"}
    assert names(shelf.find("SKS Dog nora")) == {"dog"}
    assert names(shelf.find(method="nora")) == {"dog"}
    assert names(shelf.find("nothing like it")) == set()
    assert [e.name for e in shelf.find(sort="name")] == sorted(names(shelf.entries()), key=str.lower)
    sizes = [e.stamp[2] for e in shelf.find(sort="size")]
    assert sizes == sorted(sizes)
    with pytest.raises(UserError, match="sort"):
        shelf.find(sort="color")


def test_a_broken_file_is_listed_with_its_error(shelf: Library) -> None:
    broken = shelf.entry("broken")
    assert broken.info is None and "web page" in broken.error and str(shelf.folder) not in broken.error


def test_wrong_bases_are_told_apart_by_their_weights(shelf: Library, base: Path) -> None:
    engine = Engine(BaseSource(str(base), "cpu"))
    mismatches = {e.name: engine.mismatch(e.info) for e in shelf.entries() if e.info}
    assert mismatches["dog"] is None and mismatches["hat"] is None
    assert "different weights" in str(mismatches["stranger"])
    other = Engine(BaseSource(device="cpu"))
    info = shelf.entry("dog").info
    assert info is not None and "different architecture" in str(other.mismatch(info))


def test_five_hundred_adapters_cost_one_header_each(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (library / "dog" / "nora_adapter.safetensors").read_bytes()
    for number in range(500):
        (tmp_path / f"dog{number:03}").mkdir()
        (tmp_path / f"dog{number:03}" / "nora_adapter.safetensors").write_bytes(content)
    shelf, reads = Library(tmp_path), []
    inspect = reading.inspect_adapter

    def counted(file: Path, hashed: bool = True) -> Any:
        assert not hashed  # a hash would read the whole file
        reads.append(file)
        return inspect(file, hashed=hashed)

    monkeypatch.setattr(reading, "inspect_adapter", counted)
    assert len(shelf.entries()) == 500
    assert len(reads) == len(set(reads)) == 500
    assert len(shelf.find("sks")) == 500 and len(reads) == 500  # nothing is read twice
    (tmp_path / "dog007" / "nora_adapter.safetensors").write_bytes(content)
    shelf.entries()
    assert len(reads) == 501


def test_hashes_are_cached(shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.hash_all()
    digest = shelf.entry("dog").sha256
    assert len(digest) == 64
    monkeypatch.setattr(module, "sha256", lambda file: pytest.fail("hashed again"))
    again = Library(shelf.folder)
    assert again.entry("dog").sha256 == digest
    found = again.by_hash(digest)
    assert found is not None and found.name == "dog"
    assert again.by_hash(digest[:12]) is None and again.by_hash("") is None


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": ['])
def test_a_damaged_hash_file_is_only_a_lost_cache(shelf: Library, damage: str) -> None:
    (shelf.folder / module.HASHES).write_text(damage)
    again = Library(shelf.folder)
    again.hash_all()
    assert len(again.entry("dog").sha256) == 64


def test_import_copies_under_an_unused_name(shelf: Library, library: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.safetensors"
    shutil.copy(library / "hat" / "nora_adapter.safetensors", source)
    with pytest.raises(UserError, match="'hat'"):
        shelf.add(source, "new.safetensors")
    shelf.delete("hat")
    (shelf.folder / "pictures").mkdir()
    entry = shelf.add(source, "../../pictures.safetensors")
    assert entry.name == "pictures-2" and entry.file.parent.parent == shelf.folder


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.bin", b"x", "safetensors"),
        ("a.pt", b"x", "safetensors"),
        ("a.ckpt", b"x", "safetensors"),
        ("a.pkl", b"x", "safetensors"),
        ("a.zip", b"x", "safetensors"),
        ("a.safetensors", b"", "empty"),
        ("a.safetensors", b"<!DOCTYPE html>" + b"x" * 100, "web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        ("a.safetensors", (11 * 2**20).to_bytes(8, "little") + b"{" * 100, "a.safetensors"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"{}", "a.safetensors"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_nothing_else_is_imported(shelf: Library, tmp_path: Path, name: str, content: bytes, word: str) -> None:
    before = sorted(shelf.folder.rglob("*"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word):
        shelf.add(tmp_path / name, name)
    assert [p for p in sorted(shelf.folder.rglob("*")) if p.name != module.HASHES] == [
        p for p in before if p.name != module.HASHES
    ]


def test_delete_and_undo(shelf: Library) -> None:
    content = shelf.entry("dog").file.read_bytes()
    trash_id = shelf.delete("dog")
    assert "dog" not in names(shelf.entries())
    with pytest.raises(UserError):
        shelf.entry("dog")
    assert shelf.restore(trash_id).file.read_bytes() == content
    with pytest.raises(UserError):
        shelf.restore(trash_id)
    single = shelf.folder / "single.safetensors"
    single.write_bytes(content)
    assert shelf.restore(shelf.delete("single")).name == "single"


@pytest.mark.parametrize("trash_id", ["../dog", "", "/etc", ".", "..", "x\0"])
def test_a_trash_id_is_not_a_path(shelf: Library, trash_id: str) -> None:
    shelf.delete("dog")
    with pytest.raises(UserError):
        shelf.restore(trash_id)


def test_undo_never_overwrites(shelf: Library) -> None:
    trash_id = shelf.delete("dog")
    shutil.copytree(shelf.folder / "hat", shelf.folder / "dog")
    hat = shelf.entry("dog").file.read_bytes()
    assert shelf.restore(trash_id).name == "dog-2"
    assert shelf.entry("dog").file.read_bytes() == hat != shelf.entry("dog-2").file.read_bytes()
    single = shelf.folder / "single.safetensors"
    single.write_bytes(hat)
    trash_id = shelf.delete("single")
    single.write_bytes(hat)
    assert shelf.restore(trash_id).file.name == "single-2.safetensors"


def test_all_deletions_but_the_oldest_can_be_undone(shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DELETIONS", 2)
    trash_ids = [shelf.delete(name) for name in ("dog", "hat", "stranger")]
    (shelf.folder / module.TRASH / "99-halfway").mkdir()  # an empty folder is not a deletion
    (shelf.folder / module.TRASH / "notes").mkdir()
    again = Library(shelf.folder)  # as after a restart
    assert again.deletions() == trash_ids[:0:-1]
    assert not (shelf.folder / module.TRASH / trash_ids[0]).exists()
    for trash_id, name in zip(again.deletions(), ("stranger", "hat"), strict=True):
        assert again.restore(trash_id).name == name
    assert again.deletions() == []


def test_the_trash_survives_foreign_files(shelf: Library) -> None:
    """What other programs leave in the trash blocks no undo."""
    first, trash = shelf.delete("dog"), shelf.folder / module.TRASH
    second = shelf.delete("hat")
    for ticket in (first, second):
        (trash / ticket / ".DS_Store").write_bytes(b"x")
        (trash / ticket / "Thumbs.db").write_bytes(b"x")
    newer = 10**19  # ids that would come first
    (trash / f"{newer}-file").write_bytes(b"x")
    (trash / f"{newer + 1}-empty").mkdir()
    (trash / f"{newer + 2}-nothing").mkdir()
    (trash / f"{newer + 2}-nothing" / "notes.txt").write_text("x")
    (trash / f"{newer + 3}-link").symlink_to(trash / "nowhere")
    shutil.copytree(trash / first, trash / f"{newer + 4}-two")
    shutil.copytree(trash / second / "hat", trash / f"{newer + 4}-two" / "hat")
    (trash / "x-y").mkdir()
    (trash / "-").mkdir()
    (trash / ("9" * 40 + "-big")).mkdir()
    assert shelf.deletions() == [second, first]
    assert shelf.restore(first).name == "dog" and shelf.restore(second).name == "hat"
    assert shelf.deletions() == [] and not (trash / first).exists()


def test_a_deletion_that_fails_leaves_everything(shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="cannot write"):
            shelf.delete("dog")
    assert shelf.deletions() == [] and "dog" in names(shelf.entries())
    assert list((shelf.folder / module.TRASH).iterdir()) == []


def test_a_read_only_library_is_listed_searched_and_inspected(
    shelf: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read_only(path: Any, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    opened = os.open

    def open_to_read(path: Any, flags: int, *_: object, **__: object) -> Any:
        return opened(path, flags) if flags == os.O_RDONLY else read_only(path)

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(os, "open", open_to_read)
    shelf.hash_all()
    digest = shelf.entry("dog").sha256
    found = shelf.by_hash(digest)
    assert len(digest) == 64 and found is not None and found.name == "dog"
    assert shelf.images_with(found) == []
    with Device(shelf.folder / ".jobs" / "device.lock").join("an inspection") as turn:
        assert turn.held  # no training of this library can run
    with pytest.raises(UserError, match="Read-only file system"):
        shelf.delete("dog")


def test_an_entry_that_cannot_be_read_hides_no_other(shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``is_file`` does in a folder that may not be entered."""
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "hat":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert "dog" in names(shelf.entries()) and "hat" not in names(shelf.entries())


def test_adapters_that_arrive_at_the_same_moment_all_stay(shelf: Library, base: Path, tmp_path: Path) -> None:
    """Imports of one file name by several pages, as folders and as single files, and trainings that end meanwhile."""
    from nora_diffusion import export_lora, nora, open_pipeline

    pipe, sources = open_pipeline(base), []
    for number in range(9):
        folder = tmp_path / str(number)
        save_random(pipe, folder / "own", nora(r=4, inner_r=2), trigger=f"sks{number}", class_word="dog")
        (folder / "plain").mkdir()
        sources += [folder / "own" / FILE_NAME, export_lora(folder / "own", folder / "plain" / "dog.safetensors").path]
    before = names(shelf.entries())

    def arrive(number: int) -> str:
        if number % 3 == 0:
            return publish(sources[0].parent, shelf.folder, "dog", {}).name
        page = Library(shelf.folder) if number % 2 else shelf
        return page.add(sources[2 + number - number // 3 - 1], "dog.safetensors").name

    with ThreadPoolExecutor(8) as pool:  # 8 trainings end, 16 different files are imported
        arrived = list(pool.map(arrive, range(24)))
    entries = Library(shelf.folder).entries()
    assert len(set(arrived)) == 24 and names(entries) == before | set(arrived)
    assert all(entry.info for entry in entries if entry.name in arrived)
    assert not [path for path in shelf.folder.iterdir() if path.name.startswith(".new-")]


def test_unknown_values_are_not_shown(shelf: Library) -> None:
    entry = shelf.entry("dog")
    assert entry.info is not None and ">seed<" not in details(entry, None) and ">steps<" not in details(entry, None)
    entry.info.step, entry.info.seed = 7, 0
    assert ">steps</th><td>7<" in details(entry, None) and ">seed</th><td>0<" in details(entry, None)


@pytest.mark.parametrize(
    ("text", "name"),
    [("my dog", "my-dog"), ("../x", "x"), ("", "adapter"), ("ünï", "n"), ("a" * 99, "a" * 64), ("--", "adapter")],
)
def test_safe_names(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_files_of_other_tools_are_imported_unchanged(shelf: Library, tmp_path: Path) -> None:
    from nora_diffusion import export_lora

    plain = export_lora(shelf.entry("hat").file, tmp_path / "plain.safetensors", "kohya").path
    entry = shelf.add(plain, "my plain.safetensors")
    assert (
        entry.file.name == "my-plain.safetensors"
        and entry.info is not None
        and entry.info.kind == "kohya LoRA"
        and not entry.info.is_ours
    )


def test_any_folder_can_be_named_in_a_prompt(shelf: Library) -> None:
    shutil.copytree(shelf.folder / "hat", shelf.folder / "a:b")
    entry = shelf.entry("a:b")
    assert entry.tag == "a_b" and shelf.entry("a_b") == entry


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "name", [b"caf\xe9", b"caf\xe9 \xf0\x9f\x90\x95", b"\x1b[2J", b"a\nb", "a\u202eb\u2028c".encode()]
)
def test_odd_names_can_be_shown_found_deleted_and_restored(shelf: Library, name: bytes) -> None:
    """A page can only show text: a name that is not UTF-8 would hide the whole library."""
    folder, file = (shelf.folder / os.fsdecode(name + ending) for ending in (b"", b"-2.safetensors"))
    shutil.copytree(shelf.folder / "hat", folder)
    shutil.copy(shelf.folder / "dog" / FILE_NAME, file)
    odd = [entry for entry in shelf.entries() if entry.file in (folder / FILE_NAME, file)]
    assert len(odd) == 2 and cards(shelf.entries(), [None] * len(shelf.entries())).encode()
    for entry in odd:
        assert entry.name.encode() and entry.tag.encode() and shelf.entry(entry.name) == entry
        content = entry.file.read_bytes()
        trash_id = shelf.delete(entry.name)
        assert entry.name not in names(shelf.entries())
        restored = shelf.restore(trash_id)
        assert (restored.name, restored.file.read_bytes()) == (entry.name, content)


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pack of two subjects and the basis that they share."""
    from nora_diffusion import nora, open_pipeline
    from nora_diffusion.formats.pack_writing import create_pack

    folder = tmp_path_factory.mktemp("pack")
    pipe = open_pipeline(base)
    config = nora(r=4, inner_r=2, basis="svd")
    for name in ("cat", "cow"):
        save_random(pipe, folder / "made" / name, config, trigger=f"sks-{name}", class_word=name)
    Image.new("RGB", (8, 8), "red").save(folder / "made" / "cat" / "preview.png")
    return create_pack(folder / "farm.nora_pack.safetensors", [str(folder / "made" / n) for n in ("cat", "cow")])


def test_the_subjects_of_a_pack_are_adapters_of_the_library(
    shelf: Library, pack: Path, base: Path, tmp_path: Path
) -> None:
    entry = shelf.add(pack, pack.name)
    assert entry.pack is not None and entry.pack.name == pack.name
    cat, cow = (shelf.entry(f"farm#{name}") for name in ("cat", "cow"))
    assert "shared basis is missing" in cat.error  # shown in the list, before the adapter is used
    shutil.copytree(pack.parent / "bases", shelf.folder / "bases")
    shelf = Library(shelf.folder)
    cat, cow = (shelf.entry(f"farm#{name}") for name in ("cat", "cow"))
    assert (cat.error, cow.error) == ("", "") and cat.info is not None and cat.info.trigger == "sks-cat"
    assert cat.size < cow.stamp[2] and names(shelf.find("sks-cow")) == {"farm#cow"}
    assert shelf.by_hash(cat.sha256) == cat and cat.sha256 != cow.sha256
    # A subject of a pack gives the same image as the adapter that was packed.
    engine, device = Engine(BaseSource(str(base), "cpu")), Device(tmp_path / "lock", 2)
    made = []
    for number, file in enumerate((cat.file, pack.parent / "made" / "cat" / FILE_NAME)):
        order = Request((("a cat", 1),), Sampling(2, 2.0, width=16, height=16), (ActiveAdapter("x", file),))
        run = Run(device, "images", lambda run, o=order, n=number: engine.make(o, tmp_path / str(n), run))  # type: ignore[misc]
        run.join(WAIT)
        assert run.progress.state == "done", run.progress
        made.append(Image.open(run.progress.files[0]).tobytes())
    assert made[0] == made[1]
    # The card shows the preview in the pack. A single subject cannot be deleted, so the pack stays unchanged.
    assert "data:image/webp" in cards([cat], [None]) and "data:image" not in cards([cow], [None])
    content = cat.pack.read_bytes() if cat.pack else b""
    with pytest.raises(UserError, match="pack remove"):
        shelf.delete("farm#cat")
    assert (shelf.folder / pack.name).read_bytes() == content


def test_a_damaged_pack_is_listed_once_and_not_imported(shelf: Library, pack: Path, tmp_path: Path) -> None:
    bad = tmp_path / pack.name
    bad.write_bytes(pack.read_bytes()[:-100])
    with pytest.raises(UserError):
        shelf.add(bad, bad.name)
    shutil.copy(bad, shelf.folder)
    entry = shelf.entry("farm")
    assert entry.info is None and entry.error
    assert shelf.restore(shelf.delete("farm")).name == "farm"


@pytest.mark.parametrize("size", [(9000, 9000), (0, 0)])
def test_a_hostile_preview_is_refused(size: tuple[int, int]) -> None:
    head = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, b"IEND"))
    with pytest.raises(UserError):
        decode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_a_published_training_has_its_scores(shelf: Library, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(shelf.entry("dog").file.parent, run)
    target = publish(run, shelf.folder, "scored", {"subject fidelity": 0.8142})
    assert shelf.entry(target.name).scores() == {"subject fidelity": 0.8142}
    assert shelf.entry(publish(run, shelf.folder, "plain", {}).name).scores() == {}


def test_scores_and_a_chosen_thumbnail_are_on_the_card(shelf: Library, tmp_path: Path) -> None:
    dog = shelf.entry("dog")
    assert dog.scores() == {} and "subject 0.81" not in cards([dog], [None])
    (dog.file.parent / "scores.json").write_text(
        '{"subject fidelity": 0.814, "prompt fidelity": NaN, "judge": "small"}'
    )
    assert dog.scores() == {"subject fidelity": 0.814}
    assert "subject 0.81" in cards([dog], [None]) and "0.814" in details(dog, None)
    for damage in (
        "[1]",
        "{",
        '{"a": {"b": 1}}',
        '"x"',
        f'{{"a": 1{"0" * 400}}}',
        "[" * 9000,
        '{"a": 1e999}',
        "\\ud83d",
    ):
        (dog.file.parent / "scores.json").write_text(damage)
        assert dog.scores() == {}
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "p.png")
    before = cards([dog], [None])
    dog.choose_thumbnail(tmp_path / "p.png")
    assert dog.thumbnail() == dog.file.parent / "thumbnail.png" and cards([dog], [None]) != before
