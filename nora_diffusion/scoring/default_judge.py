"""Which images the default judge can score. No torch."""

from __future__ import annotations

from ..errors import UserError
from ..pipelines.base import is_embedded


def check_judge(judge: str | None, base: str | None) -> None:
    """Raises :class:`UserError` if the tiny judge would have to score images of another base than the embedded one."""
    if judge is None and not is_embedded(base):
        raise UserError("measuring needs --judge, for example openai/clip-vit-base-patch32: the default, a tiny CLIP, "
                        "can only score images of the embedded base")  # fmt: skip
