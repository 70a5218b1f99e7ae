"""Untrusted files: thousands of mutations of valid ones, and known attacks.

Reading and loading any file either works or raises ``UserError``; a refused file leaves the pipeline bit-for-bit
unchanged; and reading never allocates more than three times the file's size. Allocation is measured with
``tracemalloc``: the reader keeps the bytes it reads in Python buffers that the tensors share, so this covers header,
JSON and tensors. It does not cover torch's temporaries; another test measures those by the size of a whole process.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    inspect_adapter,
    load_adapter,
    open_pipeline,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import lora, mor, nora
from nora_diffusion.adapters.patterns import check_pattern
from nora_diffusion.formats.adapter_file import FILE_NAME, read_tensors
from nora_diffusion.io.tensor_file import MAX_HEADER, TensorFile
from nora_diffusion.io.untrusted import clean, parse_json
from nora_diffusion.loaders import list_adapters

FAST, ALL = 250, 2000
LOADED = 80
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
OVERHEAD = 400_000
"""Bytes that reading may allocate on top: the objects of a small header are larger than its text. The tested files are
up to 1 MB, so the bound is meaningful for the tensors."""
METHODS = {
    "nora": lambda: nora(r=4, inner_r=2, basis="svd", rank_pattern={"to_q": 3}, inner_rank_pattern={"to_k": 3}),
    "mor": lambda: mor(r=4, num_experts=2),
    "lora": lambda: lora(r=3),
}


def state_hash(pipe: Any) -> str:
    """Hash of everything an adapter could leave behind: weights, module classes, flags, configs, active adapters."""
    digest = hashlib.sha256()
    for component in ("unet", "text_encoder"):
        module = getattr(pipe, component)
        for path, layer in module.named_modules():
            digest.update(f"{path} {type(layer).__name__} {layer.training} {getattr(layer, 'scaling', '')}".encode())
            digest.update(f"{getattr(layer, '_active_adapter', '')} {len(layer._forward_pre_hooks)}".encode())
        for path, value in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{path} {value.dtype} {tuple(value.shape)} {value.requires_grad}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(f"{sorted(getattr(module, 'peft_config', None) or {})}".encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Any:
    """A pipeline with one adapter, to check that other adapters are not affected."""
    pipe = open_pipeline(tiny_base)
    add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), "resident", ("unet", "text_encoder"))
    randomize(pipe, "resident", size=1.0)
    set_adapters(pipe, "resident")
    return pipe


@pytest.fixture(scope="module")
def valid(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A valid file of each method, and one of another tool."""
    found = {}
    for name, method in METHODS.items():
        pipe, folder = open_pipeline(tiny_base), tmp_path_factory.mktemp(name)
        add_adapter(pipe, method(), "one", ("unet", "text_encoder"))
        randomize(pipe, size=1.0)
        found[name] = save_adapter(pipe, folder, "one", info={"trigger": "sks", "prompts": ["a", "b"]}).read_bytes()
    tensors = {
        f"unet.{k}.lora_{f}.weight": torch.randn(s)
        for k in ("a.to_q", "b.to_k")
        for f, s in (("A", (2, 8)), ("B", (8, 2)))
    }
    found["foreign"] = save(tensors, {"format": "pt"})
    return found


def of_no_model(nora: bytes, modules: int, r: int, width: int) -> bytes:
    """A valid file in fp16, made from a small one, whose modules exist in no model: it can only be read."""
    values = json.loads(split(nora)[0]["__metadata__"]["nora"])
    values["components"]["unet"] |= {"r": r, "target_modules": ["down"], "rank_pattern": {}}
    values["base_fingerprint"]["unet"] = {f"{i}.down": 1.0 for i in range(modules)}
    shapes = {"A_out": (r, width), "B_out": (width, r), "A_in": (2, r), "B_in": (r, 2)}
    tensors = {
        f"unet.{key}.nora_{name}": torch.randn(shape).to(torch.float16)
        for key in values["base_fingerprint"]["unet"]
        for name, shape in shapes.items()
    }
    values = {k: v for k, v in values.items() if k != "basis_sha256"}
    for table in ("components", "base_fingerprint"):
        del values[table]["text_encoder"]
    return save(tensors, {"nora": json.dumps(values)})


@pytest.fixture(scope="module")
def large(valid: dict[str, bytes]) -> dict[str, bytes]:
    """The same and two files of 1 MB, which match no model and are only read."""
    data = of_no_model(valid["nora"], modules=2, r=256, width=512)
    return {**valid, "large": data, "large too": data}


