"""Captions of images: one prompt for all, caption files beside the images, or the rows of ``metadata.jsonl``.

A name that differs in its Unicode form or its case belongs to an image only if no other image has it exactly.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..io.untrusted import NOT_TEXT, clean, parse_json
from .folder import enumerated, folded

METADATA = "metadata.jsonl"
COLUMN = "text"
SUFFIXES = (".txt", ".caption")
TABLE = re.compile(r"(meta|caption).*\.(csv|tsv|jsonl?|parquet)", re.IGNORECASE)
"""Names under which other tools keep captions."""


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


SPELLINGS: tuple[Callable[[str], str], ...] = (str, _nfc, folded)
"""Ways to compare names, the strictest first."""


@dataclass(frozen=True)
class Captions:
    """One caption per image. ``findings``: sentences about captions that are missing, unused or ambiguous."""

    texts: list[str]
    findings: tuple[str, ...] = ()


def read_captions(
    images: Sequence[Path],
    prompt: str | None,
    sidecars: bool = False,
    column: str | None = None,
    required: bool = True,
) -> Captions:
    """The captions of images of one folder.

    They come from ``column`` of ``metadata.jsonl``; or with ``sidecars`` from the caption file of each image (see
    :func:`caption_files`), else from ``text`` of ``metadata.jsonl``. Images without a caption get ``prompt``. Raises
    :class:`UserError` if an image has neither (unless ``required`` is false: then its caption is empty, with a
    finding), for unreadable files and for contradictory rows.
    """
    folder = images[0].parent
    entries = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    texts = [path for path in entries if path.suffix.lower() in SUFFIXES]
    others = [path for path in entries if path.suffix.lower() not in SUFFIXES and path.name != METADATA]
    owned = caption_files(others, texts)
    beside = {image: owned[image] for image in images if image in owned}
    has_rows = (folder / METADATA).is_file()
    if not sidecars and not column:
        if not prompt:
            raise UserError(
                "there is no prompt: give --instance_prompt 'a photo of sks dog', or captions (--use_captions)"
            )
        return Captions([prompt] * len(images), (*_not_read(beside, has_rows), *_other_tables(images, others)))
    own: dict[Path, str] = {}
    findings: list[str] = []
    if column or has_rows:
        own, findings = _from_rows(list(_rows(folder / METADATA, column or COLUMN)), others)
    if sidecars:
        own |= {image: text for image, files in beside.items() if (text := read_caption(files[0]))}
        findings += [*_ambiguous(beside), *_orphans(texts, owned)]
    missing = [image.name for image in images if image not in own]
    if missing:
        count = f"{len(missing)} of {len(images)} photos have no caption ({named(missing)})"
        source = f"a row of {METADATA}" if column else f"a text file such as {Path(missing[0]).stem}.txt"
        remedy = f"{count}: add {source}, or give --instance_prompt for them"
        if required and not prompt:
            raise UserError(remedy)
        findings.insert(0, f"{count} and get the prompt '{prompt[:80]}' instead: add {source}." if prompt else remedy)
    findings += _other_tables(images, others)
    return Captions([own.get(image, prompt or "") for image in images], tuple(findings))


def caption_files(images: Iterable[Path], files: Iterable[Path]) -> dict[Path, list[Path]]:
    """The caption files of each image, best first: for ``0.jpg`` these are ``0.jpg.txt``, ``0.txt``, ``0.caption``."""
    owners: list[dict[str, list[Path]]] = [{} for _ in SPELLINGS]
    for image in images:
        for spelling, by_stem in zip(SPELLINGS, owners, strict=True):
            for stem in {spelling(image.name), spelling(image.stem)}:
                by_stem.setdefault(stem, []).append(image)
    found: dict[Path, list[Path]] = {}
    for file in files:
        named_alike = (by_stem.get(spelling(file.stem)) for spelling, by_stem in zip(SPELLINGS, owners, strict=True))
        for image in next(filter(None, named_alike), []):
            found.setdefault(image, []).append(file)
    for image, own in found.items():
        own.sort(key=lambda f: (folded(f.stem) != folded(image.name), SUFFIXES.index(f.suffix.lower())))
    return found


def read_caption(file: Path) -> str:
    """The text of a caption file, in one line. Raises :class:`UserError`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the caption {file} cannot be read: save it as UTF-8 text") from error
    if "\0" in text:
        raise UserError(f"the caption {file} is not UTF-8 text: save it as such")
    return " ".join(text.split())


def named(names: Sequence[str]) -> str:
    """The first three names, shortened, and the number of the others."""
    return enumerated([clean(name)[:80] for name in names], limit=3)


def _not_read(beside: Mapping[Path, Sequence[Path]], has_rows: bool) -> Iterator[str]:
    files = [own[0].name for own in beside.values()] + [METADATA] * has_rows
    if files:
        yield f"Captions beside the photos are not read ({named(files)}): add --use_captions, or remove them."


