"""Learn a basis from pseudo-subjects and save it as an adapter that changes nothing yet, for ``--basis_from``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...adapters.presets import nora
from ...adapters.shapes import outer_rank
from ...adapters.tuner.build import flat_weight
from ...errors import UserError
from ...formats.adapter_file import inspect_adapter, read_tensors, require_vacant
from ...formats.keys import factors_by_projection
from ...generation.settings import check_range
from ...io.files import write_atomic
from ...io.untrusted import parse_json
from ...loaders import add_adapter, delete_adapter, save_adapter, trainable_parameters
from ...pipelines.base import is_embedded
from ...pipelines.components import canonical, targets_by_component
from ..planning.adapter import adapted_components, adapter_config, add_seeded_adapter
from ..settings.config import TrainConfig
from ..settings.defaults import with_defaults
from .moments import Learned, Subject, learned_pairs
from .objects import KnownObject, drawn_by_lot
from .pseudo_subjects import PseudoSubject, Workshop, pseudo_subjects

NAME = "basis"
EMBEDDED_RATE = 2.4e-3
"""AdamW's rate on the embedded base, where a LoRA of rank 8 is trained for so few steps."""


@dataclass(frozen=True)
class LearnConfig:
    """What to learn: a basis of rank ``rank`` from ``subjects`` pseudo-subjects of ``images`` images.

    ``objects``: what the base can draw. Each pseudo-subject trains a LoRA of rank ``lora_rank`` for ``steps`` steps,
    ``at_once`` of them in a batch. ``training``: further settings of the trainer, such as the base, targets and
    precision. ``out``: the adapter's folder; its sub-folder ``subjects`` is the working folder.
    """

    out: str
    objects: Sequence[KnownObject]
    subjects: int = 36
    images: int = 4
    steps: int = 90
    rank: int = 32
    lora_rank: int = 8
    at_once: int = 4
    seed: int = 0
    training: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting out of range."""
        for name, high in (("subjects", 10_000), ("images", 100), ("steps", 100_000), ("rank", 4096), ("at_once", 256)):
            check_range(name, getattr(self, name), 1, high)
        check_range("lora_rank", self.lora_rank, 1, 1024)
        if self.subjects * self.lora_rank < self.rank:
            raise UserError(
                f"{self.subjects} pseudo-subjects of rank {self.lora_rank} span less than rank={self.rank}: use "
                "more --subjects or a larger --lora_rank"
            )

    def run_settings(self) -> TrainConfig:
        """The settings that the runs of all pseudo-subjects share."""
        rate = EMBEDDED_RATE if is_embedded(self.training.pretrained_model_name_or_path) else None
        rate = rate if self.training.learning_rate is None else self.training.learning_rate
        settings = replace(
            self.training, method="lora", rank=self.lora_rank, max_train_steps=self.steps, learning_rate=rate
        )
        return with_defaults(settings)


def learn_basis(config: LearnConfig, say: Callable[[str], None] = print) -> Path:
    """Learn a basis and write it; returns the adapter file. Finished pseudo-subjects are not repeated.

    Raises :class:`UserError` for a setting out of range, a folder that holds an adapter or the work of other settings,
    and as the trainer does.
    """
    config.check()
    out = Path(config.out).expanduser()
    require_vacant(out)
    objects = drawn_by_lot(config.objects, config.subjects, config.seed)
    subjects = pseudo_subjects(objects, config.seed)
    shop = Workshop(out / "subjects", config.run_settings(), config.images)
    _same_work(config, shop)
    missing = shop.missing(subjects)
    if missing:
        say(_cost(config, shop, missing))
        shop.draw(missing)
    for start in range(0, len(missing), config.at_once):
        shop.train(missing[start : start + config.at_once])
        say(f"{len(subjects) - len(shop.missing(subjects))} of {len(subjects)} pseudo-subjects are finished")
    return _write(config, shop, subjects, out)


def _same_work(config: LearnConfig, shop: Workshop) -> None:
    """Record what the working folder holds. Raises :class:`UserError` if it has the work of other settings."""
    file = shop.folder / "settings.json"
    run = shop.config
    values = {
        "base": str(run.pretrained_model_name_or_path or ""), "images": config.images, "steps": config.steps,
        "lora_rank": config.lora_rank, "learning_rate": run.learning_rate, "targets": run.target_modules,
        "blocks": run.target_blocks, "text_encoder": run.train_text_encoder, "seed": config.seed,
        "objects": [known.phrase for known in config.objects],
    }  # fmt: skip
    if file.exists():
        try:
            found = dict(parse_json(file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged: choose another --out, or delete {shop.folder}") from error
        different = [name for name, value in values.items() if found.get(name) != value]
        if different:
            raise UserError(
                f"{shop.folder} has pseudo-subjects with other {different[0]}: choose another --out, or delete it"
            )
        return
    write_atomic(file, json.dumps(values))


def _cost(config: LearnConfig, shop: Workshop, missing: Sequence[PseudoSubject]) -> str:
    """What the missing pseudo-subjects cost, after drawing the first one's images and training a few of its steps."""
    image, step = shop.draw(missing[:1]), shop.probe(missing[0])
    images = (len(missing) - 1) * config.images
    minutes = (len(missing) * config.steps * step + images * image) / 60
    drawn = f" + {images} images x {image:.2f} s" if image else ""
    return f"{len(missing)} pseudo-subjects x {config.steps} steps x {step:.2f} s{drawn}: about {minutes:.0f} minutes"


def _write(config: LearnConfig, shop: Workshop, subjects: Sequence[PseudoSubject], out: Path) -> Path:
    run = shop.config
    pipe = shop.source.open()
    components = adapted_components(run, pipe)
    adapter = nora(r=config.rank, inner_r=1, basis="learned", target_modules=adapter_config(run).target_modules)
    with torch.random.fork_rng(devices=[]):
        updates = [_updates(pipe, shop, subject) for subject in subjects]
        layers = targets_by_component(components, adapter)
        ranks = {
            f"{name}.{canonical(path)}": outer_rank(adapter, flat_weight(layer).shape, path)
            for name, own in layers.items()
            for path, layer in own.items()
        }
        pairs = learned_pairs(updates, ranks)
        copied = {name: {path: pairs[f"{name}.{canonical(path)}"] for path in own} for name, own in layers.items()}
        torch.manual_seed(config.seed)
        add_adapter(pipe, adapter, NAME, list(components), basis_from=copied)
    recipe = {
        "objects": [subject.known.phrase for subject in subjects], "images": config.images, "steps": config.steps,
        "lora_rank": config.lora_rank, "learning_rate": run.learning_rate,
    }  # fmt: skip
    return save_adapter(pipe, out, NAME, info={"seed": config.seed, "extra": {"learned_basis": recipe}})


def _updates(pipe: Any, shop: Workshop, subject: PseudoSubject) -> Subject:
    """What a pseudo-subject learned, by component and path. Its random start is drawn again from its seed."""
    run = shop.run_config(subject)
    add_seeded_adapter(run, pipe, adapted_components(run, pipe), NAME)
    start = factors_by_projection({k: v.detach().clone() for k, v in trainable_parameters(pipe, NAME).items()})
    delete_adapter(pipe, NAME)
    trained = factors_by_projection(read_tensors(inspect_adapter(shop.adapter(subject))))
    return {
        f"{component}.{path}": Learned(factors["A"].float(), factors["B"].float(), start[component, path]["A"].cpu())
        for (component, path), factors in trained.items()
    }