# Mutations of files


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.just([]), st.just({}), st.just("x" * 20_000), st.just([[[[]]]]), st.just("\x1b[2J\u202e\ud800"),
    st.sampled_from([10**9, -1, 0, 2**31, 1e308, "(a+)+$", "../../etc/passwd", "unet", "F8_E4M3", "I64", "nora"]),
)  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths_in(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], change: Any, delete: bool) -> Any:
    if not path:
        return change
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if delete:
        del holder[path[-1]]
    else:
        holder[path[-1]] = change
    return value


@st.composite
def edits(draw: st.DrawFn, value: Any, times: int = 2) -> Any:
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, times))):
        path = draw(st.sampled_from(paths_in(value)))
        value = put(value, path, copy.deepcopy(draw(ODD)), draw(st.booleans()) and bool(path))
        if not isinstance(value, dict | list):
            break
    return value


@st.composite
def mutations(draw: st.DrawFn, files: dict[str, bytes]) -> bytes:
    data = files[draw(st.sampled_from(sorted(files)))]
    kind = draw(
        st.sampled_from(["flip", "cut", "grow", "header", "metadata", "number", "swap", "splice", "drop", "noise"])
    )
    if kind == "flip":
        changed = bytearray(data)
        for position in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            changed[position] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "grow":
        return data + draw(st.binary(min_size=1, max_size=64))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "splice":
        other = files[draw(st.sampled_from(sorted(files)))]
        return data[: draw(st.integers(0, len(data)))] + other[draw(st.integers(0, len(other))) :]
    header, body = split(data)
    if kind == "header":
        return join(draw(edits(header)), body)
    if kind == "metadata":
        inner = header.get("__metadata__", {})
        inner["nora"] = json.dumps(draw(edits(json.loads(inner.get("nora", "{}")))))
        return join(header | {"__metadata__": inner}, body)
    keys = sorted(key for key in header if key != "__metadata__")
    one, other = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
    if kind == "number":
        start = header[one]["data_offsets"][0]
        bad = struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38])))
        return join(header, body[:start] + bad + body[start + 4 :])
    if kind == "swap":
        header[one], header[other] = header[other], header[one]
    else:
        del header[one]
    return join(header, body)


def attempt(file: Path) -> bool:
    """Read a whole file and return whether it is valid. Any exception but ``UserError`` fails the test."""
    try:
        info = inspect_adapter(file)
        if info.kind == "nora":
            read_tensors(info)
    except UserError as error:
        assert str(error) and "\n" not in str(error) and str(error).isprintable(), repr(str(error))
        return False
    return True


