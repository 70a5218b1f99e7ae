"""Sound files that Pillow alone refuses, damaged ones that it accepts, and the memory of decoding."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from nora_diffusion.data import SourceImage, read_source
from nora_diffusion.data.formats import decoder_bytes, size_of
from nora_diffusion.errors import UserError

NOISE = np.random.default_rng(1).integers(0, 255, (30, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE).resize((640, 480), Image.Resampling.BICUBIC)
END = b"\xff\xd9"
ENCODINGS: dict[str, dict[str, Any]] = {
    "baseline": {}, "progressive": {"progressive": True}, "full color": {"subsampling": 0, "optimize": True},
    "restart markers": {"restart_marker_rows": 1},
}  # fmt: skip


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(content: bytes) -> SourceImage:
        folder = tmp_path / hashlib.sha256(content).hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / "photo").write_bytes(content)
        return read_source(folder / "photo")

    return read


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, color_type: int, row: bytes, *extra: bytes, width: int = 32) -> bytes:
    """A PNG file of 32 equal rows, with chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 32, depth, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 32))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *extra, pixels, chunk(b"IEND", b"")))


@pytest.mark.parametrize("options", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_complete(options: dict[str, Any], mode: str, read: Any) -> None:
    content = encoded(PHOTO.convert(mode), **options)
    whole = read(content)
    for other in (content[:-2], content[:-1], content[:-2] + bytes(1000), content + b"trailer" * 9):
        photo = read(other)
        assert photo.remarks == whole.remarks and photo.image.tobytes() == whole.image.tobytes()


@pytest.mark.parametrize("options", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("ending", [b"", END, bytes(5000), END + b"trailer"])
def test_a_truncated_jpeg_is_refused_whatever_it_ends_with(options: dict[str, Any], ending: bytes, read: Any) -> None:
    content = encoded(PHOTO, **options)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(UserError, match=r"photo is cut off: the lower \d+% of the image is missing"):
            read(content[: int(len(content) * share)] + ending)


def test_the_missing_share_is_measured(read: Any) -> None:
    """Half of a picture with an even texture is half of the file."""
    content = encoded(PHOTO)
    with pytest.raises(UserError, match=r"the lower 5[0-5]% of"):
        read(content[: len(content) // 2] + END)
    photo = read(content[:-10])
    assert photo.remarks == ("its last rows are damaged",)
    assert photo.image.crop((0, 0, 640, 460)).tobytes() == read(content).image.crop((0, 0, 640, 460)).tobytes()


def test_a_progressive_jpeg_that_lost_whole_scans_is_refused(read: Any) -> None:
    content = encoded(PHOTO, progressive=True)
    last_scan = content.rindex(b"\xff\xda")
    with pytest.raises(UserError, match="cut off"):
        read(content[: content.rindex(b"\xff\xc4", 0, last_scan)] + END)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("color", [0, 127, 128, 255])
def test_a_plain_image_is_not_taken_for_a_truncated_one(color: int, options: dict[str, Any], read: Any) -> None:
    """libjpeg fills what is missing with gray."""
    photo = read(encoded(Image.new("RGB", (320, 240), (color,) * 3), **options))
    assert photo.remarks == () and photo.image.getpixel((9, 200)) == (color,) * 3


def test_the_second_image_of_a_phone_photo_does_not_matter(read: Any) -> None:
    content = encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO])
    assert read(content).remarks == () == read(content[:-2000]).remarks


@pytest.mark.parametrize(
    ("marker", "precision", "kind"),
    [
        (0xC1, 12, "a 12-bit JPEG"), (0xC2, 12, "a 12-bit JPEG"), (0xC3, 8, "a lossless JPEG"),
        (0xC5, 8, "a hierarchical JPEG"), (0xF7, 8, "a JPEG-LS image"), (0xF7, 12, "a JPEG-LS image"),
    ],
)  # fmt: skip
def test_other_kinds_of_jpeg_are_named(marker: int, precision: int, kind: str, read: Any) -> None:
    content = bytearray(encoded(PHOTO))
    frame = content.index(b"\xff\xc0")
    content[frame + 1], content[frame + 4] = marker, precision
    with pytest.raises(UserError, match=f"photo is {kind}, which cannot be read: export it as an ordinary 8-bit JPEG"):
        read(bytes(content))


LARGE = zlib.compress(b"a" * 2**22)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"zTXt", b"Comment\0\0" + LARGE),
        (b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
        (b"tEXt", b"Comment\0" + b"a" * 2**20),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        (b"zTXt", b"Raw profile type exif\0\0" + LARGE),
        (b"zTXt", b"Raw profile type exif\0\0bad"),
        (b"eXIf", b"bad"),
        (b"prIv", bytes(100)),
    ],
)
@pytest.mark.parametrize("repeats", [1, 70])
def test_chunks_that_training_does_not_use_do_no_harm(name: bytes, data: bytes, repeats: int, read: Any) -> None:
    plain = encoded(PHOTO, "PNG")
    damaged = bytearray(chunk(name, data))
    damaged[-1] ^= 1
    for added in (chunk(name, data) * repeats, bytes(damaged)):
        photo = read(plain[:33] + added + plain[33:])
        assert photo.remarks == () and photo.image.tobytes() == PHOTO.tobytes()


