"""The trainer's command: parse, train, and turn what went wrong into a sentence and an exit code."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..pipelines.base import is_embedded
from ..quiet import hide_known_warnings
from .settings.arguments import parse
from .signals import Interrupted

if TYPE_CHECKING:
    from .planning.preflight import Finding
    from .run.train import TrainResult
    from .settings.config import TrainConfig


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the trainer; returns 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    show_log()
    try:
        config = parse(argv, prog)
        if config.subjects and not config.joint and config.engine == "ray" and not config.preflight_only:
            from .many.cluster import train_on_cluster

            return train_on_cluster(config)
        check, train_all = _trainer(config)
        if config.preflight_only:
            return say(check(config), config.strict)
        results = train_all(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped before training began: nothing was written", file=sys.stderr)
        return 130
    for result in results if first_process() else ():
        numbers = f"{result.trainable_parameters:,} trained numbers, {result.steps} steps, {result.seconds:.1f} s"
        print(f"{result.adapter_path}: {numbers}, loss {result.final_loss:.4f}")
    if first_process() and len(results) == 1:
        print(f"make pictures with it: {next_command(config, results[0].adapter_path.parent)}")
    return 0


def next_command(config: TrainConfig, folder: Path) -> str:
    """What makes pictures with the adapter that was just trained."""
    words = ["nora-diffusion", "generate", "--adapter", str(folder), "--prompt", config.instance_prompt or "..."]
    if not is_embedded(config.pretrained_model_name_or_path):
        words += ["--base", str(config.pretrained_model_name_or_path)]
    for name in ("variant", "revision"):
        words += [f"--{name}", value] if (value := getattr(config, name)) else []
    return shlex.join(words)


def _trainer(
    config: TrainConfig,
) -> tuple[Callable[[TrainConfig], list[Finding]], Callable[[TrainConfig], list[TrainResult]]]:
    """What checks, and what trains, the adapters of ``config``."""
    if config.subjects and not config.joint:
        from .many.subjects import check_subjects, train_subjects

        return check_subjects, train_subjects
    from .run.train import check, train

    return check, lambda config: [train(config)]


def say(findings: Sequence[Finding], strict: bool) -> int:
    """Print what was found; 2 if it would keep the run from starting."""
    for finding in findings:
        print(f"{'error' if finding.fatal or strict else 'warning'}: {finding.text}")
    if not findings:
        print("no problems found")
    return 2 if any(finding.fatal or strict for finding in findings) else 0


def first_process() -> bool:
    """Whether this is the only process of a run, or the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def show_log() -> None:
    """Print this package's remarks and warnings, and no other library's, as plain lines on stderr."""
    hide_known_warnings()
    logger = logging.getLogger("nora_diffusion")
    logger.setLevel(logging.INFO if first_process() else logging.WARNING)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
