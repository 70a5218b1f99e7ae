"""The library: one header read a file, names that are no paths, imports that are looked at, deletion with undo."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import UserError
from nora_diffusion.ui import library as module
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.library import Library, safe_name


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
        shelf.find(sort="colour")


def test_a_broken_file_is_listed_with_its_fault(shelf: Library) -> None:
    broken = shelf.entry("broken")
    assert broken.info is None and "web page" in broken.fault and str(shelf.folder) not in broken.fault


def test_wrong_bases_are_told_apart_by_their_weights(shelf: Library, base: Path) -> None:
    engine = Engine(str(base), "cpu")
    fits = {e.name: engine.misfit(e.info) for e in shelf.entries() if e.info}
    assert fits["dog"] is None and fits["hat"] is None
    assert "weights differ" in str(fits["stranger"])
    other = Engine(None, "cpu")
    info = shelf.entry("dog").info
    assert info is not None and "built differently" in str(other.misfit(info))


def test_five_hundred_adapters_cost_one_header_each(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (library / "dog" / "nora_adapter.safetensors").read_bytes()
    for number in range(500):
        (tmp_path / f"dog{number:03}").mkdir()
        (tmp_path / f"dog{number:03}" / "nora_adapter.safetensors").write_bytes(content)
    shelf, reads = Library(tmp_path), []
    inspect = module.inspect_adapter

    def counted(file: Path, hashed: bool = True) -> Any:
        assert not hashed  # a hash would read the whole file
        reads.append(file)
        return inspect(file, hashed=hashed)

    monkeypatch.setattr(module, "inspect_adapter", counted)
    start = time.process_time()
    assert len(shelf.entries()) == 500
    seconds = time.process_time() - start
    assert len(reads) == len(set(reads)) == 500
    assert len(shelf.find("sks")) == 500 and len(reads) == 500  # nothing is read twice
    (tmp_path / "dog007" / "nora_adapter.safetensors").write_bytes(content)
    shelf.entries()
    assert len(reads) == 501
    print(f"500 adapters in {seconds:.2f} s of processor time")
    assert seconds < 3


def test_hashes_are_kept(shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_import_copies_under_a_free_name(shelf: Library, library: Path, tmp_path: Path) -> None:
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
    ticket = shelf.delete("dog")
    assert "dog" not in names(shelf.entries())
    with pytest.raises(UserError):
        shelf.entry("dog")
    assert shelf.restore(ticket).file.read_bytes() == content
    with pytest.raises(UserError):
        shelf.restore(ticket)
    single = shelf.folder / "single.safetensors"
    single.write_bytes(content)
    assert shelf.restore(shelf.delete("single")).name == "single"


@pytest.mark.parametrize("ticket", ["../dog", "", "/etc", ".", "..", "x\0"])
def test_a_ticket_is_no_path(shelf: Library, ticket: str) -> None:
    shelf.delete("dog")
    with pytest.raises(UserError):
        shelf.restore(ticket)


def test_undo_never_overwrites(shelf: Library) -> None:
    ticket = shelf.delete("dog")
    shutil.copytree(shelf.folder / "hat", shelf.folder / "dog")
    with pytest.raises(UserError, match="again already"):
        shelf.restore(ticket)
    assert shelf.entry("dog").info is not None


@pytest.mark.parametrize(
    ("text", "name"),
    [("my dog", "my-dog"), ("../x", "x"), ("", "adapter"), ("ünï", "n"), ("a" * 99, "a" * 64), ("--", "adapter")],
)
def test_safe_names(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_files_of_other_tools_keep_their_form(shelf: Library, tmp_path: Path) -> None:
    from nora_diffusion import export_lora

    plain = export_lora(shelf.entry("hat").file, tmp_path / "plain.safetensors", "kohya").path
    entry = shelf.add(plain, "my plain.safetensors")
    assert entry.file.name == "my-plain.safetensors" and entry.info is not None and entry.info.kind == "kohya LoRA"


def test_any_folder_can_be_named_in_a_prompt(shelf: Library) -> None:
    shutil.copytree(shelf.folder / "hat", shelf.folder / "a:b")
    entry = shelf.entry("a:b")
    assert entry.tag == "a_b" and shelf.entry("a_b") == entry
