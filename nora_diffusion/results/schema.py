"""What a results file holds, and what makes it valid."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FORMAT = "nora_diffusion.results"
VERSION = 1
"""Version that this release writes, and the newest that it reads."""
Better = Literal["higher", "lower"]
HASH = re.compile(r"[0-9a-f]{16,64}")
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
RATES = (1e-30, 1e30)
MOST = {"methods": 1000, "scores": 100, "tasks": 100, "subjects": 1000, "numbers of steps": 100}
"""How many of these a file may have, so that a leaderboard takes seconds."""


@dataclass(frozen=True)
class Base:
    """The frozen model: its id, and a hash that changes with its weights."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Images:
    """Images of a subject: how many, and one SHA-256 for all of them, in order."""

    images: int
    sha256: str

    @classmethod
    def of(cls, hashes: Sequence[str]) -> Images:
        """From the hash of each image."""
        return cls(len(hashes), hashlib.sha256("".join(hashes).encode()).hexdigest())


@dataclass(frozen=True)
class Machine:
    """What computed the results. ``seconds``: what the rows count, seconds of the CPU, of the GPU or of a clock."""

    processor: str
    cores: int
    accelerator: str
    seconds: Literal["cpu", "gpu", "clock"]


@dataclass(frozen=True)
class Row:
    """One adapter of one subject, measured.

    ``method``: a key of :attr:`Results.methods`. ``task``: a key of :attr:`Results.data`. ``rate``: the learning rate,
    ``None`` for the base alone, or if it is unknown. ``bytes``: of the adapter's file. ``seconds``: see
    :class:`Machine`. ``scores``: of :attr:`Results.scores`; infinite if the training diverged, only where lower is
    better. ``error``: why it failed.
    """

    method: str
    task: str
    subject: str
    seed: int
    rate: float | None
    steps: int
    trained_parameters: int
    bytes: int
    seconds: float
    scores: dict[str, float]
    error: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether there is an adapter; otherwise it is the base alone."""
        return self.rate is not None or self.trained_parameters > 0

    @property
    def identity(self) -> tuple[Any, ...]:
        """What no two rows of a file share."""
        return self.method, self.task, self.subject, self.seed, self.rate, self.steps


@dataclass(frozen=True)
class Results:
    """A results file.

    ``command``: what was run. ``protocol``: how it was measured (at least ``name``); only rows of equal protocol, base,
    judges, data and steps are compared. ``judges``: the hash of each judge. ``data``: by task, subject and purpose (as
    "training", "scoring") the images. ``methods``: the settings of each method. ``scores``: the measured scores, and
    whether higher or lower is better. ``date``: the day on which it was written.
    """

    name: str
    command: str
    date: str
    protocol: dict[str, str | bool | int | float]
    base: Base
    judges: dict[str, str]
    data: dict[str, dict[str, dict[str, Images]]]
    methods: dict[str, dict[str, Any]]
    scores: dict[str, Better]
    machine: Machine
    versions: dict[str, str]
    rows: list[Row]


def problems(results: Results) -> Iterator[str]:
    """What is wrong with a file whose values all have the right types, as ends of the sentence "the file ..."."""
    if not DATE.fullmatch(results.date):
        yield f"has the date {results.date!r}: write it as 2026-11-30"
    if "name" not in results.protocol:
        yield "does not name its protocol"
    if not results.name.strip():
        yield "has no name"
    if not results.rows:
        yield "has no rows"
    for what, count in _counts(results).items():
        if count > MOST[what]:
            yield f"has {count:,} {what}, and at most {MOST[what]:,} are read"
    yield from _wrong_hashes(results)
    seen = set()
    for number, row in enumerate(results.rows, start=1):
        for problem in _row_problems(row, results):
            yield f"has a row {number} {problem}"
        if row.identity in seen:
            yield f"has a row {number} that repeats an earlier one"
        seen.add(row.identity)


def _counts(results: Results) -> dict[str, int]:
    subjects = {subject for own in results.data.values() for subject in own}
    return {
        "methods": len(results.methods), "scores": len(results.scores), "tasks": len(results.data),
        "subjects": len(subjects), "numbers of steps": len({row.steps for row in results.rows}),
    }  # fmt: skip


def _wrong_hashes(results: Results) -> Iterator[str]:
    hashes = {"the base": results.base.fingerprint} | {f"the judge {k!r}": v for k, v in results.judges.items()}
    for subjects in results.data.values():
        for subject, purposes in subjects.items():
            hashes |= {f"{subject!r}, {purpose}": images.sha256 for purpose, images in purposes.items()}
    for what, value in hashes.items():
        if not HASH.fullmatch(value):
            yield f"has for {what} no hash of 16 to 64 hexadecimal digits, but {value!r}"


def _row_problems(row: Row, results: Results) -> Iterator[str]:
    if row.method not in results.methods:
        yield f"of the method {row.method!r}, whose settings are missing in methods"
    if row.subject not in results.data.get(row.task, {}):
        yield f"of the subject {row.subject!r} in the task {row.task!r}, which data does not have"
    if row.rate is not None and not RATES[0] <= row.rate <= RATES[1]:
        yield f"with the learning rate {row.rate:g}: it must be from 1e-30 to 1e30, or null if there is none"
    for name in ("seed", "steps", "trained_parameters", "bytes", "seconds"):
        if getattr(row, name) < 0:
            yield f"with {name} below 0"
    for name, value in row.scores.items():
        if name not in results.scores:
            yield f"with the score {name!r}, for which scores does not say whether higher or lower is better"
        elif not math.isfinite(value) and not (results.scores[name] == "lower" and value > 0):
            yield f"whose {name} is not a number; null stands for infinite where lower is better"


def digest(hashes: Mapping[str, str]) -> str:
    """One hash of several named ones, in the order of their names."""
    return hashlib.sha256("".join(f"{name}\0{hashes[name]}\0" for name in sorted(hashes)).encode()).hexdigest()
