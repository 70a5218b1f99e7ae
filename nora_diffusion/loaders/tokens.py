"""New tokens of adapters: learned embeddings that are in a pipeline's text encoders as long as their adapter is.

A new token with ``n`` vectors is ``n`` tokenizer entries, ``<dog>``, ``<dog>_1`` ..., named as in diffusers' textual
inversion; diffusers pipelines expand ``<dog>`` in a prompt to all of them. New tokens have no weight, unlike adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.deltas.tokens import LearnedEmbedding
from ..errors import UserError
from ..formats.adapter_info import MAX_VECTORS, WORD
from ..formats.keys import token_key
from ..pipelines.components import Modules, adapter_configs, tokenizer_name
from ..pipelines.names import DENOISERS

LEGACY_END = 2
"""``eos_token_id`` of old CLIP configs: the encoder then takes the largest id for the end, but new tokens have larger
ids."""

NewTokens = Mapping[str, Mapping[str, Tensor]]
"""``{token: {"text_encoder": vectors [n, width], ...}}``."""
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The same with the vectors' shapes."""


def tokens_of(modules: Modules, adapter: str) -> dict[str, dict[str, nn.Parameter]]:
    """The new tokens of a loaded adapter, with their vectors by text encoder."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for encoder, table in _tables(modules).items():
        for token, vectors in table.vectors(adapter).items():
            found.setdefault(token, {})[encoder] = vectors
    return found


def token_parameters(modules: Modules, adapter: str) -> dict[str, nn.Parameter]:
    """The vectors of a loaded adapter's new tokens, by their key in the adapter file."""
    return {
        token_key(number, encoder): vectors
        for number, by_encoder in enumerate(tokens_of(modules, adapter).values())
        for encoder, vectors in by_encoder.items()
    }


def shapes_of(tokens: NewTokens) -> Shapes:
    """The shapes of the vectors, by token and text encoder."""
    return {
        token: {encoder: tuple(vectors.shape) for encoder, vectors in by_encoder.items()}
        for token, by_encoder in tokens.items()
    }


def check_tokens(pipe: Any, modules: Modules, shapes: Shapes) -> None:
    """Raise :class:`UserError` for new tokens that this pipeline cannot have, by the shapes of their vectors."""
    for token, by_encoder in shapes.items():
        counts = {shape[0] for shape in by_encoder.values()}
        if not WORD.fullmatch(token):
            raise UserError(f"{token!r} cannot be a new token: use one word such as <dog>, without spaces or commas")
        if len(counts) != 1 or not 1 <= max(counts) <= MAX_VECTORS:
            raise UserError(
                f"the new token {token!r} must have 1 to {MAX_VECTORS} vectors, the same number in each text encoder"
            )
        if max(counts) > 1 and not hasattr(pipe, "maybe_convert_prompt"):
            raise UserError(
                f"{type(pipe).__name__} supports new tokens with one vector only, and {token!r} has {max(counts)}: "
                "train it with --num_new_tokens_per_abstraction 1"
            )
        for encoder in by_encoder:
            _check_new_token(pipe, modules, encoder, token, list(shapes))


def _check_new_token(pipe: Any, modules: Modules, encoder: str, token: str, new: Sequence[str]) -> None:
    tokenizer = getattr(pipe, tokenizer_name(encoder), None)
    if encoder not in modules or tokenizer is None:
        raise UserError(f"the new token {token!r} is for the {encoder}, which {type(pipe).__name__} does not have")
    _refuse_later_tokens(pipe, encoder, _table(modules[encoder]))
    added = [other for other in tokenizer.get_added_vocab() if other not in tokenizer.all_special_tokens]
    if token in added:
        raise UserError(f"the pipeline already has the token {token!r}: delete the adapter or embedding that added it")
    overlapping = next((o for o in (*added, *new) if o != token and (token in o or o in token)), None)
    if overlapping:
        raise UserError(f"the new tokens {token!r} and {overlapping!r} cannot be used together: one contains the other")
    if len(tokenizer.tokenize(token)) == 1:
        raise UserError(
            f"{token!r} is already a word of the tokenizer: call the new token <{token.strip('<>')}>, in prompts too"
        )


def add_tokens(pipe: Any, modules: Modules, adapter: str, tokens: NewTokens) -> None:
    """Add new tokens to the text encoders, as part of a loaded adapter. Raises as :func:`check_tokens`."""
    check_tokens(pipe, modules, shapes_of(tokens))
    for encoder in dict.fromkeys(encoder for by_encoder in tokens.values() for encoder in by_encoder):
        module: Any = modules[encoder]
        table = _table(module) or _new_table(pipe, encoder, module)
        table.add(adapter, {token: own[encoder] for token, own in tokens.items() if encoder in own})
        _update_tokenizer(pipe, encoder, module, table)


