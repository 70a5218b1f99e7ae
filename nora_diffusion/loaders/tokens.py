"""The new tokens of adapters: words with learned embeddings, which a pipeline knows while their adapter is in it.

A word of ``n`` vectors is ``n`` tokens, ``<dog>``, ``<dog>_1`` ..., as diffusers' textual inversion names them: its
pipelines write the others behind the first one. A word has no weight: it is there as long as its adapter is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.deltas.tokens import LearnedEmbedding
from ..errors import UserError
from ..formats.adapter_info import WORD
from ..formats.keys import token_key
from ..pipelines.components import DENOISERS, Modules, adapter_configs, component, components, tokenizer_name

MAX_VECTORS = 64
LEGACY_END = 2
"""The ``eos_token_id`` of old configs, by which CLIP takes the largest id for the end; new tokens have larger ones."""

Words = Mapping[str, Mapping[str, Tensor]]
"""``{word: {"text_encoder": vectors [n, width], ...}}``."""


def tokens_of(modules: Modules, adapter: str) -> dict[str, dict[str, nn.Parameter]]:
    """The words of an adapter of a pipeline, with their vectors by text encoder."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for part, table in _tables(modules).items():
        for word, vectors in table.vectors(adapter).items():
            found.setdefault(word, {})[part] = vectors
    return found


def token_parameters(modules: Modules, adapter: str) -> dict[str, nn.Parameter]:
    """The vectors of an adapter's words by their key in the adapter file."""
    return {
        token_key(number, part): vectors
        for number, own in enumerate(tokens_of(modules, adapter).values())
        for part, vectors in own.items()
    }


