"""Groups the rows of results files by protocol: only rows of one protocol can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, count
from typing import Any

from ..errors import UserError
from .schema import Better, Results, Row


@dataclass(frozen=True)
class Protocol:
    """Rows that can be compared: of the same base, judges, task, images and steps, measured the same way.

    ``methods``: the settings of each method. ``sources``: the files with such rows.
    """

    task: str
    steps: int
    rows: Sequence[Row]
    methods: dict[str, dict[str, Any]]
    scores: dict[str, Better]
    sources: Sequence[Results]

    @property
    def title(self) -> str:
        """The protocol in words, with the names of its files."""
        first, names = self.sources[0], ", ".join(source.name for source in self.sources)
        return f"{first.protocol['name']} on {first.base.name}: {self.task}, {self.steps} steps ({names})"

    @cached_property
    def criterion(self) -> str:
        """The score by which rates are chosen and methods ranked: held-out loss, else the first that all rows have."""
        common = [name for name in self.scores if all(name in row.scores for row in self.rows if row.is_trained)]
        if not common:
            raise UserError(f"{self.title}: the rows have no score in common, so that they cannot be ranked")
        return "heldout_loss" if "heldout_loss" in common else common[0]

    @cached_property
    def trained(self) -> list[str]:
        """The methods that train something."""
        return list(dict.fromkeys(row.method for row in self.rows if row.is_trained))

    @property
    def untrained(self) -> list[str]:
        """The controls."""
        return list(dict.fromkeys(row.method for row in self.rows if not row.is_trained))

    def of(self, method: str) -> list[Row]:
        """The rows of a method."""
        return self._by_method.get(method, [])

    @cached_property
    def _by_method(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.method, []).append(row)
        return found


def protocols(files: Iterable[Results]) -> list[Protocol]:
    """The protocols of all files, in the order of their first rows. A row that several files have counts once.

    If two files give one name to methods of different settings, the later one is called ``name (file)``.
    """
    groups: dict[str, list[tuple[Results, str]]] = {}
    for file in files:
        for task in dict.fromkeys(row.task for row in file.rows):
            groups.setdefault(_key(file, task), []).append((file, task))
    return [found for group in groups.values() for found in _by_steps(group)]


def _key(file: Results, task: str) -> str:
    images = {
        subject: {purpose: asdict(own) for purpose, own in purposes.items()}
        for subject, purposes in file.data[task].items()
    }
    return json.dumps([file.protocol, file.base.fingerprint, file.judges, task, images], sort_keys=True)


def _by_steps(group: Sequence[tuple[Results, str]]) -> list[Protocol]:
    """A protocol for each number of steps. The base alone belongs to all of them."""
    methods: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[Any, ...], Row] = {}
    scores: dict[str, Better] = {}
    for file, task in group:
        names = _names(file, methods)
        for name, better in file.scores.items():
            if scores.setdefault(name, better) != better:
                raise UserError(
                    f"{file.name} says that a {better} {name} is better, and an earlier file that it is not"
                )
        for row in file.rows:
            if row.task == task:
                named = replace(row, method=names[row.method])
                rows.setdefault(named.identity, named)
    task = group[0][1]
    counts = sorted({row.steps for row in rows.values() if row.is_trained}) or [0]

    def belongs(row: Row, steps: int) -> bool:
        return row.task == task and (not row.is_trained or row.steps == steps)

    return [
        Protocol(
            task, steps, [row for row in rows.values() if belongs(row, steps)], methods, scores,
            sources=[file for file, _ in group if any(belongs(row, steps) for row in file.rows)],
        )
        for steps in counts
    ]  # fmt: skip


def _names(file: Results, methods: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The name of each method of a file among those of all files; adds the new ones to ``methods``."""
    names = {}
    for name, settings in file.methods.items():
        others = (f"{name} ({file.name}{f', {number}' if number > 1 else ''})" for number in count(1))
        names[name] = next(own for own in chain([name], others) if methods.get(own, settings) == settings)
        methods.setdefault(names[name], settings)
    return names
