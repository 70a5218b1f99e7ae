"""What makes the app's images: the base on this machine (:mod:`.engine`), or a server (:mod:`.remote`). No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.settings import GridConfig
from ..evaluation.sheet import MadeCell
from ..formats.adapter_info import AdapterInfo
from ..generation.library import NamedAdapter
from ..pipelines.base import BaseSource
from .request import ActiveAdapter, Request
from .runs import Run

PREVIEWS = 6
"""Maximum number of previews per image."""
ELSEWHERE = "the adapters are on the server: ask those who run it to change them, or start the app without --server"
ONLY_LOCAL = "this needs the base on this machine, and the app generates on a server: start it without --server for it"


class Backend(ABC):
    """What tabs ask for. What only a local base can do raises :class:`UserError` here."""

    source: BaseSource
    is_remote = False

    @property
    @abstractmethod
    def title(self) -> str:
        """What makes the images, as the page names it."""

    @property
    @abstractmethod
    def base_id(self) -> str:
        """The base's name as written into images, without the folders of this machine."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The base's default number of steps."""

    @property
    @abstractmethod
    def guidance(self) -> float:
        """The base's default guidance scale."""

    @property
    @abstractmethod
    def is_embedded(self) -> bool:
        """Whether this is the base that comes with the package."""

    @property
    @abstractmethod
    def max_side(self) -> int:
        """Largest side of an image in pixels."""

    @abstractmethod
    def warm_up(self) -> None:
        """Do before the first image what it would have to wait for. Raises :class:`UserError`."""

    @abstractmethod
    def mismatch(self, info: AdapterInfo) -> str | None:
        """Why an adapter does not belong to this base, or None."""

    @abstractmethod
    def make(self, request: Request, out: Path, run: Run) -> list[Path]:
        """Generate the images. Each is written to ``out`` with its settings as soon as it is finished."""

    def make_cells(self, config: GridConfig, folder: Path, run: Run) -> list[MadeCell]:
        """Generate a grid into ``folder``, on a server; a local base does it by :mod:`nora_diffusion.evaluation`."""
        raise NotImplementedError

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        raise UserError(ONLY_LOCAL)

    @property
    def device(self) -> str:
        """The device for images and trainings."""
        raise UserError(ONLY_LOCAL)

    @property
    def side(self) -> int:
        """The base's default image size in pixels."""
        raise UserError(ONLY_LOCAL)

    @property
    def offloaded(self) -> bool:
        """Whether the base uses no accelerator memory."""
        return True

    def offload(self) -> None:
        """Leave the accelerator to a training."""
        raise UserError(ONLY_LOCAL)

    def use(self, adapters: Sequence[ActiveAdapter]) -> list[dict[str, Any]]:
        """Load and activate exactly these adapters."""
        raise UserError(ONLY_LOCAL)

    def suggest(self, adapters: Sequence[NamedAdapter], prompt: str, k: int) -> list[tuple[NamedAdapter, float]] | None:
        """The adapters that suit a prompt, with their scores; ``None`` if it has to be called again for them."""
        raise UserError(ONLY_LOCAL)

    def make_batch(self, request: Request, rows: Sequence[Sequence[ActiveAdapter]], out: Path, run: Run) -> list[Path]:
        """Generate all images in one batch, each row with its own adapters."""
        raise UserError(ONLY_LOCAL)
