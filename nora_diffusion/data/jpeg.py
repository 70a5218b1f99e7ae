"""The structure of a JPEG file: what its decoder has to support, the memory it needs, and where the image ends.

Pillow reports neither a truncated scan (libjpeg fills the rest with gray) nor the coefficients that libjpeg buffers.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass, field

from PIL import Image, ImageChops
from PIL.JpegImagePlugin import jpeg_factory

from ..io.images import MAX_PIXELS

END = b"\xff\xd9"
MAX_SEGMENTS, MAX_SCANS, MAX_FILL = 10_000, 500, 2**16
"""More make a small file slow to decode; ordinary files have a few dozen segments, ten
scans, and no bytes between the segments."""
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte nor a restart marker
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}
_SCALABLE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_OTHER_CODING = {0xC3: "a lossless JPEG", 0xCB: "a lossless JPEG", 0xF7: "a JPEG-LS image"} | dict.fromkeys(
    (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "a hierarchical JPEG"
)
_OTHER_BITS = bytes(range(0x35, 0x95))
_TAIL = re.compile(rb"(\x00{16,}|\xff)\Z")
"""What a file may end with that is no image data: zeros of an incomplete copy, half of the end marker."""


@dataclass
class Structure:
    """Frame header and scans. ``end``: offset of the end marker, ``None`` if it is missing."""

    coding: int = 0
    precision: int = 8
    width: int = 0
    height: int = 0
    sampling: dict[int, int] = field(default_factory=dict)
    """Blocks of each component in a unit of the frame, by component id."""
    largest_sampling: int = 1
    scan_sizes: list[int] = field(default_factory=list)
    """Number of components in each scan."""
    missing_bits: dict[tuple[int, int], int] = field(default_factory=dict)
    """Low bits that no scan has, by component id and coefficient."""
    end: int | None = None
    is_excessive: bool = False
    """Whether it has more than ``MAX_SEGMENTS``, ``MAX_SCANS`` or ``MAX_FILL`` bytes before the first scan."""

    @property
    def unsupported(self) -> str:
        """The kind of image if Pillow cannot decode it, such as ``"a 12-bit JPEG"``; else empty."""
        if self.is_excessive:
            return "a JPEG of unusual structure"
        if self.coding in _OTHER_CODING:
            return _OTHER_CODING[self.coding]
        return f"a {self.precision}-bit JPEG" if self.precision != 8 else ""

    @property
    def is_progressive(self) -> bool:
        return self.coding in _PROGRESSIVE

    @property
    def scale(self) -> int:
        """The smallest factor of the decoder that gives at most ``MAX_PIXELS``; 1 if the file cannot be scaled."""
        if self.coding not in _SCALABLE:
            return 1
        return next((n for n in (1, 2, 4, 8) if self.width * self.height <= n * n * MAX_PIXELS), 8)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of coefficients that the decoder keeps: those of the whole image, if it has several scans."""
        if not self.is_progressive and self.scan_sizes[:1] == [len(self.sampling)]:
            return 0
        return 2 * self.width * self.height * sum(self.sampling.values()) // self.largest_sampling

    @property
    def lacks_scans(self) -> bool:
        """Whether a component or some bits of its coefficients are in no scan."""
        if self.is_progressive:
            return any(self.missing_bits.values())
        return sum(self.scan_sizes) < len(self.sampling)


def structure(content: bytes) -> Structure:
    """Read the markers of the first image in a JPEG file. Damaged files give what can be read of them."""
    found, position, fill = Structure(), 2, 0
    for count in itertools.count():
        match = _MARKER.search(content, position)
        if match is None:
            break
        fill += 0 if found.scan_sizes else match.start() - position
        if count == MAX_SEGMENTS or len(found.scan_sizes) > MAX_SCANS or fill > MAX_FILL:
            found.is_excessive = True
            break
        marker, position = match[1][0], match.end()
        if marker == 0xD9:
            found.end = match.start()
            break
        if marker in (0x01, 0xD8):  # without a segment
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        if length < 2:
            break
        segment = content[position + 2 : position + length]
        if marker in _FRAMES and not found.coding:
            _read_frame(found, marker, segment)
        elif marker == 0xDA and segment:
            _read_scan(found, segment)
        position += length
    return found


def _read_frame(found: Structure, marker: int, segment: bytes) -> None:
    if len(segment) < 6:
        return
    found.coding, found.precision = marker, segment[0]
    found.height, found.width = (int.from_bytes(segment[i : i + 2], "big") for i in (1, 3))
    components = [segment[i : i + 3] for i in range(6, 6 + 3 * segment[5], 3)]
    factors = [(component[0], component[1] >> 4, component[1] & 15) for component in components if len(component) == 3]
    found.sampling = {name: across * down for name, across, down in factors}
    across, down = (max((factor[i] for factor in factors), default=1) for i in (1, 2))
    found.largest_sampling = max(across * down, 1)
    found.missing_bits = {(name, k): 16 for name in found.sampling for k in range(64)}


def _read_scan(found: Structure, segment: bytes) -> None:
    count = segment[0]
    found.scan_sizes.append(count)
    if len(segment) < 2 * count + 4:
        return
    first, last, low_bits = segment[2 * count + 1], segment[2 * count + 2], segment[2 * count + 3] & 15
    for name in segment[1 : 2 * count + 1 : 2]:
        found.missing_bits |= {(name, k): low_bits for k in range(first, min(last, 63) + 1)}


def with_end(content: bytes) -> bytes:
    """The file with an end marker, which some tools lose; without it Pillow refuses a complete image."""
    found = structure(content)
    return content if found.end is not None else _TAIL.sub(b"", content) + END


def missing_share(content: bytes) -> float:
    """The share of the image's height, from the bottom, that is not in the file.

    Two copies of the file have other bytes after their last scan. A complete image does not read them. Of a truncated
    one, the rest is decoded from them, so that the copies differ there.
    """
    found = structure(content)
    if found.lacks_scans:
        return 1.0
    scan = _TAIL.sub(b"", content) if found.end is None else content[: found.end]
    # One value per block shows it, except in progressive files, whose last scans have only details.
    scale = found.scale if found.is_progressive else 8
    first, second = (_decode(scan + more + END, scale) for more in (b"", _OTHER_BITS))
    box = ImageChops.difference(first, second).getbbox()
    return 0.0 if box is None else 1 - box[1] / first.height


def _decode(content: bytes, scale: int) -> Image.Image:
    with jpeg_factory(io.BytesIO(content)) as image:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
        image.load()
        return image
