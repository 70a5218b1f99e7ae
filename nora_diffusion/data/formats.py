"""Recognize image formats by their first bytes, not by the file name, and open the supported ones."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl")
# JPEG includes MPO, which some phones write as .jpg.
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
    """The image format of a file's first bytes, or ``None``."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # A HEIC file may have the general major brand "mif1" and its own among the compatible brands.
        brands = [head[8:12], *(head[i : i + 4] for i in range(16, len(head) - 3, 4))]
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def is_image(path: Path) -> bool:
    """Whether a file has an image's suffix or the header of a supported format."""
    if path.suffix.lower() in SUFFIXES + FOREIGN_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return sniff(file.read(HEAD_BYTES)) in (*FORMATS, "HEIC")
    except OSError:
        return False


def can_read_heic() -> bool:
    """Whether pillow-heif (the extra ``heic``) is installed."""
    return find_spec("pillow_heif") is not None


def refusal(content: bytes, heic: bool) -> str:
    """Why these bytes are not a supported image, as a predicate for the file's name; empty if they may be one."""
    name = sniff(content[:HEAD_BYTES])
    if name in FORMATS or (name == "HEIC" and heic and can_read_heic()):
        return ""
    if name == "HEIC":
        extra = " or install the extra: pip install 'nora-diffusion[heic]'" if heic and not can_read_heic() else ""
        return f"is a HEIC image: export it as JPEG{extra}"
    if name is not None:
        return f"is {name}, which cannot be read: export it as JPEG or PNG"
    return "is not a JPEG, PNG or WEBP image"


def open_image(content: bytes) -> Image.Image:
    """Open an image lazily; ``load()`` decodes the pixels (HEIC is decoded at once).

    Raises Pillow's errors for a damaged file. Call :func:`size_of` first.
    """
    if sniff(content[:HEAD_BYTES]) != "HEIC":
        return Image.open(io.BytesIO(content), formats=FORMATS)
    import pillow_heif

    # pillow-heif applies the EXIF orientation and resets it.
    image: Image.Image = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=True).to_pillow()
    return image


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height from the header, without decoding pixels."""
    if sniff(content[:HEAD_BYTES]) != "HEIC":
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.size
    import pillow_heif

    size: tuple[int, int] = pillow_heif.open_heif(io.BytesIO(content)).size
    return size