def test_a_large_color_profile_is_applied_and_a_huge_one_ignored(read: Any) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"  # swaps the primaries
    for padding, swapped in ((0, True), (3 * 2**20, True), (2**25, False)):
        padded = bytes(profile) + bytes(padding)
        padded = len(padded).to_bytes(4, "big") + padded[4:]
        photo = read(encoded(Image.new("RGB", (32, 32), (200, 30, 40)), "PNG", icc_profile=padded))
        red_value, _, blue_value = photo.image.getpixel((5, 5))
        assert (red_value < blue_value) == swapped and bool(photo.remarks) != swapped


def test_a_png_without_its_last_chunk_is_complete_and_half_of_one_is_not(read: Any) -> None:
    content = encoded(PHOTO, "PNG")
    for other in (content[:-12], content[:-5], content + b"trailer"):
        assert read(other).image.tobytes() == PHOTO.tobytes()
    with pytest.raises(UserError, match="photo is damaged or truncated"):
        read(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("depth", "color_type", "row", "key"),
    [
        (16, 0, struct.pack(">32H", *[1000] * 16, *[40000] * 16), (1000,)),
        (8, 0, bytes([10] * 16 + [200] * 16), (10,)),
        (4, 0, bytes([0x33] * 8 + [0xCC] * 8), (3,)),
        (2, 0, bytes([0x55] * 4 + [0xFF] * 4), (1,)),
        (1, 0, bytes([0] * 2 + [255] * 2), (0,)),
        (16, 2, struct.pack(">96H", *[1000, 2000, 3000] * 16, *[40000, 50000, 60000] * 16), (1000, 2000, 3000)),
        (8, 2, bytes([9, 8, 7] * 16 + [200, 100, 50] * 16), (9, 8, 7)),
    ],
)
def test_a_transparent_color_is_compared_in_every_bit_depth(
    depth: int, color_type: int, row: bytes, key: tuple[int, ...], read: Any
) -> None:
    opaque = read(png(depth, color_type, row))
    photo = read(png(depth, color_type, row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))))
    assert opaque.alpha is None
    assert photo.alpha is not None and [photo.alpha.getpixel((x, 5)) for x in (15, 16)] == [0, 255]
    assert photo.image.getpixel((0, 0)) == (255, 255, 255)
    assert photo.image.getpixel((31, 0)) == opaque.image.getpixel((31, 0))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.45455, 0.22, 0.0, 40000.0])
def test_the_gamma_of_a_png_is_applied(depth: int, gamma: float, read: Any) -> None:
    row = struct.pack(">32H", *[20000] * 32) if depth == 16 else bytes([78] * 32)
    share = 20000 / 65535 if depth == 16 else 78 / 255
    expected = share if gamma in (0.45455, 0.0, 40000.0) else share ** (1 / (2.2 * gamma))
    stored = chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    photo = read(png(depth, 0, row, stored))
    assert photo.image.getpixel((3, 3)) == (round(expected * 255),) * 3
    assert any("gamma" in remark for remark in photo.remarks) == (expected != share)
    assert read(png(depth, 0, row, chunk(b"sRGB", b"\0"), stored)).image.getpixel((3, 3)) == (round(share * 255),) * 3


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_gray_keeps_its_profile(depth: int, transparent: bool, read: Any) -> None:
    """With a profile of linear gray, in every bit depth, also beside transparency."""
    row = struct.pack(">32H", *[0] * 16, *[20000] * 16) if depth == 16 else bytes([0] * 16 + [78] * 16)
    key = [chunk(b"tRNS", b"\0\0")] if transparent else []
    photo = read(png(depth, 0, row, chunk(b"iCCP", b"x\0\0" + zlib.compress(linear_gray())), *key))
    assert not any("profile" in remark for remark in photo.remarks)
    assert abs(photo.image.getpixel((31, 3))[0] - 150) <= 2  # sRGB's encoding of 0.305


