"""What the trainer's tests share: the type of their config fixture and command lines."""

from __future__ import annotations

from collections.abc import Callable

from nora_diffusion.training import TrainConfig

Configure = Callable[..., TrainConfig]


def flags(config: TrainConfig) -> list[str]:
    """The command line that means ``config``."""
    words: list[str] = []
    for name, value in config.to_dict(secrets=True).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words
