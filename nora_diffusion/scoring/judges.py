"""Features and scores by a judge: a CLIP (the shipped tiny one, a folder or a hub id) or a vision model.

CLIP-I: mean cosine between features of generated and real images of a subject. CLIP-T: cosine between an image and its
prompt without the trigger. DINO: like CLIP-I, by the class token of a self-supervised vision model, which distinguishes
individuals of one class better. Scores of different judges cannot be compared (DreamBooth, arXiv 2208.12242).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import UserError, first_line
from ..io.tensors import named_hash
from ..pipelines.base import EMBEDDED_WEIGHTS
from ..quiet import no_loading_bars

BATCH = 32


@dataclass
class Judge:
    """A CLIP model with its tokenizer, or a vision model without one.

    Images are resized to ``side`` pixels and normalized by ``mean`` and ``std``.
    """

    model: Any
    tokenizer: Any
    side: int
    mean: Tensor
    std: Tensor


def load_judge(path_or_id: str | Path | None = None) -> Judge:
    """Load a CLIP model; ``None`` or ``"tiny"`` is the embedded base's. Raises :class:`UserError` if that fails."""
    from transformers import AutoTokenizer, CLIPModel

    source = str(EMBEDDED_WEIGHTS / "judge" if path_or_id in (None, "tiny") else path_or_id)
    try:
        # fp32 whatever the weights are stored in: fp16 scores would have three digits.
        with no_loading_bars():
            model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        model = model.eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(source)
        settings = _preprocessing(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the judge {source!r}: {first_line(error)}") from error
    side = int(model.config.vision_config.image_size)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return Judge(model, tokenizer, side, mean, std)


def load_vision(path_or_id: str | Path) -> Judge:
    """Load a vision model in transformers' format (DINO, DINOv2, ViT ...).

    Its feature is the class token of the last layer, or the pooled output of a model without one. Raises
    :class:`UserError`.
    """
    from transformers import AutoModel

    source = str(path_or_id)
    try:
        with no_loading_bars():
            model = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        settings = _preprocessing(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the vision model {source!r}: {first_line(error)}") from error
    if hasattr(model.config, "text_config") or not hasattr(model.config, "num_channels"):
        raise UserError(f"{source} is not a vision model such as facebook/dinov2-base: give a CLIP with --judge")
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    side = _side(settings) or int(model.config.image_size)
    return Judge(model.eval().requires_grad_(False), None, side, mean, std)


def load_judges(clip: str | None, vision: str | None, device: Any) -> dict[str, Judge]:
    """Judges by the names of their scores: ``clip_i``, and ``dino`` if a vision model is given.

    The last one distinguishes individuals best, so it also measures drift and diversity.
    """
    judges = {"clip_i": load_judge(clip)} | ({"dino": load_vision(vision)} if vision else {})
    for judge in judges.values():
        judge.model.to(device)
    return judges


def judge_hashes(judges: Mapping[str, Judge]) -> dict[str, str]:
    """A hash of the weights of each judge: what results files name a judge by."""
    return {name: named_hash(judge.model.state_dict()) for name, judge in judges.items()}


def _side(settings: dict[str, Any]) -> int:
    """The side that images are cropped or resized to; 0 if the preprocessor config has none."""
    for key in ("crop_size", "size"):
        size = settings.get(key)
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        if size:
            return int(size)
    return 0


def _preprocessing(source: str) -> dict[str, Any]:
    # The mixin only reads the file; the image processors need torchvision.
    from transformers.image_processing_base import ImageProcessingMixin

    processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | dict(processor)


def _pixels(judge: Judge, image: Image.Image) -> Tensor:
    """The center square of an image at the judge's size, normalized: ``[3, side, side]``."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.convert("RGB").crop((left, top, left + short, top + short))
    square = square.resize((judge.side, judge.side), Image.Resampling.BICUBIC)
    data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(judge.side, judge.side, 3)
    return (data.permute(2, 0, 1).float() / 255 - judge.mean) / judge.std


@torch.no_grad()
def image_features(judge: Judge, images: Sequence[Image.Image]) -> Tensor:
    """Features of images, as unit vectors ``[n, d]``."""
    features = []
    for start in range(0, len(images), BATCH):
        pixels = torch.stack([_pixels(judge, image) for image in images[start : start + BATCH]])
        features.append(F.normalize(_embed(judge, pixels.to(judge.model.device)), dim=-1).cpu())
    return torch.cat(features)


def _embed(judge: Judge, pixels: Tensor) -> Tensor:
    if judge.tokenizer is not None:
        return judge.model.visual_projection(judge.model.vision_model(pixel_values=pixels).pooler_output)
    output = judge.model(pixel_values=pixels)
    last = output.last_hidden_state
    return last[:, 0] if last.ndim == 3 else output.pooler_output.flatten(1)


@torch.no_grad()
def text_features(judge: Judge, texts: Sequence[str]) -> Tensor:
    """Features of texts, as unit vectors ``[n, d]``."""
    tokens = judge.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    tokens = tokens.to(judge.model.device)
    pooled = judge.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(judge.model.text_projection(pooled), dim=-1).cpu()


def subject_score(judge: Judge, generated: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """CLIP-I: mean cosine over all pairs of generated and reference images."""
    return float((image_features(judge, generated) @ image_features(judge, references).T).mean())


def prompt_score(judge: Judge, generated: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """CLIP-T: mean cosine between each image and its prompt (without the trigger)."""
    return float((image_features(judge, generated) * text_features(judge, prompts)).sum(-1).mean())
