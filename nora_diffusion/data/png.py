"""The chunks of a PNG file that its pixels and colors depend on.

Pillow refuses sound files because of chunks that training does not use, and compares some transparent colors at the
wrong bit depth.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT, MAX_PROFILE = 2**20, 2**24
"""Largest decompressed sizes in bytes; longer texts are dropped, larger profiles count as broken."""
MAX_CHUNKS = 100_000
_IGNORED = {b"zTXt", b"tEXt", b"iTXt"}
_ORIENTATION_TEXTS = {b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1"}
_GRAY, _RGB = 0, 2


def simplified(content: bytes) -> tuple[bytes, bytes | None]:
    """The file as Pillow reads it correctly, and its color profile, empty if that is broken.

    Text is dropped except where it may have the EXIF orientation, and so are damaged ancillary chunks.
    """
    chunks, profile = [SIGNATURE], None
    depth = kind_of_color = 0
    for name, data, is_sound in _chunks(content):
        if name == b"IHDR" and len(data) >= 10:
            depth, kind_of_color = data[8], data[9]
        is_ancillary = bool(name[0] & 32)
        if is_ancillary and (not is_sound or (name in _IGNORED and not _has_orientation(name, data))):
            continue
        if name == b"iCCP":
            profile = _inflated(data.partition(b"\0")[2][1:], MAX_PROFILE) or b""
            continue
        if name == b"tRNS":
            data = _eight_bit_key(data, depth, kind_of_color)
        checksum = zlib.crc32(data, zlib.crc32(name)) ^ (0 if is_sound else 1)
        chunks += [struct.pack(">I", len(data)), name, data, struct.pack(">I", checksum)]
    return b"".join(chunks), profile


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Name, data and whether the checksum is right, of each chunk; the data of the last one may be cut off."""
    position = len(SIGNATURE)
    for count in itertools.count():
        if position + 8 > len(content):
            return
        if count == MAX_CHUNKS:
            raise ValueError(f"more than {MAX_CHUNKS} chunks")
        length, name = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        stored = content[position + 8 + length : position + 12 + length]
        yield name, data, len(stored) == 4 and struct.unpack(">I", stored)[0] == zlib.crc32(data, zlib.crc32(name))
        position += 12 + length
        if name == b"IEND":
            return


def _has_orientation(name: bytes, data: bytes) -> bool:
    keyword, _, rest = data.partition(b"\0")
    if keyword not in _ORIENTATION_TEXTS or len(data) > MAX_TEXT:
        return False
    if name == b"zTXt":
        return _inflated(rest[1:], MAX_TEXT) is not None
    return name == b"tEXt" or rest[:1] == b"\0"  # uncompressed


def _inflated(data: bytes, limit: int) -> bytes | None:
    """The decompressed data; ``None`` if it is damaged or has more than ``limit`` bytes."""
    decompressor = zlib.decompressobj()
    try:
        plain = decompressor.decompress(data, limit)
    except zlib.error:
        return None
    return plain if decompressor.eof else None


def _eight_bit_key(key: bytes, depth: int, kind_of_color: int) -> bytes:
    """The transparent color in the units of Pillow's pixels: 8 bits, except for 16-bit gray."""
    values = [value for (value,) in struct.iter_unpack(">H", key[: len(key) // 2 * 2])]
    if kind_of_color == _GRAY and depth in (2, 4):
        values = [value * 255 // (2**depth - 1) for value in values]
    elif kind_of_color == _RGB and depth == 16:
        values = [value >> 8 for value in values]
    else:
        return key
    return struct.pack(f">{len(values)}H", *values)
