"""Reads and writes results files. Read files are untrusted: every value is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import UserError, first_line, quoted
from ..io.files import write_atomic
from ..io.untrusted import MAX_ITEMS, clean, conform, parse_json
from .schema import FORMAT, VERSION, Results, problems

MAX_BYTES = 1 << 24
MAX_VALUES = 1_000_000
MAX_NAME = 2000
LARGEST = 2.0**64
HEADER = ("format", "version")


def write_results(results: Results, file: Path) -> Path:
    """Write a results file: the head, then one line for each row. Raises :class:`UserError` if it would be invalid.

    Names, which may be those of folders, lose the characters that no reader accepts.
    """
    if problem := next(problems(results), None):
        raise UserError(f"{file} would be invalid: it {problem}")
    try:
        head = {"format": FORMAT, "version": VERSION, **_plain(asdict(results))}
        rows = [json.dumps(_with_null(row), allow_nan=False) for row in head.pop("rows")]
        text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
        text = text.removesuffix("\n}") + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
        _parsed(text)
    except ValueError as error:
        raise UserError(f"{file} would be invalid: {first_line(error)}") from error
    return write_atomic(file, text)


def _parsed(content: str | bytes) -> Results:
    """The results in a file's content. Raises ``ValueError`` for the first value that is none."""
    values = _checked_header(parse_json(content, MAX_VALUES))
    results: Results = _record(Results, values, "")
    return results


def read_results(file: Path) -> Results:
    """Read and check a results file. Raises :class:`UserError` that says what is wrong with it."""
    if not file.is_file():
        raise UserError(f"there is no results file {file}")
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES >> 20} MiB, so it is no results file")
    try:
        results = _parsed(file.read_bytes())
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is not a valid results file: {first_line(error)}") from error
    if problem := next(problems(results), None):
        raise UserError(f"{file} {problem}")
    return results


def _checked_header(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'it has no "format": "{FORMAT}"')
    version = values.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"its version is {quoted(version)}")
    if version > VERSION:
        raise ValueError(f"it has version {version}, and this release reads up to {VERSION}: upgrade")
    return {key: value for key, value in values.items() if key not in HEADER}


def _record(kind: type[Any], values: Any, where: str) -> Any:
    """A dataclass from a JSON object with exactly its fields."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the file'} is not an object")
    hints = get_type_hints(kind)
    if unknown := [key for key in values if key not in hints]:
        raise ValueError(f"{where or 'the file'} has the unknown key {quoted(clean(unknown[0]))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where or 'the file'} has no {missing[0]!r}")
    prefix = f"{where}, " if where else ""
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``: also for records and for lists and dicts of them."""
    if is_dataclass(hint):
        return _record(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list) and len(value) <= MAX_ITEMS:
        return [_value(args[0], item, f"{where}, item {number}") for number, item in enumerate(value, start=1)]
    if origin is dict and isinstance(value, dict) and len(value) <= MAX_ITEMS:
        return {_name(key, where): _item(args[1])(item, f"{where}, {key!a}") for key, item in value.items()}
    return conform(value, hint, where, LARGEST)


def _item(hint: Any) -> Callable[[Any, str], Any]:
    """How the values of a dict are read; null is an infinite score."""
    if hint is float:
        return lambda value, where: math.inf if value is None else conform(value, float, where, LARGEST)
    return lambda value, where: _value(hint, value, where)


def _name(key: str, where: str) -> str:
    if key.strip() != key or not key or len(key) > MAX_NAME or clean(key) != key:
        raise ValueError(
            f"{where} has the key {quoted(clean(key))}, which is not a plain name of 1 to {MAX_NAME:,} characters"
        )
    return key


def _plain(value: Any) -> Any:
    """``value`` with all text and all keys as a reader accepts them."""
    if isinstance(value, dict):
        return {clean(key)[:MAX_NAME].strip() or "unnamed": _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return clean(value)[:MAX_NAME].strip() if isinstance(value, str) else value


def _with_null(row: dict[str, Any]) -> dict[str, Any]:
    scores = {name: value if math.isfinite(value) else None for name, value in row["scores"].items()}
    return {key: value for key, value in row.items() if key != "error" or value} | {"scores": scores}