def remove_tokens(pipe: Any, modules: Modules, adapter: str) -> None:
    """Remove the new tokens of an adapter; without any left, the original tokenizer and embedding are put back."""
    tables = {encoder: table for encoder, table in _tables(modules).items() if adapter in table.adapters}
    for encoder, table in tables.items():
        _refuse_later_tokens(pipe, encoder, table)
    for encoder, table in tables.items():
        table.remove(adapter)
        _update_tokenizer(pipe, encoder, modules[encoder], table)


def forget_deleted(pipe: Any, modules: Modules) -> None:
    """Remove the new tokens of adapters that diffusers' own functions deleted, since those leave tokens in place."""
    existing = {name for module in modules.values() for name in adapter_configs(module)}
    for adapter in {name for table in _tables(modules).values() for name in table.adapters} - existing:
        remove_tokens(pipe, modules, adapter)


def _tables(modules: Modules) -> dict[str, LearnedEmbedding]:
    found = {name: _table(module) for name, module in modules.items() if name not in DENOISERS}
    return {encoder: table for encoder, table in found.items() if table is not None}


def _table(module: Any) -> LearnedEmbedding | None:
    table = module.get_input_embeddings()
    return table if isinstance(table, LearnedEmbedding) else None


def _new_table(pipe: Any, encoder: str, module: Any) -> LearnedEmbedding:
    """Replace the embedding of a text encoder, and store what :func:`_update_tokenizer` restores."""
    table = LearnedEmbedding(module.get_input_embeddings())
    module.set_input_embeddings(table)
    tokenizer = getattr(pipe, tokenizer_name(encoder))
    # CLIP reads the id of the end from its modules, so it has to be changed there.
    ends = [m for m in module.modules() if getattr(m, "eos_token_id", None) == LEGACY_END]
    for end in ends:
        end.eos_token_id = tokenizer.eos_token_id
    table.before = (tokenizer, ends)
    return table


def _update_tokenizer(pipe: Any, encoder: str, module: Any, table: LearnedEmbedding) -> None:
    """Give the pipeline a tokenizer with exactly the tokens of ``table``; without any, restore the original state."""
    tokenizer, ends = table.before
    if not table.adapters:
        for end in ends:
            end.eos_token_id = LEGACY_END
        module.set_input_embeddings(table.plain)
        setattr(pipe, tokenizer_name(encoder), tokenizer)
        return
    counts = {token: len(v) for name in table.adapters for token, v in table.vectors(name).items()}
    extended = extended_tokenizer(tokenizer, counts)
    extended.save_pretrained = tokenizer.save_pretrained  # a saved pipeline has no new tokens
    table.set_first_ids({token: extended.convert_tokens_to_ids(token) for token in counts})
    setattr(pipe, tokenizer_name(encoder), extended)


def extended_tokenizer(tokenizer: Any, counts: Mapping[str, int]) -> Any:
    """A copy of a tokenizer with new tokens, each with its number of vectors."""
    from transformers import AddedToken

    extended = copy.deepcopy(tokenizer)
    pieces = [piece for token, count in counts.items() for piece in pieces_of(token, count)]
    # Case matters, and a match inside a longer word does not count.
    extended.add_tokens([AddedToken(piece, normalized=False, single_word=True) for piece in pieces])
    return extended


def pieces_of(token: str, count: int) -> list[str]:
    """The tokenizer entries of a token with ``count`` vectors."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def _refuse_later_tokens(pipe: Any, encoder: str, table: LearnedEmbedding | None) -> None:
    """Refuse a tokenizer that others changed after ours: rebuilding it would change the ids of their tokens."""
    if table is None:
        return
    ours = sum(len(vectors) for name in table.adapters for vectors in table.vectors(name).values())
    if len(getattr(pipe, tokenizer_name(encoder))) != len(table.before[0]) + ours:
        raise UserError(
            f"a textual inversion was added to or removed from the {encoder} after the new tokens of an adapter: undo "
            "that first, for example by unload_textual_inversion('<its token>')"
        )


def expanded(pipe: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Prompts as the pipeline passes them to a tokenizer: tokens with several vectors are expanded to all entries."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return list(prompts) if convert is None else list(convert(list(prompts), tokenizer))


def start_vectors(encoder: Any, tokenizer: Any, count: int, concept: str | None, noise: Tensor) -> Tensor:
    """Initial vectors ``[count, width]`` of a new token: the embeddings of the words in ``concept``, or scaled noise.

    If ``concept`` has fewer tokens than ``count``, they repeat in order; if more, consecutive ones are averaged.
    ``noise [count, width]`` is standard normal; it is scaled to the standard deviation of the embedding table.
    """
    weight = encoder.get_input_embeddings().weight.detach().float().cpu()
    if not concept:
        return noise * weight.std()
    pieces = weight[tokenizer(concept, add_special_tokens=False).input_ids]
    if len(pieces) > count:
        return torch.stack([group.mean(0) for group in pieces.tensor_split(count)])
    return pieces[[number % len(pieces) for number in range(count)]].clone()
