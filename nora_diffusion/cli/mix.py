"""``nora-diffusion mix``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from ..errors import UserError

HELP = "mix several adapters into one; all modes but gated do without their base"
MODES = ("linear", "cat", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties")
GATED = "gated"
ONLY_GATED = (
    "base", "variant", "revision", "prompts", "images", "num", "gate", "steps", "learning_rate", "balance",
    "mixed_precision", "config",
)  # fmt: skip
"""Flags of the mode ``gated``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("adapters", nargs="+", metavar="PATH[:WEIGHT]", help="adapter files or folders")
    parser.add_argument("--output", "--out", required=True, help="folder to write")
    parser.add_argument(
        "--mode", choices=(*MODES, GATED), default="cat", help="see docs/mixing.md (default: cat, exact)"
    )
    parser.add_argument("--rank", type=int, help="rank of the result, for modes that truncate (default: the sum)")
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="share of entries that magnitude_prune, ties and dare keep, above 0 up to 1",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the entries that dare drops, or of the learning of gates"
    )
    gated = parser.add_argument_group("mode gated", "learns how much of each adapter to use where")
    gated.add_argument("--base", help="pipeline folder or hub id (default: the embedded base)")
    gated.add_argument("--variant", help="variant of the weight files, for example fp16")
    gated.add_argument("--revision", help="revision of the hub repository")
    gated.add_argument(
        "--prompts", nargs="+", metavar="PROMPT", help="draw images of these prompts and learn from them"
    )
    gated.add_argument("--images", metavar="FOLDER", help="learn from these images and their captions instead")
    gated.add_argument("--num", type=int, help="images to draw of each prompt (default: 4)")
    gated.add_argument(
        "--gate",
        choices=("image", "position"),
        help="one gate for each position of an image (the default), or for each image",
    )
    gated.add_argument("--steps", type=int, help="training steps (default: 100)")
    gated.add_argument("--learning_rate", type=float, help="of the gates (default: 0.05)")
    gated.add_argument(
        "--balance", type=float, help="weight of the loss that keeps all adapters in use (default: 0.01)"
    )
    gated.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of training")
    gated.add_argument("--config", metavar="FILE", help="YAML file with more settings of the trainer")


def run(values: argparse.Namespace) -> None:
    """Mix, and print the rank, the error and the overlaps; or learn gates."""
    given = {name: value for name in ONLY_GATED if (value := getattr(values, name)) is not None}
    if values.mode == GATED:
        _learn(values, given)
    elif given:
        raise UserError(f"--{next(iter(given))} is a flag of --mode {GATED}: leave it out, or choose this mode")
    else:
        _mix(values)


def _mix(values: argparse.Namespace) -> None:
    from ..formats.adapter_file import inspect_adapter
    from ..generation.addresses import parse_adapter

    adapters = [parse_adapter(text) for text in values.adapters]
    for path, _ in adapters:
        inspect_adapter(path, hashed=False)  # fails before torch is imported
    from ..composition.mixing import mix_files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        report = mix_files(
            adapters, values.output, values.mode, rank=values.rank, density=values.density, seed=values.seed
        )
    exact = "exact" if report.error == 0 else f"error {report.error:.1%}, {report.kept:.2%} of the energy kept"
    print(f"{report.info.path}: {report.mode}, rank {report.rank} on {report.layers} layers, {exact}")
    for (one, two), score in report.overlaps.items():
        print(f"overlap of {one} and {two}: {score:.2f}")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _learn(values: argparse.Namespace, given: dict[str, Any]) -> None:
    if values.rank is not None:
        raise UserError(f"--rank has no effect with --mode {GATED}, which keeps the adapters as they are: leave it out")
    from ..training.settings.arguments import read_settings
    from ..training.settings.config import TrainConfig
    from ..training.signals import Interrupted

    settings = read_settings(Path(given.pop("config"))) if "config" in given else {}
    names = {"base": "pretrained_model_name_or_path", "variant": "variant", "revision": "revision",
             "mixed_precision": "mixed_precision"}  # fmt: skip
    own = {setting: given.pop(flag) for flag, setting in names.items() if flag in given}
    training = TrainConfig.from_mapping({**settings, **own})
    from ..training.gates.learn import GateConfig, learn_gates

    config = GateConfig(values.adapters, values.output, seed=values.seed, training=training, **given)
    try:
        result = learn_gates(config, print)
    except Interrupted as stop:  # the same command goes on
        raise stop.as_interrupt() from None
    print(
        f"{result.adapter_path}: gates of {len(values.adapters)} adapters, {result.trainable_parameters:,} parameters, "
        f"{result.steps} steps"
    )