def _other_tables(images: Iterable[Path], others: Iterable[Path]) -> Iterator[str]:
    stems = {folded(name) for image in images for name in (image.name, image.stem)}
    beside = (path for path in others if path.suffix.lower() == ".json" and folded(path.stem) in stems)
    tables = [path.name for path in others if TABLE.fullmatch(path.name)]
    if files := list(dict.fromkeys([*tables, *(path.name for path in beside)])):
        yield (
            f"Captions in files of this kind are not read ({named(files)}): write them to {METADATA}, or to text files "
            "beside the photos."
        )


def _ambiguous(beside: Mapping[Path, Sequence[Path]]) -> Iterator[str]:
    several = [f"{own[0].name} and {own[1].name}" for own in beside.values() if len(own) > 1]
    if several:
        yield f"Photos have more than one caption file ({named(several)}), of which the first is used: keep one."
    users = Counter(own[0].name for own in beside.values())
    shared = [name for name, count in users.items() if count > 1]
    if shared:
        yield (
            f"Caption files belong to more than one photo ({named(shared)}): name them like the photos, such as "
            "0.jpg.txt."
        )


def _orphans(texts: Sequence[Path], owned: Mapping[Path, Sequence[Path]]) -> Iterator[str]:
    used = {file for files in owned.values() for file in files}
    orphans = [file.name for file in texts if file not in used]
    if orphans:
        yield (
            f"{len(orphans)} of {len(texts)} caption files belong to no photo ({named(orphans)}): name them like their "
            "photos, or remove them."
        )


@dataclass(frozen=True)
class _Row:
    """A line of ``metadata.jsonl``: its number, its ``file_name`` and the parts of that path, the caption."""

    line: int
    name: str
    parts: tuple[str, ...]
    text: str


def _rows(path: Path, column: str) -> Iterator[_Row]:
    if not path.is_file():
        raise UserError(f'--caption_column needs {path}, with lines like {{"file_name": "0.jpg", {column!r}: ...}}')
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: save it as UTF-8 text") from error
    for line, text in enumerate(content.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a caption
        if text.strip():
            yield _row(f"{path}, line {line}", line, text, column)


def _row(source: str, line: int, content: str, column: str) -> _Row:
    try:
        row = parse_json(content)
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON ({error}): write one object per line") from error
    name = row.get("file_name") if isinstance(row, dict) else None
    parts = PurePosixPath(name.replace("\\", "/")).parts if isinstance(name, str) else ()
    if not name or not parts:
        raise UserError(f"{source} has no 'file_name'")
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        others = enumerated([key[:80] for key in row if key != "file_name"])
        raise UserError(f"{source} has no text under {column!r}; its keys are {others or 'none'}")
    if NOT_TEXT.search(text):
        raise UserError(f"{source} has half of an emoji (an unpaired surrogate) or a NUL in {column!r}: remove it")
    return _Row(line, name, parts, " ".join(text.split()))


def _from_rows(rows: Sequence[_Row], files: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Captions by file, and a finding about rows that name none. A row with the file's path wins over its base name."""
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(folded(path.name), []).append(path)
    claims: dict[Path, list[tuple[int, _Row]]] = {}
    for row in rows:
        if target := _target(row, by_name.get(folded(row.parts[-1]), [])):
            claims.setdefault(target[1], []).append((target[0], row))
    used, captions = set(), {}
    for path, claimed in claims.items():
        best = min(level for level, _ in claimed)
        closest = [row for level, row in claimed if level == best]
        for row in closest[1:]:
            if row.text != closest[0].text:
                raise UserError(
                    f"{path.with_name(METADATA)}, lines {closest[0].line} and {row.line} have different captions for "
                    f"{path.name} ({named([closest[0].name, row.name])}): keep one of them, or give each file its path"
                )
        used |= {row.line for row in closest}
        captions[path] = closest[0].text
    unused = [row.name for row in rows if row.line not in used]
    finding = (
        f"{len(unused)} of {len(rows)} rows of {METADATA} name no photo of this folder ({named(unused)}): correct "
        "file_name, or remove them."
    )
    return captions, [finding] if unused else []


def _target(row: _Row, files: Sequence[Path]) -> tuple[int, Path] | None:
    """The file that a row names, if there is one, and how: 0 to 2 by its path, 3 to 5 by its base name."""
    for level, (count, spelling) in enumerate(itertools.product((len(row.parts), 1), SPELLINGS)):
        wanted = [spelling(part) for part in row.parts[-count:]]
        found = [path for path in files if [spelling(part) for part in path.absolute().parts[-count:]] == wanted]
        if found:
            return (level, found[0]) if len(found) == 1 else None
        # os.path, since Path.exists raises for impossible names
        if spelling is folded and files and os.path.exists(files[0].parent.joinpath(*row.parts)):  # noqa: PTH110
            return None  # the path of another file, in a sub-folder
    return None
