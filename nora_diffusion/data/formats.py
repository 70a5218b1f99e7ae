"""What a file is, by its first bytes and never by its name; decoding of what can be read."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl")
# Pillow opens MPO, which some phones write as .jpg, through JPEG.
FORMATS = ("JPEG", "PNG", "WEBP")
HEAD_BYTES = 32
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"
)
_MARKS = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"),
    (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"\xff\x0a", "JPEG XL"), (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
)  # fmt: skip


def sniff(head: bytes) -> str | None:
    """The picture format that the first bytes announce, or ``None``."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # A HEIC may have the general brand "mif1" in front and its own further on.
        brands = [head[8:12], *(head[i : i + 4] for i in range(16, len(head) - 3, 4))]
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def is_picture(path: Path) -> bool:
    """Whether a file calls itself a picture by its name, or is one by its header."""
    if path.suffix.lower() in SUFFIXES + FOREIGN_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return sniff(file.read(HEAD_BYTES)) in (*FORMATS, "HEIC")
    except OSError:
        return False


def can_read_heic() -> bool:
    """Whether the extra ``heic`` is installed."""
    return find_spec("pillow_heif") is not None


def refusal(content: bytes, heic: bool) -> str:
    """Why these bytes are no usable picture, to be said after the file's name; empty where they may be one."""
    found = sniff(content[:HEAD_BYTES])
    if found in FORMATS or (found == "HEIC" and heic and can_read_heic()):
        return ""
    if found == "HEIC":
        extra = " or install the extra: pip install 'nora-diffusion[heic]'" if heic and not can_read_heic() else ""
        return f"is a HEIC picture: export as JPEG{extra}"
    if found is not None:
        return f"is {found}, which cannot be read: export as JPEG or PNG"
    return "is no JPEG, PNG or WEBP picture"


def open_picture(content: bytes) -> Image.Image:
    """The picture with its header read; pixels are decoded by ``load()``, but for HEIC.

    Raises what Pillow raises for damage. The caller checks :func:`size_of` first.
    """
    if sniff(content[:HEAD_BYTES]) != "HEIC":
        return Image.open(io.BytesIO(content), formats=FORMATS)
    import pillow_heif

    # Turned upright by the library, which then says so in the EXIF.
    picture: Image.Image = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=True).to_pillow()
    return picture


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height from the header, with no pixel decoded."""
    if sniff(content[:HEAD_BYTES]) != "HEIC":
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return picture.size
    import pillow_heif

    size: tuple[int, int] = pillow_heif.open_heif(io.BytesIO(content)).size
    return size
