"""Federated training on the embedded base: plain, exact and LoRA-FAIR averages, and the bytes of a round.

    python benchmarks/federated.py [--rounds 5] [--steps 20] [--methods lora nora_input] [--seeds 0 1]

Three clients learn one adapter: each has the six images of a subject of its own, with a trigger of its own. *loss*: the
held-out denoising loss on other images of the subjects, the mean over the three. *one run*: the same images in one
place (``--joint``), for as many steps as all clients train together, which bounds what averaging can reach. *error*: of
the aggregated update against the exact mean, the mean over the rounds. Bytes: sent to and by a client in a round, and
once. Needs Ray.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from nora_diffusion.loaders import delete_adapter, load_adapter
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.reports.markdown import table
from nora_diffusion.tiny_sd.examples import subject_object
from nora_diffusion.tiny_sd.measures.classroom import Classroom
from nora_diffusion.tiny_sd.measures.probes import Probes
from nora_diffusion.tiny_sd.measures.shown import members, write_shown
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.federated.report import size
from nora_diffusion.training.federated.server import federate
from nora_diffusion.training.federated.settings import Aggregation, Federation

SUBJECTS = ("tiger", "tractor", "cyclops-purple")
TOGETHER = "+".join(SUBJECTS)
COUNT = 6
"""Images of a client."""


def listing(folder: Path) -> Path:
    """The images of the three subjects, and their list for the trainer."""
    write_shown(TOGETHER, folder / "all")
    entries = []
    for number, (subject, trigger) in enumerate(members(TOGETHER).items()):
        own = folder / "clients" / subject
        own.mkdir(parents=True)
        for image in range(number * COUNT, (number + 1) * COUNT):
            for suffix in (".png", ".txt"):
                (folder / "all" / f"{image}{suffix}").rename(own / f"{image}{suffix}")
        prompt = f"a {trigger} {subject_object(subject).class_word}"
        entries.append({"name": subject, "instance_data_dir": str(own), "instance_prompt": prompt})
    file = folder / "clients.yaml"
    file.write_text(json.dumps(entries))
    return file


def loss(room: Classroom, folder: Path) -> float:
    """The held-out loss of one adapter over all subjects."""
    load_adapter(room.pipe, folder, "one")
    try:
        return room.heldout_loss(TOGETHER)
    finally:
        delete_adapter(room.pipe, "one")


def settings(method: str, seed: int, folder: Path) -> TrainConfig:
    """What all runs have in common."""
    rank: dict[str, Any] = {"rank": 8} if method == "lora" else {}
    return TrainConfig(
        method=method, seed=seed, mixed_precision="no", use_captions=True, output_dir=str(folder), **rank
    )


def rows(method: str, seed: int, args: argparse.Namespace, folder: Path, room: Classroom) -> list[list[Any]]:
    """The runs of one method and seed."""
    clients = str(listing(folder))
    found: list[list[Any]] = []
    for how in get_args(Aggregation):
        training = replace(settings(method, seed, folder / how), max_train_steps=args.steps)
        state = federate(Federation(clients, training, args.rounds, how))
        each = state.rounds[0].up_bytes // len(SUBJECTS)
        error = fmean(one.error for one in state.rounds)
        found.append([method, how, loss(room, folder / how), error, size(each), size(state.basis_bytes)])
    steps = args.rounds * args.steps
    joint = replace(settings(method, seed, folder / "joint"), subjects=clients, joint=True)
    train(replace(joint, max_train_steps=steps * len(SUBJECTS)))
    return [*found, [method, "one run", loss(room, folder / "joint"), None, "", ""]]


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each client in a round")
    parser.add_argument("--methods", nargs="+", default=["lora", "nora", "nora_input"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    room, results = Classroom(EMBEDDED_WEIGHTS, Probes(), "no"), []
    for method in args.methods:
        by_seed = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                by_seed.append(rows(method, seed, args, Path(folder), room))
        for same in zip(*by_seed, strict=True):
            name, how, _, error, each, once = same[0]
            mean_error = "" if error is None else f"{fmean(row[3] for row in same):.1%}"
            results.append([name, how, f"{fmean(row[2] for row in same):.4f}", mean_error, each, once])
    header = ["method", "average", "loss", "error", "a client sends and gets in a round", "and once"]
    print(table(header, results))


if __name__ == "__main__":
    main()
