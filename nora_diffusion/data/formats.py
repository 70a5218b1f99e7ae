"""Recognize image formats by their first bytes, not by the file name, and open the supported ones."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..io.images import MAX_PIXELS
from . import jpeg, png

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl")
# JPEG includes MPO, which some phones write as .jpg.
FORMATS = ("JPEG", "PNG", "WEBP")
HEAD_BYTES = 32
BYTES_PER_PIXEL = {"PNG": 8, "HEIC": 9, "WEBP": 18}
"""Peak memory of decoding and reducing, measured with Pillow 12 and pillow-heif 1.8."""
MAX_DECODER_BYTES = 720 * 2**20
MAX_STORED_PIXELS = 2**28
"""Larger images are refused, however little memory their decoder needs: decoding takes long."""
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
    """Whether pillow-heif is installed; some platforms have no wheel of it."""
    return find_spec("pillow_heif") is not None


def refusal(content: bytes) -> str:
    """Why these bytes are not a supported image, as a predicate for the file's name; empty if they may be one."""
    name = sniff(content[:HEAD_BYTES])
    if name == "JPEG" and (kind := jpeg.structure(content).unsupported):
        return f"is {kind}, which cannot be read: export it as an ordinary 8-bit JPEG or PNG"
    if name in FORMATS or (name == "HEIC" and can_read_heic()):
        return ""
    if name == "HEIC":
        return "is a HEIC image: export it as JPEG, or install its decoder: pip install pillow-heif"
    if name is not None:
        return f"is {name}, which cannot be read: export it as JPEG or PNG"
    return "is not a JPEG, PNG, WEBP or HEIC image"


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height from the header, without decoding pixels. Raises Pillow's errors for a damaged file."""
    name = sniff(content[:HEAD_BYTES])
    if name == "JPEG" and not jpeg.structure(content).scan_sizes:
        raise SyntaxError("a JPEG without image data")
    if name != "HEIC":
        with _opened(content) as image:
            return image.size
    import pillow_heif

    size: tuple[int, int] = pillow_heif.open_heif(io.BytesIO(content)).size
    return size


def decoder_bytes(content: bytes, size: tuple[int, int]) -> int:
    """An upper bound of the memory in which :func:`decoded` decodes an image of ``size``."""
    name, pixels = sniff(content[:HEAD_BYTES]), size[0] * size[1]
    if name != "JPEG":
        return pixels * BYTES_PER_PIXEL[name or ""]
    frame = jpeg.structure(content)
    return 4 * pixels // frame.scale**2 + frame.buffered_bytes


def missing_share(content: bytes) -> float:
    """The share of a JPEG's height, from the bottom, that is not in the file; 0 for other formats."""
    return jpeg.missing_share(content) if sniff(content[:HEAD_BYTES]) == "JPEG" else 0.0


def open_image(content: bytes) -> Image.Image:
    """Open an image lazily; ``load()`` decodes the pixels (HEIC is decoded at once).

    A JPEG of more than ``MAX_PIXELS`` is decoded at a half, a quarter or an eighth of its size. Raises Pillow's errors
    for a damaged file. Check :func:`size_of` and :func:`decoder_bytes` first.
    """
    if sniff(content[:HEAD_BYTES]) == "HEIC":
        import pillow_heif

        # pillow-heif applies the EXIF orientation and resets it.
        image: Image.Image = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=True).to_pillow()
        return image
    opened = _opened(content)
    if isinstance(opened, JpegImageFile):
        scale = jpeg.structure(content).scale
        if scale > 1:
            opened.draft(None, (opened.width // scale, opened.height // scale))
    return opened


def reduced(image: Image.Image) -> Image.Image:
    """A decoded image, made smaller by a whole factor if it has more than ``MAX_PIXELS``."""
    factor = math.ceil(math.sqrt(math.prod(image.size) / MAX_PIXELS))
    if factor <= 1:
        return image
    if image.mode.startswith("I"):  # cannot be averaged, and its transparent color is a single value
        smaller = image.resize((image.width // factor, image.height // factor), Image.Resampling.NEAREST)
    else:
        mode = "RGBA" if image.has_transparency_data else "RGB"
        smaller = (image if image.mode == mode else image.convert(mode)).reduce(factor)
    smaller.info = {**smaller.info, **image.info}
    return smaller


def _opened(content: bytes) -> Image.Image:
    """Open an image lazily, with no other plugin than that of its format."""
    name = sniff(content[:HEAD_BYTES])
    if name == "JPEG":
        return jpeg_factory(io.BytesIO(jpeg.with_end(content)))
    if name == "PNG":
        plain, profile = png.simplified(content)
        image = PngImageFile(io.BytesIO(plain))
        if profile is not None:
            image.info["icc_profile"] = profile
        return image
    return WebPImageFile(io.BytesIO(content))
