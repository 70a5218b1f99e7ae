"""Packs of subjects that share a basis: exact round trips, few bytes read, refusals that change nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    export_lora,
    inspect_adapter,
    load_adapter,
    mix_files,
    open_pipeline,
    overlap_files,
    save_adapter,
)
from nora_diffusion.adapters import lora, nora
from nora_diffusion.formats import packs
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.formats.pack_writing import _write, add_to_pack, create_pack, extract_from_pack, remove_from_pack
from nora_diffusion.formats.packs import SUFFIX, Layout, Pack, PackedSubject, list_pack, read_factors
from nora_diffusion.io.files import locked_folder
from nora_diffusion.io.tensor_file import RawTensor, TensorFile
from nora_diffusion.loaders import list_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.* overlap by")  # random adapters in one basis overlap
PNG = b"\x89PNG\r\n\x1a\n" + b"image"
# Name -> inner rank, trigger.
SUBJECTS = {"dog": (2, "sks"), "cat": (2, "zwx"), "hat": (3, "")}


def write(pipe: Any, folder: Path, inner_r: int = 2, seed: int = 0, info: Any = None, **options: Any) -> Path:
    pattern = {"to_q": 4} if inner_r == 3 else {}  # of a pack, one adapter has other ranks in some layers
    config = nora(r=4, inner_r=inner_r, basis="svd", inner_rank_pattern=pattern)
    add_adapter(pipe, config, "one", ("unet", "text_encoder"))
    randomize(pipe, seed=seed, size=1.0)
    file = save_adapter(pipe, folder, "one", basis=options.pop("basis", "shared"), info=info, **options)
    delete_adapter(pipe, "one")
    return file


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three adapters that share a basis."""
    pipe, folder = open_pipeline(tiny_base), tmp_path_factory.mktemp("shelf")
    for seed, (name, (inner_r, trigger)) in enumerate(SUBJECTS.items()):
        info = {"trigger": trigger, "class_word": name, "license": "CC-BY-4.0", "step": seed}
        write(pipe, folder / name, inner_r, seed, info, dtype="fp16" if name == "cat" else None)
    (folder / "dog" / "preview.png").write_bytes(PNG)
    return folder


@pytest.fixture
def pack(shelf: Path, tmp_path: Path) -> Path:
    return create_pack(tmp_path / "pets.nora_pack.safetensors", [shelf / name for name in SUBJECTS])


READERS: dict[str, Callable[..., Any]] = {
    "load_adapter": lambda shelf, out, pipe, **where: load_adapter(pipe, shelf / "dog", **where),
    "export_lora": lambda shelf, out, pipe, **where: export_lora(shelf / "dog", out / "dog.safetensors", **where),
    "mix_files": lambda shelf, out, pipe, **where: mix_files(
        [(shelf / "dog", 0.8), (shelf / "hat", 0.5)], out / "both", **where
    ),
    "overlap_files": lambda shelf, out, pipe, **where: overlap_files(shelf / "dog", shelf / "hat", **where),
    "create_pack": lambda shelf, out, pipe, **where: create_pack(out / f"a{SUFFIX}", [shelf / "dog"], **where),
    "add_to_pack": lambda shelf, out, pipe, **where: add_to_pack(
        shutil.copy(shelf / f"pets{SUFFIX}", out), {"more": shelf / "dog"}, **where
    ),
    "extract_from_pack": lambda shelf, out, pipe, **where: extract_from_pack(
        shelf / f"pets{SUFFIX}", "cat", out / "cat", **where
    ),
}


@pytest.mark.parametrize("verb", READERS)
def test_a_basis_may_be_in_another_folder(verb: str, shelf: Path, pack: Path, pipe: Any, tmp_path: Path) -> None:
    """Every function that reads adapters takes ``basis_dir``; without it a moved basis is not found."""
    moved, out, elsewhere = tmp_path / "moved" / "shelf", tmp_path / "out", tmp_path / "elsewhere"
    for folder in (moved, out):
        folder.mkdir(parents=True)
    for name in SUBJECTS:
        shutil.copytree(shelf / name, moved / name)
    shutil.copy(pack, moved)
    shutil.copytree(shelf / "bases", elsewhere)
    with pytest.raises(UserError, match="not found in"):
        READERS[verb](moved, out, pipe)
    READERS[verb](moved, out, pipe, basis_dir=elsewhere)


