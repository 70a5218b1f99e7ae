"""The rounds of a federation as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...reports.markdown import table

if TYPE_CHECKING:
    from .state import Round, State


def report(state: State) -> str:
    """Losses, bytes and errors by round, in Markdown."""
    names = list(dict.fromkeys(name for each in state.rounds for name in (*each.losses, *each.left_out)))
    header = [
        "round",
        *(f"loss of {name}" for name in names),
        "mean loss",
        "sent to clients",
        "sent by clients",
        "error",
    ]
    rows = [
        [str(number), *(_loss(each, name) for name in names), f"{each.loss:.4f}",
         size(each.down_bytes), size(each.up_bytes), f"{each.error:.1%}"]
        for number, each in enumerate(state.rounds, 1)
    ]  # fmt: skip
    once = f"Besides, each client got the frozen factors once: {size(state.basis_bytes)}." if state.basis_bytes else ""
    notes = [
        f"- round {number}: {name} was left out: {reason}"
        for number, each in enumerate(state.rounds, 1)
        for name, reason in each.left_out.items()
    ]
    meaning = "*error*: of the aggregated update against the exact mean of the clients' updates."
    return "\n".join([table(header, rows), "", meaning, *([once] if once else []), *notes, ""])


def _loss(each: Round, name: str) -> str:
    return f"{each.losses[name]:.4f}" if name in each.losses else "left out"


def size(count: int) -> str:
    """Bytes as kB or MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
