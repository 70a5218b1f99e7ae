"""Load textual inversions of other tools by diffusers: files of their own, and those inside a LoRA file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError, first_line
from ..formats.foreign import bundled_tokens, token_of
from ..formats.foreign_updates import computable
from ..io.tensor_file import TensorFile
from ..io.tensors import all_finite
from ..pipelines.components import Modules
from .tokens import pieces_of


@dataclass
class Embedding:
    """The vectors of a token for one text encoder."""

    token: str
    vectors: Tensor
    side: dict[str, Any]
    path: str


ENCODERS = {"clip_l": "", "clip_g": "_2", "clip_h": ""}
"""The ending of a pipeline's attributes (``text_encoder_2``) by other tools' names of text encoders."""


def own_embedding(pipe: Any, modules: Modules, reader: TensorFile) -> list[Embedding]:
    """The vectors in a textual inversion file, checked."""
    token = token_of(reader)
    first = next((key for key in reader.entries if key != "clip_g"), None)
    keys = ({"": first} if first else {}) | ({"_2": "clip_g"} if "clip_g" in reader.entries else {})
    return [_embedding(pipe, modules, reader, token, key, suffix) for suffix, key in keys.items()]


def bundled_embeddings(pipe: Any, modules: Modules, reader: TensorFile) -> list[Embedding]:
    """The vectors that OneTrainer writes into a LoRA file, checked."""
    found = []
    for token, keys in bundled_tokens(reader).items():
        for encoder, key in keys.items():
            if encoder not in ENCODERS:
                raise UserError(
                    f"{reader.path} holds the embedding {key}, which diffusers cannot load: train it without output "
                    "embeddings, or take the key out"
                )
            found.append(_embedding(pipe, modules, reader, token, key, ENCODERS[encoder]))
    return found


def _embedding(pipe: Any, modules: Modules, reader: TensorFile, token: str, key: str, suffix: str) -> Embedding:
    """One embedding. Raises :class:`UserError` if it does not fit the text encoder."""
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"{reader.path} holds a textual inversion, which {type(pipe).__name__} does not support")
    encoder: Any = modules.get(f"text_encoder{suffix}")
    tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
    vectors = computable(reader.tensor(key))
    if encoder is None:
        raise UserError(f"{reader.path} was made for another base: this pipeline has no text_encoder{suffix}")
    weight = encoder.get_input_embeddings().weight
    if vectors.dim() not in (1, 2) or vectors.shape[-1] != weight.shape[1]:
        raise UserError(
            f"{reader.path} was made for another base: its embeddings have {vectors.shape[-1]} dimensions, "
            f"those of this pipeline's text encoder {weight.shape[1]}"
        )
    if not all_finite(vectors):
        raise UserError(f"{reader.path} holds NaN or infinity: the embedding is broken")
    if token in tokenizer.get_vocab():
        raise UserError(f"the pipeline already has the token {token!r}: call unload_textual_inversion({token!r}) first")
    side = {"tokenizer": tokenizer, "text_encoder": encoder}
    return Embedding(token, vectors.to(weight.dtype), side, str(reader.path))


def load_embeddings(pipe: Any, embeddings: list[Embedding]) -> None:
    """Load checked embeddings under their own tokens, all or nothing."""
    loaded: list[Embedding] = []
    try:
        for one in embeddings:
            pipe.load_textual_inversion({one.token: one.vectors}, token=one.token, **one.side)
            loaded.append(one)
    except Exception as error:
        for one in loaded:
            count = len(one.vectors) if one.vectors.ndim == 2 else 1
            pipe.unload_textual_inversion(pieces_of(one.token, count), **one.side)
        raise UserError(
            f"diffusers cannot load the embedding {embeddings[len(loaded)].token!r} of {embeddings[0].path} "
            f"({first_line(error)[:200]}): use another one"
        ) from error
