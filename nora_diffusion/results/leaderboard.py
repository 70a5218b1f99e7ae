"""The leaderboard of results files: a table for each protocol as Markdown, and a page with curves."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence, Sized
from pathlib import Path

from ..errors import UserError
from ..io.files import write_atomic
from ..reports import markdown as tables
from ..reports import webpage
from ..scoring.metrics import digits
from .curves import charts
from .files import read_results
from .protocols import Protocol, protocols
from .ranking import Estimate, Ranking, Standing, control, difference, front, rank
from .schema import Results

REFERENCE = "lora"
"""The method that the others are compared with, where it was measured: LoRA of the usual rank 8."""
LEGEND = (
    "Each subject is at the learning rate that is best for the other subjects (↕: the first or last of those tried, so "
    "the list was too short). In brackets: 95% bootstrap intervals, over subjects and then the rows of each. "
    "Differences are paired by subject and seed. ●: no other method is as good with as few trained parameters."
)
TITLES = {"heldout_loss": "held-out loss", "dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}


def read_all(files: Sequence[Path]) -> list[Results]:
    """Read results files. Raises :class:`UserError` for the first invalid one, and if there is none."""
    if not files:
        raise UserError("there is no results file: give some, for example results/*.json")
    return [read_results(file) for file in files]


def write_leaderboard(files: Sequence[Results], folder: Path, reference: str = REFERENCE) -> str:
    """Write ``leaderboard.md`` and ``leaderboard.html``; return the Markdown."""
    rankings = [rank(protocol) for protocol in protocols(files)]
    text = markdown(rankings, reference)
    write_atomic(folder / "leaderboard.md", text)
    write_atomic(folder / "leaderboard.html", page(rankings, reference))
    return text


def markdown(rankings: Sequence[Ranking], reference: str = REFERENCE) -> str:
    """All tables as one document. Text of the files is escaped, and makes no links or images."""
    parts = ["# Leaderboard", LEGEND]
    for ranking in rankings:
        header, rows = table(ranking, reference)
        header, *rows = ([cell.replace("|", "/") for cell in cells] for cells in (header, *rows))
        parts += [f"## {ranking.protocol.title}", about(ranking.protocol), tables.table(header, rows)]
    return "\n\n".join(html.escape(part, quote=False).replace("](", "] (") for part in parts) + "\n"


def page(rankings: Sequence[Ranking], reference: str = REFERENCE) -> str:
    """All tables and curves as one HTML page."""
    parts = [webpage.paragraph(LEGEND)]
    for ranking in rankings:
        lengths = [other for other in rankings if other.protocol.sources is ranking.protocol.sources]
        parts += [webpage.heading(ranking.protocol.title), webpage.paragraph(about(ranking.protocol))]
        parts += [webpage.table(*table(ranking, reference)), charts(ranking, lengths, title)]
    return webpage.page("Leaderboard", parts)


def about(protocol: Protocol) -> str:
    """Where the rows of a protocol come from."""
    subjects, seeds = {row.subject for row in protocol.rows}, {row.seed for row in protocol.rows}
    machines = {s.machine.accelerator or f"{s.machine.processor}, {s.machine.cores} cores" for s in protocol.sources}
    kinds = {"cpu": "CPU seconds", "gpu": "GPU seconds", "clock": "seconds"}
    seconds = ", ".join(sorted({kinds[source.machine.seconds] for source in protocol.sources}))
    files = ", ".join(f"{source.name} ({source.date})" for source in protocol.sources)
    count = f"{_count(subjects, 'subject')}, {_count(seeds, 'seed')}, {_count(protocol.rows, 'row')}"
    how = ", ".join(
        f"{key} {value}" for key, value in protocol.sources[0].protocol.items() if key != "name" and value != ""
    )
    how += f", {_count(protocol.sources[0].judges, 'judge')}"
    return f"{count}, from {files}. Protocol: {how}. Seconds are {seconds} on {'; '.join(sorted(machines))}."


def _count(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def table(ranking: Ranking, reference: str = REFERENCE) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a protocol: the base alone, then the methods, the best first.

    Without a method ``reference`` the differences are those to the best one.
    """
    protocol, found = ranking.protocol, ranking.standings
    by_name = {standing.method: standing for standing in found}
    other = by_name.get(reference, found[0] if found else None)
    scores = [protocol.criterion, *(name for name in protocol.scores if name != protocol.criterion)]
    best = front(ranking)
    header = ["method", "rate", "trained parameters", "file", "seconds", "rows", *map(title, scores)]
    paired = [protocol.criterion, *(name for name in ("subject_score", "dino") if name in scores[1:])][:2]
    header += [f"{title(name)} minus {other.method}'s" for name in paired if other] + ["Pareto"]
    rows = []
    for method in protocol.untrained:
        values, count = control(protocol, method), len(protocol.of(method))
        rows.append([method, "", "", "", "", str(count), *(_mean(values.get(n), n, protocol) for n in scores)])
        rows[-1] += [""] * (len(header) - len(rows[-1]))
    for standing in found:
        gaps = [_gap(standing, other, name) for name in paired if other]
        rows.append([*_costs(standing), *(_mean(standing.scores.get(n), n, protocol) for n in scores), *gaps])
        rows[-1].append("●" if standing.method in best else "")
    return header, rows


def _costs(standing: Standing) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in standing.rates) + (" ↕" if standing.at_end else "")
    return [
        standing.method, rates, f"{standing.trained_parameters:,}", f"{standing.bytes / 1e6:.2f} MB",
        f"{standing.seconds:.1f}", str(len(standing.rows)),
    ]  # fmt: skip


def _mean(value: Estimate | None, name: str, protocol: Protocol) -> str:
    """The mean; with its interval where it ranks the methods."""
    if value is None:
        return ""
    if not math.isfinite(value.mean):
        return "diverged"
    form = f".{digits(name)}f"
    return value.text(form) if name == protocol.criterion else f"{value.mean:{form}}"


def _gap(standing: Standing, other: Standing, name: str) -> str:
    value = None if standing is other else difference(standing, other, name)
    return "" if value is None or not math.isfinite(value.mean) else value.text(f"+.{digits(name)}f")


def title(score: str) -> str:
    """A score's name in tables."""
    return TITLES.get(score, score.replace("_", " "))
