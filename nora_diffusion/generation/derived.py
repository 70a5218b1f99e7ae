"""Pipelines that start from images, made of the models of one that starts from noise: no weight is copied."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..loaders.mixed_batch import WRAPPED


def image_pipeline(pipe: Any, inpaint: bool = False) -> Any:
    """diffusers' image-to-image or inpainting pipeline with the models, adapters and scheduler of ``pipe``.

    Inside ``mixed_batch`` and ``subjects_apart`` it belongs to the context, as ``pipe`` does.
    Raises :class:`UserError` for a pipeline that has none.
    """
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind: Any = AutoPipelineForInpainting if inpaint else AutoPipelineForImage2Image
    try:
        derived = kind.from_pipe(pipe)
    except ValueError as error:
        task = "repaint a part of an image" if inpaint else "start from an image"
        raise UserError(f"diffusers has no pipeline that could {task} with {type(pipe).__name__}") from error
    derived.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    vars(derived).update({name: value for name, value in vars(pipe).items() if name in WRAPPED})
    return derived
