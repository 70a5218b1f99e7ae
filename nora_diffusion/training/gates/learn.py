"""Learns the gates of a mixture of frozen adapters, and saves it as one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...adapters.axes import OutputRouter
from ...composition.mixing import mix_gated
from ...errors import UserError
from ...formats.adapter_file import FILE_NAME, inspect_adapter
from ...generation.addresses import parse_adapter
from ...generation.settings import check_prompt, check_range
from ...io.run_layout import CHECKPOINTS, checkpoint_steps
from ...pipelines.base import BaseSource
from ..run.train import TrainResult, train
from ..settings.config import TrainConfig
from .images import draw

Say = Callable[[str], None]
Gate = Literal["image", "position"]
ROUTERS: dict[Gate, OutputRouter] = {"image": "pooled_outputs", "position": "outputs"}
PARTS, IMAGES = "parts", "images"
"""Folders in the output: the mixture before it is trained, and the images that were drawn."""


@dataclass
class GateConfig:
    """What to learn gates from: ``images``, a folder with captions, or ``prompts``, for which ``num`` are drawn each.

    ``adapters``: ``path[:weight]``. ``gate``: one for each position of an image, or one for the image, as in MoLE.
    ``balance``: the weight of the loss that keeps all adapters in use. ``training``: other settings of the trainer.
    """

    adapters: Sequence[str]
    output: str
    prompts: Sequence[str] = ()
    images: str | None = None
    num: int = 4
    gate: Gate = "position"
    steps: int = 100
    learning_rate: float = 0.05
    balance: float = 0.01
    seed: int = 0
    training: TrainConfig | None = None

    def check(self) -> None:
        """Raises :class:`UserError`."""
        if self.gate not in ROUTERS:
            raise UserError(f"gate={self.gate!r} is unknown: choose one of {', '.join(ROUTERS)}")
        if bool(self.prompts) == (self.images is not None):
            raise UserError("give either prompts, for which images are drawn, or a folder of images with captions")
        for prompt in self.prompts:
            check_prompt(prompt)
        check_range("num", self.num, 1, 100)


def learn_gates(config: GateConfig, say: Say = lambda text: None) -> TrainResult:
    """Learn the gates of frozen adapters, ``y = W x + sum_i g_i(x) w_i dW_i x``, and save them with the adapters.

    MoLE, https://arxiv.org/abs/2404.13628: see :class:`nora_diffusion.adapters.deltas.gated.GatedDelta`. The loss is
    the trainer's denoising loss on the images, plus ``balance`` times ``-log prod_i q_i`` with ``q_i`` the mean gate of
    adapter ``i``. An interrupted call goes on where it stopped. Raises :class:`UserError`.
    """
    config.check()
    output = Path(config.output).expanduser()
    training = config.training or TrainConfig()
    parts = _parts(config, output)
    images = config.images
    if images is None:
        source = BaseSource(
            training.pretrained_model_name_or_path, None, "auto", training.variant, training.revision
        )  # fmt: skip
        images = str(output / IMAGES)
        count = draw(Path(images), config.adapters, config.prompts, config.num, config.seed, source)
        say(f"{count} images were drawn to {images}")
    return train(run_config(config, training, parts, images))


def _parts(config: GateConfig, output: Path) -> Path:
    """The mixture at equal shares; written once."""
    parts = output / PARTS
    adapters = [parse_adapter(text) for text in config.adapters]
    if (parts / FILE_NAME).is_file():
        recipe = inspect_adapter(parts, hashed=False).extra.get("mix", {})
        wanted = [inspect_adapter(path).sha256 for path, _ in adapters], [weight for _, weight in adapters]
        found = [part["sha256"] for part in recipe["parts"]], [part["weight"] for part in recipe["parts"]]
        if found != wanted or recipe["router"] != ROUTERS[config.gate]:
            raise UserError(f"{output} holds gates of other adapters or another kind: choose another output folder")
        return parts
    mix_gated(adapters, parts, ROUTERS[config.gate])
    return parts


def run_config(config: GateConfig, training: TrainConfig, parts: Path, images: str) -> TrainConfig:
    """The run that trains the gates."""
    output = Path(config.output).expanduser()
    info = inspect_adapter(parts, hashed=False)
    resumes = bool(checkpoint_steps(output / CHECKPOINTS))
    return replace(
        training, gates_of=str(parts), instance_data_dir=images, use_captions=True, output_dir=str(output),
        instance_prompt=training.instance_prompt or info.instance_prompt or "a photo", seed=config.seed,
        max_train_steps=config.steps, learning_rate=config.learning_rate, balance_loss_weight=config.balance,
        resume_from_checkpoint="latest" if resumes else None,
    )  # fmt: skip
