"""``nora-diffusion basis``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..training.bases.objects import KnownObject

HELP = "learn a frozen basis for a base model from objects that it draws itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb of this command and its flags."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    sub = verbs.add_parser("learn", help=HELP, description=HELP)
    sub.add_argument("--out", required=True, help="folder for the basis, which is an adapter that changes nothing yet")
    sub.add_argument("--base", help="pipeline folder or hub id (default: the embedded base)")
    sub.add_argument("--prompts", metavar="FILE", help="objects that the base knows: NAME or NAME: CLASS in each line")
    sub.add_argument("--subjects", type=int, default=36, help="number of pseudo-subjects")
    sub.add_argument("--images", type=int, default=4, help="images that the base draws of each")
    sub.add_argument("--steps", type=int, default=90, help="training steps of each")
    sub.add_argument("--rank", type=int, default=32, help="rank r of the basis")
    sub.add_argument("--lora_rank", type=int, default=8, help="rank of the LoRA that each trains")
    sub.add_argument("--learning_rate", type=float, help="its learning rate (default: that of the base)")
    sub.add_argument("--target_modules", nargs="+", help="modules to adapt, as in train (default: those of the base)")
    sub.add_argument("--at_once", type=int, default=4, help="pseudo-subjects trained in one batch")
    sub.add_argument("--seed", type=int, default=0, help="of objects, images and training")
    sub.add_argument("--config", metavar="FILE", help="YAML file with more settings of the trainer")


def run(values: argparse.Namespace) -> None:
    """Learn the basis and print the command that uses it."""
    from ..formats.adapter_file import require_vacant
    from ..training.settings.arguments import read_settings
    from ..training.settings.config import TrainConfig
    from ..training.signals import Interrupted

    require_vacant(Path(values.out).expanduser())
    objects = _objects(values)
    training = TrainConfig.from_mapping(read_settings(Path(values.config)) if values.config else {})
    given = {"pretrained_model_name_or_path": values.base, "learning_rate": values.learning_rate,
             "target_modules": values.target_modules}  # fmt: skip
    training = replace(training, **{name: value for name, value in given.items() if value is not None})
    from ..training.bases.learn import LearnConfig, learn_basis

    config = LearnConfig(
        values.out, objects, values.subjects, values.images, values.steps, values.rank, values.lora_rank,
        values.at_once, values.seed, training,
    )  # fmt: skip
    try:
        file = learn_basis(config, lambda text: print(text, flush=True))
    except Interrupted as stop:  # the same command goes on with the unfinished ones
        raise stop.as_interrupt() from None
    print(f"{file}\ntrain on it: nora-diffusion train --method nora --basis learned --basis_from {values.out} ...")


def _objects(values: argparse.Namespace) -> Sequence[KnownObject]:
    from ..pipelines.base import is_embedded
    from ..training.bases.objects import COMMON, parse_objects, read_objects

    if values.prompts:
        return read_objects(values.prompts)
    if is_embedded(values.base):
        from ..tiny_sd.world.vocabulary import known_objects

        return parse_objects(known_objects(), "the vocabulary")
    return parse_objects(COMMON, "the list")
