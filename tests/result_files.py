"""A small results file."""

from __future__ import annotations

from nora_diffusion.results.schema import Base, Images, Machine, Results, Row


def row(
    method: str, subject: str, rate: float | None, loss: float, score: float, seed: int = 0, steps: int = 100
) -> Row:
    """A row of the task "six"."""
    trained = {"base": 0, "lora": 400}.get(method, 100)
    return Row(
        method, "six", subject, seed, rate, steps, trained, 10 * trained, 2.0,
        {"heldout_loss": loss, "subject_score": score},
    )  # fmt: skip


def example(rows: list[Row] | None = None) -> Results:
    """Two subjects, with the base and LoRA unless ``rows`` are given."""
    rows = rows or [
        row("base", "cat", None, 0.5, 0.1), row("lora", "cat", 2e-3, 0.3, 0.7),
        row("base", "dog", None, 0.6, 0.1), row("lora", "dog", 2e-3, 0.4, 0.6),
    ]  # fmt: skip
    images = {"training": Images(6, "a" * 64)}
    return Results(
        name="example", command="python -m something --seeds 0", date="2026-11-30",
        protocol={"name": "comparing", "precision": "bf16", "new_scenes": 10}, base=Base("tiny", "b" * 64),
        judges={"clip": "c" * 64}, data={"six": {"cat": images, "dog": images}},
        methods={row.method: {"method": row.method, "rank": 8} for row in rows},
        scores={"heldout_loss": "lower", "subject_score": "higher"}, machine=Machine("a processor", 2, "", "cpu"),
        versions={"torch": "2.10"}, rows=rows,
    )  # fmt: skip