@pytest.mark.parametrize("examples", [FAST, pytest.param(ALL, marks=pytest.mark.slow)])
def test_reading_survives_any_mutation(examples: int, large: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    seen = {True: 0, False: 0}

    @settings(max_examples=examples, **QUIET)  # type: ignore[arg-type]
    @given(mutations(large))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        tracemalloc.start()
        valid = attempt(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= 3 * len(data) + OVERHEAD, f"{peak} bytes for a file of {len(data)}"
        seen[valid] += 1
        if valid:
            # The safetensors library accepts the file too, and reads the same values.
            with safe_open(file, "pt") as reference, TensorFile(file) as reader:
                assert set(reference.keys()) == set(reader.entries)
                for key in reader.entries:
                    ours, theirs = reader.tensor(key), reference.get_tensor(key)
                    assert ours.shape == theirs.shape and ours.numpy().tobytes() == theirs.numpy().tobytes()

    attempt_valid = [data for data in large.values() if not file.write_bytes(data) or not attempt(file)]
    assert not attempt_valid
    check()
    assert seen[False] > examples / 2 and seen[True] > examples / 100, seen


def test_loading_is_all_or_nothing_under_any_mutation(base: Any, valid: dict[str, bytes], tmp_path: Path) -> None:
    file, before = tmp_path / "x.safetensors", state_hash(base)
    loaded = []

    @settings(max_examples=LOADED, **QUIET)  # type: ignore[arg-type]
    @given(mutations(valid))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            result = load_adapter(base, file, "guest")
        except UserError:
            assert state_hash(base) == before
        else:
            assert result.applied == result.total
            delete_adapter(base, "guest")
            assert state_hash(base) == before
            loaded.append(data)

    check()
    assert loaded, "no mutation was harmless: a loader that refuses everything would pass"


# Known attacks


def rebuilt(data: bytes, **changes: Any) -> bytes:
    """A file with changed metadata; ``config`` is merged into the config of the UNet."""
    header, body = split(data)
    values = json.loads(header["__metadata__"]["nora"])
    for key, change in changes.items():
        if key == "config":
            values["components"]["unet"] |= change
        else:
            values[key] = change
    header["__metadata__"]["nora"] = json.dumps(values)
    return join(header, body)


BOMBS: dict[str, dict[str, Any]] = {
    "outer rank": {"config": {"r": 10**9}},
    "inner rank": {"config": {"inner_r": 60_000, "r": 60_000}},
    "experts": {"config": {"num_experts": 65_000, "router": "token", "core": "none"}},
    "pattern of targets": {"config": {"target_modules": "(a+)+$"}},
    "pattern of ranks": {"config": {"rank_pattern": {"(.*)*x": 4}}},
    "many patterns": {"config": {"rank_pattern": {f"a{i}": 1 for i in range(10_000)}}},
    "rank in a pattern": {"config": {"rank_pattern": {"to_q": 10**12}}},
    "negative rank": {"config": {"rank_pattern": {"to_q": -1}}},
    "infinite scale": {"config": {"alpha": 1e308}},
    "text as rank": {"config": {"r": "4"}},
    "yes as rank": {"config": {"r": True}},
    "axis of a newer release": {"config": {"warp": 0.5}},
    "component": {"components": {"__class__": {"method": "nora"}}},
    "no component": {"components": {}},
    "basis that is a path": {"basis": "shared", "basis_sha256": "../../etc/passwd"},
    "shared without a hash": {"basis": "shared", "basis_sha256": ""},
    "long text": {"trigger": "x" * 100_000},
    "list as trigger": {"trigger": ["sks"]},
    "deep": {"extra": {"a": [[[[[[[[[[1]]]]]]]]]]}},
    "shape of a convolution": {"conv_shapes": {"unet.x": [2**40, 3, 3]}},
    "fingerprint of text": {"base_fingerprint": {"unet": {"x": "y"}, "text_encoder": {}}},
    "huge step": {"step": 10**300},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_in_the_metadata(base: Any, valid: dict[str, bytes], tmp_path: Path, name: str) -> None:
    file, before = tmp_path / "x.safetensors", state_hash(base)
    file.write_bytes(rebuilt(valid["nora"], **BOMBS[name]))
    with pytest.raises(UserError):
        load_adapter(base, file, "guest")
    assert state_hash(base) == before


def header_of(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{" + b" " * 100


def many_tensors(count: int) -> bytes:
    return join({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}, b"")


def table(**entry: Any) -> bytes:
    return join({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}, b"\0" * 8)


CRAFTED: dict[str, tuple[bytes, str]] = {
    "header over 10 MB": (header_of(MAX_HEADER + 1), "a header of"),
    "header longer than the file": (header_of(1000), "ends too early"),
    "20,001 tensors": (many_tensors(20_001), "20,001 tensors, more than"),
    "zip": (b"PK\x03\x04" + b"x" * 100, "zip archive"),
    "pickle": (b"\x80\x04\x95" + b"x" * 100, "Python pickle"),
    "gguf": (b"GGUF" + b"x" * 100, "GGUF"),
    "page": (b"\n <html><body>404", "web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
    "nothing": (b"", "empty"),
    "array as header": (join([], b""), "not a safetensors file"),
    "nested header": (struct.pack("<Q", 60_000) + b'{"a":' + b"[" * 59_995, "its header"),
    "twice the same tensor": (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "a key occurs twice"),
    "gap": (join({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8), "does not start where"),
    "rest": (join({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 8), "its tensors end at"),
    "length": (table(shape=[3]), "does not have the size"),
    "overflow": (table(shape=[2**40, 2**40]), "does not have the size"),
    "negative": (table(shape=[-2]), "invalid shape"),
    "fraction": (table(shape=[2.0]), "invalid shape"),
    "integers": (table(dtype="I64", shape=[1]), "not a float dtype"),
    "small floats": (table(dtype="F8_E4M3", shape=[8]), "not a float dtype"),
    "type of text": (table(dtype=["F32"]), "not a float dtype"),
    "escapes in a name": (
        join({"\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""),
        "unprintable",
    ),
    "numbers as metadata": (join({"__metadata__": {"a": 1}}, b""), "not a table of tensors"),
    "no tensors": (join({}, b""), "is empty"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files(base: Any, tmp_path: Path, name: str) -> None:
    data, message = CRAFTED[name]
    file, before = tmp_path / "x.safetensors", state_hash(base)
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_adapter(base, file, "guest")
    assert state_hash(base) == before


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt", ".pkl", ".zip", ""])
def test_other_endings_are_not_opened(base: Any, valid: dict[str, bytes], tmp_path: Path, ending: str) -> None:
    (tmp_path / f"x{ending}").write_bytes(valid["nora"])
    with pytest.raises(UserError, match="may run code when opened"):
        load_adapter(base, tmp_path / f"x{ending}", "guest")


@pytest.mark.parametrize(
    "path", ["x\0y.safetensors", "~nobody-at-all/x", "x" * 5000, "../" * 1000, "", "#", "a#b", ".safetensors#x"]
)
def test_odd_paths(base: Any, path: str) -> None:
    with pytest.raises(UserError):
        load_adapter(base, path, "guest")


def test_text_is_cleaned(valid: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    extra = {"k\x00": ["\x1b]0;title\x07", {"deep": "\u202eabc"}]}
    file.write_bytes(rebuilt(valid["nora"], trigger="sks\x1b[31m\n\ud800\u2028dog", license="<b>x</b>", extra=extra))
    info = inspect_adapter(file)
    assert info.trigger == "sks[31m dog"
    assert info.extra == {"k": ["]0;title", {"deep": "abc"}]}
    assert info.license == "<b>x</b>", "the pages that show it escape markup"
    assert clean("Zürich 犬 👩‍👩‍👧 \tx") == "Zürich 犬 👩‍👩‍👧  x"


def test_json_is_bounded() -> None:
    for text in ("[" * 100_000, "[" + "[]," * 200_000 + "1]", "NaN", '{"a":1,"a":2}', "1" * 10_000, "{", b"\xff\xfe{}"):
        with pytest.raises(ValueError):
            parse_json(text)


PATTERNS = {
    r".*attn1\.to_[qkv]": True, r".*down_blocks.*attn.*to_q": True, r".*(attn1|attn2).*to_q": True,
    r"^(?!.?text).*to_q$": True, r"up_blocks\.\d+\..*to_v": True, r".*attn1.*|.*attn2.*": True,
    r"(down|up)_blocks(\.0)?.*to_(q|k)": True,
    "(a+)+$": False, ".*.*": False, ".*.?.*x": False, "a{1000000}": False, r"(a)\1": False, "(": False,
    "x" * 2000: False, ".*(a|b|c|d|e).*": False, ".*[a-z].*": False, "(.*)*": False, "*": False, r".*\w.*x": False,
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p[:20])
def test_patterns_that_could_hang_are_refused(pattern: str) -> None:
    if PATTERNS[pattern]:
        check_pattern("target_modules", pattern)
    else:
        with pytest.raises(UserError, match="is not an allowed pattern"):
            check_pattern("target_modules", pattern)


MEASURE = """
import resource, sys
from nora_diffusion.formats.adapter_file import inspect_adapter, read_tensors
import torch
torch.ones(8).aminmax()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
tensors = read_tensors(inspect_adapter(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
def test_whole_process_stays_below_three_times_the_file(valid: dict[str, bytes], tmp_path: Path) -> None:
    """The NaN check of a 60 MB fp16 file must not allocate a copy in fp32."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(of_no_model(valid["nora"], modules=1, r=1500, width=10_000))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(file)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1.5 * file.stat().st_size


def test_a_shared_basis_is_checked_like_an_adapter(base: Any, tiny_base: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(tiny_base)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
    save_adapter(pipe, tmp_path / "dog", "one", basis="shared")
    (basis,) = (tmp_path / "bases").iterdir()
    intact, before = basis.read_bytes(), state_hash(base)
    tensors = load_file(basis)
    first = sorted(tensors)[0]
    damages = {
        "damaged or truncated": intact[:-10],
        "its hash is not its file name": save({**tensors, first: tensors[first] + 1}),
        "not a float dtype": save({**tensors, first: tensors[first].to(torch.int64)}),
        "web page": b"<html>",
    }
    for message, data in damages.items():
        basis.write_bytes(data)
        with pytest.raises(UserError, match=message):
            load_adapter(base, tmp_path / "dog", "guest")
        assert state_hash(base) == before
    # Saving again repairs the damaged basis. The adapter then loads, unless something is merged.
    save_adapter(pipe, tmp_path / "dog", "one", basis="shared")
    assert basis.read_bytes() == intact
    load_adapter(base, tmp_path / "dog", "guest")
    delete_adapter(base, "guest")
    base.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        load_adapter(base, tmp_path / "dog", "guest")
    base.unfuse_lora()
    # The fingerprint refuses the same basis on other weights.
    other = open_pipeline(tiny_base)
    for parameter in other.unet.parameters():
        parameter.data.mul_(1.05)
    with pytest.raises(UserError, match="was made for the base"):
        load_adapter(other, tmp_path / "dog", "guest")
    assert list_adapters(other) == {}


def test_valid_files_really_load(base: Any, valid: dict[str, bytes], tmp_path: Path) -> None:
    for name in METHODS:
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE_NAME).write_bytes(valid[name])
        loaded = load_adapter(base, tmp_path / name, f"a_{name}")
        assert loaded.applied == loaded.total > 0
        delete_adapter(base, f"a_{name}")