def test_subjects_keep_their_names(pack: Path, tmp_path: Path) -> None:
    report = mix_files([(f"{pack}#dog", 0.8), (f"{pack}#hat", 0.5)], tmp_path / "both", basis_dir=pack.parent / "bases")
    assert [source["name"] for source in report.info.extra["mix"]["parts"]] == ["dog", "hat"]
    assert list(report.overlaps) == [("dog", "hat")]


def test_round_trip_is_bit_for_bit(shelf: Path, pack: Path, tmp_path: Path) -> None:
    for name in SUBJECTS:
        file = extract_from_pack(pack, name, tmp_path / "out" / name)
        assert file.read_bytes() == (shelf / name / FILE_NAME).read_bytes()
        packed, original = inspect_adapter(f"{pack}#{name}"), inspect_adapter(shelf / name)
        assert (packed.trigger, packed.class_word, packed.license) == (original.trigger, name, "CC-BY-4.0")
        assert packed.configs == original.configs
        assert packed.sha256 == original.sha256
        assert packed.trained_parameters == original.trained_parameters
    assert (tmp_path / "out" / "dog" / "preview.png").read_bytes() == PNG
    assert not (tmp_path / "out" / "cat" / "preview.png").exists()
    assert [f.name for f in (tmp_path / "out" / "bases").iterdir()] == [f.name for f in (shelf / "bases").iterdir()]


def test_subjects_load_by_their_address(pipe: Any, shelf: Path, pack: Path, render: Any) -> None:
    before = render(pipe)
    for name in SUBJECTS:
        load_adapter(pipe, shelf / name, name)
        expected = render(pipe)
        delete_adapter(pipe, name)
        loaded = load_adapter(pipe, f"{pack}#{name}")
        assert (loaded.name, loaded.applied) == (name, loaded.total)
        assert torch.equal(render(pipe), expected) and not torch.equal(expected, before)
        delete_adapter(pipe, name)