def check_words(pipe: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise :class:`UserError` for words that this pipeline cannot learn or take, by their vectors' shapes."""
    check_new_words(pipe, components(pipe), shapes)


def check_new_words(pipe: Any, modules: Modules, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """:func:`check_words` for components that the caller has resolved."""
    for word, own in shapes.items():
        counts = {shape[0] for shape in own.values()}
        if not WORD.fullmatch(word):
            raise UserError(f"{word!r} cannot be a new token: use one word such as <dog>, without spaces or commas")
        if len(counts) != 1 or not 1 <= max(counts) <= MAX_VECTORS:
            raise UserError(f"the new token {word!r} must have 1 to {MAX_VECTORS} vectors, as many in each encoder")
        if max(counts) > 1 and not hasattr(pipe, "maybe_convert_prompt"):
            raise UserError(
                f"a {type(pipe).__name__} takes new tokens of one vector only, and {word!r} has {max(counts)}: "
                "train it with --num_new_tokens_per_abstraction 1"
            )
        for part in own:
            _check_new(pipe, modules, part, word, shapes)


def _check_new(pipe: Any, modules: Modules, part: str, word: str, words: Mapping[str, Any]) -> None:
    tokenizer = getattr(pipe, tokenizer_name(part), None)
    if part not in modules or tokenizer is None:
        raise UserError(f"the new token {word!r} is for the {part}, which a {type(pipe).__name__} does not have")
    _refuse_later_words(pipe, modules[part], part)
    there = [other for other in tokenizer.get_added_vocab() if other not in tokenizer.all_special_tokens]
    near = next((other for other in (*there, *words) if other != word and (word in other or other in word)), None)
    if word in there:
        raise UserError(
            f"the word {word!r} is in the pipeline already: delete the adapter or the embedding that has it"
        )
    if near:
        raise UserError(f"the new tokens {word!r} and {near!r} cannot stand side by side: one is part of the other")
    if len(tokenizer.tokenize(word)) == 1:
        bare = word.strip("<>")
        raise UserError(
            f"{word!r} is a word that the tokenizer has already: call the new token <{bare}>, in the prompts too"
        )


def add_tokens(pipe: Any, adapter: str, words: Words) -> None:
    """Make new words known, as those of an adapter that is in the pipeline. Raises as :func:`check_words`."""
    add_words(pipe, components(pipe), adapter, words)


def add_words(pipe: Any, modules: Modules, adapter: str, words: Words) -> None:
    """:func:`add_tokens` for components that the caller has resolved."""
    check_new_words(pipe, modules, {w: {part: tuple(v.shape) for part, v in own.items()} for w, own in words.items()})
    for part in dict.fromkeys(part for own in words.values() for part in own):
        encoder: Any = modules[part]
        table = encoder.get_input_embeddings()
        if not isinstance(table, LearnedEmbedding):
            table = LearnedEmbedding(table)
            encoder.set_input_embeddings(table)
            _remember(pipe, encoder, part, table)
        table.add(adapter, {word: own[part] for word, own in words.items() if part in own})
        _renumber(pipe, modules[part], part, table)


def remove_tokens(pipe: Any, modules: Modules, adapter: str) -> None:
    """Forget the words of an adapter; without any, tokenizer and embedding are the objects they were before."""
    tables = {part: table for part, table in _tables(modules).items() if adapter in table.adapters}
    for part in tables:
        _refuse_later_words(pipe, modules[part], part)
    for part, table in tables.items():
        table.remove(adapter)
        _renumber(pipe, modules[part], part, table)


def forget_deleted(pipe: Any, modules: Modules) -> None:
    """Drop the words of adapters that were deleted by diffusers' own verbs, which know no words."""
    here = {name for module in modules.values() for name in adapter_configs(module)}
    for adapter in {name for table in _tables(modules).values() for name in table.adapters} - here:
        remove_tokens(pipe, modules, adapter)


def _tables(modules: Modules) -> dict[str, LearnedEmbedding]:
    found = {part: _table(module) for part, module in modules.items() if part not in DENOISERS}
    return {part: table for part, table in found.items() if table is not None}


def _table(encoder: Any) -> LearnedEmbedding | None:
    table = encoder.get_input_embeddings()
    return table if isinstance(table, LearnedEmbedding) else None


def _remember(pipe: Any, encoder: nn.Module, part: str, table: LearnedEmbedding) -> None:
    """Keep what :func:`_renumber` puts back: the tokenizer, and what the encoder takes for the end of a prompt."""
    tokenizer = getattr(pipe, tokenizer_name(part))
    ends = [m for m in encoder.modules() if getattr(m, "eos_token_id", None) == LEGACY_END]
    for module in ends:
        module.eos_token_id = tokenizer.eos_token_id
    table.before = (tokenizer, ends)


def _renumber(pipe: Any, encoder: Any, part: str, table: LearnedEmbedding) -> None:
    """A tokenizer with exactly the words of ``table`` behind its own; the one before it if there are none."""
    tokenizer, ends = table.before
    if not table.adapters:
        for module in ends:
            module.eos_token_id = LEGACY_END
        encoder.set_input_embeddings(table.plain)
        setattr(pipe, tokenizer_name(part), tokenizer)
        return
    from transformers import AddedToken

    larger = copy.deepcopy(tokenizer)
    pieces = {word: pieces_of(word, len(v)) for name in table.adapters for word, v in table.vectors(name).items()}
    # As they are written, and not within longer words.
    larger.add_tokens([AddedToken(p, normalized=False, single_word=True) for own in pieces.values() for p in own])
    table.set_first_ids({word: larger.convert_tokens_to_ids(word) for word in pieces})
    setattr(pipe, tokenizer_name(part), larger)


def pieces_of(word: str, count: int) -> list[str]:
    """The tokens of a word of ``count`` vectors."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def _refuse_later_words(pipe: Any, encoder: nn.Module, part: str) -> None:
    """Words that others added behind ours would lose their places."""
    table = _table(encoder)
    if table is None:
        return
    ours = sum(len(vectors) for name in table.adapters for vectors in table.vectors(name).values())
    if len(getattr(pipe, tokenizer_name(part))) != len(table.before[0]) + ours:
        raise UserError(
            f"the {part} got or lost a textual inversion after the new tokens of an adapter: undo that first, "
            "for example by unload_textual_inversion('<its word>')"
        )


def expanded(pipe: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Prompts as the pipeline gives them to a tokenizer: with all tokens of words that have several vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return list(prompts) if convert is None else list(convert(list(prompts), tokenizer))


def start_vectors(pipe: Any, part: str, count: int, concept: str | None, draw: Tensor) -> Tensor:
    """Vectors ``[count, width]`` to start from: those of the words ``concept``, or ``draw`` in the size of all words'.

    Few pieces are taken in turn, many are averaged in their order. ``draw [count, width]`` is standard normal noise.
    """
    encoder: Any = component(pipe, part)
    weight = encoder.get_input_embeddings().weight.detach().float().cpu()
    if not concept:
        return draw * weight.std()
    tokenizer = getattr(pipe, tokenizer_name(part))
    pieces = weight[tokenizer(concept, add_special_tokens=False).input_ids]
    if len(pieces) > count:
        return torch.stack([some.mean(0) for some in pieces.tensor_split(count)])
    return pieces[[number % len(pieces) for number in range(count)]].clone()
