"""Command-line entry point of the trainer: parse, train, print errors and return an exit code."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import printable, stop_signal
from ..pipelines.base import is_embedded
from ..programs import program
from ..quiet import hide_known_warnings
from .settings.arguments import parse
from .settings.checks import check_config
from .signals import Interrupted

if TYPE_CHECKING:
    from .planning.preflight import Finding
    from .run.train import TrainResult
    from .settings.config import TrainConfig


@program
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the trainer. Returns 0, 130 after Ctrl-C, 143 after SIGTERM, or the code of :func:`program`."""
    set_up_logging()
    try:
        config = parse(argv, prog)
        if config.subjects and not config.joint and config.engine == "ray" and not config.preflight_only:
            from .many.cluster import train_on_cluster

            return train_on_cluster(config)
        refuse_early(config)
        check, train_all = _trainer(config)
        if config.preflight_only:
            return print_findings(check(config), config.strict)
        results = train_all(config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt as stop:
        print("stopped before training began; nothing was written", file=sys.stderr)
        return 128 + stop_signal(stop)
    for result in results if is_main_process() else ():
        size = f"{result.trainable_parameters:,} trained parameters, {result.steps} steps, {result.seconds:.1f} s"
        print(f"{result.adapter_path}: {size}, loss {result.final_loss:.4f}")
    if is_main_process() and len(results) == 1:
        print(f"generate images: {next_command(config, results[0].adapter_path.parent)}")
    return 0


def refuse_early(config: TrainConfig) -> None:
    """Refuse most mistakes before torch is imported: settings out of range, a folder without photos."""
    from ..data.folder import find_images  # late: --help needs no Pillow

    if not config.subjects:  # in a list each entry has settings of its own
        check_config(config)
        find_images(Path(config.instance_data_dir or "").expanduser())


def next_command(config: TrainConfig, folder: Path) -> str:
    """The command that generates images with the trained adapter."""
    words = ["nora-diffusion", "generate", "--adapter", str(folder), "--prompt", config.instance_prompt or "..."]
    if not is_embedded(config.pretrained_model_name_or_path):
        words += ["--base", str(config.pretrained_model_name_or_path)]
    for name in ("variant", "revision"):
        words += [f"--{name}", value] if (value := getattr(config, name)) else []
    return shlex.join(words)


def _trainer(
    config: TrainConfig,
) -> tuple[Callable[[TrainConfig], list[Finding]], Callable[[TrainConfig], list[TrainResult]]]:
    """The functions that check and train ``config``: one run, or several subjects."""
    if config.subjects and not config.joint:
        from .many.subjects import check_subjects, train_subjects

        return check_subjects, train_subjects
    from .run.train import check, train

    return check, lambda config: [train(config)]


def print_findings(findings: Sequence[Finding], strict: bool) -> int:
    """Print the findings. Returns 2 if one of them would stop the run, else 0."""
    for finding in findings:
        print(f"{'error' if finding.fatal or strict else 'warning'}: {finding.text}")
    if not findings:
        print("no problems found")
    return 2 if any(finding.fatal or strict for finding in findings) else 0


def is_main_process() -> bool:
    """Whether this process prints and logs for all processes of the run."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging() -> None:
    """Log messages of this package, and of no other library, to stderr."""
    hide_known_warnings()
    logger = logging.getLogger("nora_diffusion")
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)


class _Formatter(logging.Formatter):
    """Cuts long text of the user, such as a caption."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