def test_each_adapter_is_read_once(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing thousands takes as long as their headers take to be parsed."""
    opened: list[Path] = []
    monkeypatch.setattr(
        TensorFile, "__init__", lambda self, path, real=TensorFile.__init__: (opened.append(path), real(self, path))[1]
    )
    create_pack(tmp_path / "pets.nora_pack.safetensors", [shelf / name for name in SUBJECTS])
    adapters = [path for path in opened if path.name == FILE_NAME]
    assert sorted(adapters) == sorted(shelf / name / FILE_NAME for name in SUBJECTS)


def test_add_and_remove(shelf: Path, pack: Path, tmp_path: Path) -> None:
    whole = pack.read_bytes()
    remove_from_pack(pack, ["dog"])
    assert [info.path.partition("#")[2] for info in list_pack(pack)] == ["cat", "hat"]
    with pytest.raises(UserError, match="no subject 'dog'"):
        inspect_adapter(f"{pack}#dog")
    add_to_pack(pack, {"dog": shelf / "dog"})
    assert pack.read_bytes() == whole, "the order of adding does not matter"
    other = create_pack(tmp_path / "more.nora_pack.safetensors", {"rex": f"{pack}#dog"})
    assert extract_from_pack(other, "rex", tmp_path / "rex").read_bytes() == (shelf / "dog" / FILE_NAME).read_bytes()


def test_the_old_pack_is_closed_before_it_is_replaced(shelf: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows cannot replace an open file."""
    opened: list[TensorFile] = []
    monkeypatch.setattr(packs, "TensorFile", lambda file: opened.append(TensorFile(file)) or opened[-1])
    replace = Path.replace

    def check(path: Path, target: Path) -> Path:
        assert target != pack or all(file.closed for file in opened)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", check)
    remove_from_pack(pack, ["dog"])
    add_to_pack(pack, {"dog": shelf / "dog"})
    assert len(opened) == 2


def test_a_subject_of_another_pack_keeps_its_own_preview(pack: Path, tmp_path: Path) -> None:
    (pack.parent / "preview.png").write_bytes(PNG + b" of the folder")
    other = create_pack(tmp_path / "more.nora_pack.safetensors", [f"{pack}#dog", f"{pack}#cat"])
    for name in ("dog", "cat"):
        extract_from_pack(other, name, tmp_path / "out" / name)
    assert (tmp_path / "out" / "dog" / "preview.png").read_bytes() == PNG
    assert not (tmp_path / "out" / "cat" / "preview.png").exists()


def test_adapters_with_their_own_basis_can_be_packed(pipe: Any, pack: Path, tmp_path: Path) -> None:
    write(pipe, tmp_path / "own", basis="own")
    add_to_pack(pack, [tmp_path / "own"])
    own = load_file(tmp_path / "own" / FILE_NAME)
    extracted = load_file(extract_from_pack(pack, "own", tmp_path / "out" / "own"))
    assert extracted.keys() == {key for key in own if not key.endswith("_out")}
    assert all(torch.equal(value, own[key]) for key, value in extracted.items())


def test_any_reader_of_safetensors_opens_a_pack(pack: Path) -> None:
    with safe_open(pack, "pt") as reader:
        assert reader.get_slice("index").get_shape() == [3, 8]
        assert sorted(reader.keys()) == ["cards", "index", "previews", "shared", "stack.0", "stack.1", "stack.2"]


Damage = Callable[[Any, Path, Path], Path]


def _other_basis(pipe: Any, shelf: Path, folder: Path) -> Path:
    add_adapter(pipe, nora(r=3, inner_r=2, basis="svd"), "one")
    save_adapter(pipe, folder, "one", basis="shared")
    return folder


def _no_basis(pipe: Any, shelf: Path, folder: Path) -> Path:
    add_adapter(pipe, lora(r=2), "one")
    save_adapter(pipe, folder, "one")
    return folder


def _other_base(pipe: Any, shelf: Path, folder: Path) -> Path:
    # The same basis by hash, but other weights: only the fingerprint of the base differs.
    file = folder / FILE_NAME
    folder.mkdir()
    info = inspect_adapter(shelf / "dog")
    info.base_fingerprint["unet"] = {path: value + 1 for path, value in info.base_fingerprint["unet"].items()}
    from nora_diffusion.formats.adapter_info import dump_info

    save_file(load_file(shelf / "dog" / FILE_NAME), file, {"nora": dump_info(info)})
    (folder / "bases").symlink_to(shelf / "bases")
    return folder


REFUSED: dict[str, tuple[Damage, str]] = {
    "another basis": (_other_basis, "another basis"),
    "another base": (_other_base, "was made for the base"),
    "no basis": (_no_basis, "without a frozen basis"),
    "twice": (lambda pipe, shelf, folder: shelf / "dog", "twice"),
    "odd name": (lambda pipe, shelf, folder: (shelf / "dog").rename(shelf / "a dog"), "not a valid name for a subject"),
    "absent": (lambda pipe, shelf, folder: folder, "no adapter at"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_are_refused(pipe: Any, shelf: Path, pack: Path, tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    whole = pack.read_bytes()
    path = make(pipe, shelf, tmp_path / "other")
    files = sorted(tmp_path.rglob("*"))
    try:
        with pytest.raises(UserError, match=message):
            add_to_pack(pack, [path])
        with pytest.raises(UserError, match=message):
            create_pack(tmp_path / "new" / f"x{SUFFIX}", [shelf / "cat", path, *([path] if case == "twice" else [])])
    finally:
        if case == "odd name":
            path.rename(shelf / "dog")
    assert pack.read_bytes() == whole and sorted(tmp_path.rglob("*")) == files


def test_other_refusals(pipe: Any, shelf: Path, pack: Path, tmp_path: Path) -> None:
    for call, message in [
        (lambda: create_pack(pack, [shelf / "dog"]), "exists: add to it"),
        (lambda: create_pack(tmp_path / "x.safetensors", [shelf / "dog"]), "end it in"),
        (lambda: create_pack(tmp_path / "x.nora_pack.safetensors", []), "nothing to pack"),
        (lambda: create_pack(tmp_path / "x.nora_pack.safetensors", str(shelf / "dog")), "give a list of paths"),
        (lambda: create_pack(tmp_path / "x.nora_pack.safetensors", [None]), "None is not a path"),  # type: ignore[list-item]
        (lambda: load_adapter(pipe, None), "is not an adapter"),  # type: ignore[arg-type]
        (lambda: load_adapter(pipe.unet, shelf / "dog"), "pass the pipeline that holds it"),
        (lambda: load_adapter(pipe, shelf / "dog", 5), "the adapter name 5 is not allowed"),  # type: ignore[arg-type]
        (lambda: add_to_pack(tmp_path / "no/x.nora_pack.safetensors", [shelf / "dog"]), "no pack at"),
        (lambda: remove_from_pack(tmp_path / "no/x.nora_pack.safetensors", ["dog"]), "no pack at"),
        (lambda: remove_from_pack(pack, ["fox"]), "no subject 'fox'"),
        (lambda: remove_from_pack(pack, list(SUBJECTS)), "delete the file"),
        (lambda: extract_from_pack(pack, "dog", shelf / "dog"), "already holds an adapter: choose another folder"),
        (lambda: load_adapter(pipe, pack), "is a pack"),
        (lambda: load_adapter(pipe, f"{pack}#fox"), "no subject 'fox'"),
        (lambda: load_adapter(pipe, f"{tmp_path / 'no.safetensors'}#dog"), "no pack at"),
        (lambda: load_adapter(pipe, f"{shelf / 'dog' / FILE_NAME}#dog"), "is not a pack"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert list_adapters(pipe) == {} and not (tmp_path / "no").exists()


def read_all(pack: Path) -> dict[str, tuple[AdapterInfo, dict[str, RawTensor]] | None]:
    """Every subject by name, ``None`` if reading it is refused."""
    found: dict[str, tuple[AdapterInfo, dict[str, RawTensor]] | None] = {}
    for name in SUBJECTS:
        try:
            with Pack(pack) as reader:
                subject = reader.find(name)
                found[name] = subject.info, read_factors(subject)
        except UserError:
            found[name] = None
    return found


def test_a_damaged_index_is_detected_by_list_pack(pack: Path) -> None:
    whole = bytearray(pack.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")  # the index comes first, with the first name hash
    whole[start] ^= 1
    pack.write_bytes(whole)
    with pytest.raises(UserError, match="damaged"):
        list_pack(pack)


def test_flipped_bits_are_detected(pack: Path) -> None:
    """A flipped bit is refused, or it is in another subject or a preview and changes nothing."""
    whole, intact = pack.read_bytes(), read_all(pack)
    refused = 0
    positions = range(0, len(whole), max(1, len(whole) // 200))
    for position in positions:
        pack.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        for name, found in read_all(pack).items():
            if found is None:
                refused += 1
                continue
            expected = intact[name]
            assert expected and found[0] == expected[0]
            assert found[1] == expected[1]
    assert refused > len(positions) / 2


def synthetic(count: int, file: Path) -> Path:
    """A pack of ``count`` subjects with 1,024 parameters in 8 projections."""
    factors = tuple(
        (f"unet.block.{i}.to_q.nora_{f}", s) for i in range(8) for f, s in (("A_in", (4, 16)), ("B_in", (16, 4)))
    )
    layout = Layout("F32", factors)
    config = nora(r=16, inner_r=4).to_dict()
    fingerprint = {"unet": {f"block.{i}.to_q": 0.5 for i in range(8)}}

    def subject(i: int) -> PackedSubject:
        info = AdapterInfo({"unet": config}, base_fingerprint=fingerprint, basis="shared", basis_sha256="0" * 64)
        info.trigger = f"word{i}"
        parameters = torch.full((1024,), float(i)).numpy().tobytes()
        return PackedSubject(f"subject-{i}", info, layout, 100, lambda: bytes(100), lambda: parameters)

    return _write(file, [subject(i) for i in range(count)], {})


def bytes_read(file: Path, name: str) -> tuple[int, torch.Tensor]:
    with Pack(file) as pack:
        tensors = read_factors(pack.find(name))
        return pack.reader.bytes_read, torch.cat([value.tensor().flatten() for value in tensors.values()])


def test_reading_one_of_ten_thousand_subjects_reads_only_its_bytes(tmp_path: Path) -> None:
    small = synthetic(10, tmp_path / "small.nora_pack.safetensors")
    large = synthetic(10_000, tmp_path / "large.nora_pack.safetensors")
    assert large.stat().st_size > 40_000_000
    few, _ = bytes_read(small, "subject-7")
    for name in ("subject-0", "subject-7", "subject-4999", "subject-9999"):
        many, values = bytes_read(large, name)
        assert torch.equal(values, torch.full((1024,), float(name.partition("-")[2])))
        # On top of 4 KB of parameters and the header: ten more steps of the binary search, 64 bytes each.
        assert many <= few + 64 * 14 + 64
        assert many < 1024 * 4 + 8_000
    with pytest.raises(UserError, match="no subject"):
        bytes_read(large, "subject-10000")


def test_concurrent_changes_of_a_pack_wait_for_each_other(shelf: Path, tmp_path: Path) -> None:
    pack = create_pack(tmp_path / "pets.nora_pack.safetensors", [shelf / "dog"])
    before = pack.read_bytes()
    change = threading.Thread(target=add_to_pack, args=(pack, [shelf / "cat"]))
    with locked_folder(tmp_path):
        change.start()
        change.join(0.5)
        assert change.is_alive() and pack.read_bytes() == before
    change.join(30)
    assert len(list_pack(pack)) == 2