def linear_gray() -> bytes:
    """A gray ICC profile (version 2) with gamma 1."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0\0\0\0\0"
    text = b"desc\0\0\0\0\0\0\0\2g\0" + bytes(78)
    text += bytes(-len(text) % 4)
    tags, offset, body = b"", 128 + 4 + 12 * 3, b""
    for name, data in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        tags += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I", offset + len(body)) + b"lcms" + b"\x02\x10\0\0" + b"mntrGRAYXYZ "
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + tags + body


@pytest.mark.parametrize("content", [
    encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "PNG"),
    encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "WEBP"),
    encoded(Image.new("P", (32, 32)), "PNG", transparency=0),
    encoded(Image.new("LA", (32, 32)), "PNG"),
    png(16, 0, bytes(64), chunk(b"tRNS", b"\0\0")),
])  # fmt: skip
def test_a_wholly_transparent_image_is_refused(content: bytes, read: Any) -> None:
    with pytest.raises(UserError, match="photo is wholly transparent"):
        read(content)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP"])
def test_a_large_image_is_reduced_while_it_is_read(format: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"save_all": True, "append_images": [PHOTO]} if format == "MPO" else {}
    content = encoded(PHOTO, format, **options)
    for module in ("formats", "jpeg"):
        monkeypatch.setattr(f"nora_diffusion.data.{module}.MAX_PIXELS", 100_000)
    photo = read(content)
    assert photo.image.size == (320, 240) and photo.remarks == ("640x480, reduced to 320x240",)
    box = PHOTO.resize((320, 240), Image.Resampling.BOX)
    assert np.abs(np.asarray(photo.image, dtype=int) - np.asarray(box, dtype=int)).mean() < 4


def test_large_images_keep_transparency_and_orientation(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("formats", "jpeg"):
        monkeypatch.setattr(f"nora_diffusion.data.{module}.MAX_PIXELS", 100_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(encoded(PHOTO, exif=exif)).image.size == (240, 320)
    layers = PHOTO.copy()
    layers.putalpha(Image.new("L", PHOTO.size))
    layers.paste((9, 9, 9, 255), (0, 0, 320, 480))
    for image in (layers, layers.quantize(8)):
        alpha = read(encoded(image, "PNG")).alpha
        assert alpha is not None and alpha.getpixel((20, 20)) == 255 and alpha.getpixel((300, 20)) == 0


def resized(content: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    frame = next(content.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in content)
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


def test_the_memory_of_a_decoder_is_bounded_from_the_header() -> None:
    """A JPEG in one scan needs only its reduced size; one in several scans also needs its coefficients."""
    pixels = 640 * 480
    for options, per_pixel in (({}, 4), ({"progressive": True}, 7), ({"progressive": True, "subsampling": 0}, 10)):
        content = encoded(PHOTO, **options)
        assert size_of(content) == (640, 480) and decoder_bytes(content, (640, 480)) == per_pixel * pixels
        # A phone's 48 megapixels, decoded at half the size.
        assert decoder_bytes(resized(content, 8000, 6000), (8000, 6000)) == 48_000_000 * (1 + per_pixel - 4)


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("WEBP", {}), ("JPEG", {"progressive": True}), ("JPEG", {})]
)
def test_the_memory_of_a_large_image_counts_what_its_decoder_sees(
    format: str, options: dict[str, Any], read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reduced image is small, but its decoder, its conversion and its file are not."""
    content = encoded(PHOTO, format, **options)
    whole = read(content).memory
    assert whole >= 2 * len(content) + 18 * 640 * 480
    for module in ("formats", "jpeg"):
        monkeypatch.setattr(f"nora_diffusion.data.{module}.MAX_PIXELS", 20_000)
    photo = read(content + b"trailer")
    assert photo.image.size[0] < 200 and photo.memory >= 2 * len(content) + decoder_bytes(content, (640, 480))


@pytest.mark.parametrize(
    ("width", "height", "refused"), [(8000, 6000, False), (16320, 12240, False), (20000, 20000, True)]
)
def test_large_jpegs_are_accepted_and_bombs_are_not(
    width: int, height: int, refused: bool, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = resized(encoded(PHOTO), width, height)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="megapixels need too much memory" if refused else "cut off|damaged") as error:
        monkeypatch.setattr("nora_diffusion.data.images.missing_share", lambda content: 1.0)
        read(content)
    assert refused == ("megapixels" in str(error.value))


@pytest.mark.parametrize("content", [
    b"\xff\xd8" * 10**7, b"\xff\xd8" + b"\xff" * 10**7 + encoded(PHOTO)[2:],
    b"\xff\xd8" + b"\xff\xe0\0\2" * 10**6, b"\xff\xd8" + b"\xff" * 10**7,
    b"\xff\xd8\xff" + bytes(10**7), b"\xff\xd8" + b"\xff\xda\0\3\0" * 10**6,
    b"\x89PNG\r\n\x1a\n" + (bytes(4) + b"tEXt" + bytes(4)) * 10**6,
], ids=["markers", "fill before an image", "segments", "fill", "zeros", "scans", "chunks"])  # fmt: skip
def test_files_that_are_slow_to_parse_are_refused_at_once(content: bytes, read: Any) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=r"damaged|unusual structure"):
        read(content)
    assert time.process_time() - begun < 5


def test_a_progressive_jpeg_of_very_many_scans_is_refused(read: Any) -> None:
    content = encoded(PHOTO, progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(UserError, match="photo is a JPEG of unusual structure, which cannot be read"):
        read(content[:last] + content[last:-2] * 600 + END)
