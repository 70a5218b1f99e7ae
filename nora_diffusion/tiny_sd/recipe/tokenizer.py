"""The CLIP tokenizer of the base: a small BPE in which every word of the training captions is one token.

All 256 byte symbols (also as the end of a word) are in the vocabulary, so any prompt can be encoded; unknown words are
split. ``vocab.json`` and ``merges.txt`` are written too, because not every tool reads ``tokenizer.json``.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..world import vocabulary as world
from .configs import CONTEXT

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def caption_words() -> list[str]:
    """All words of training captions, ``RARE_WORDS`` included, sorted."""
    phrases = [
        *world.CLASS_WORDS,
        *(world.plural(c) for c in world.CLASS_WORDS),
        *world.COLORS,
        *world.SCENES.values(),
        *world.PATTERNS,
        *world.RARE_WORDS,
        *world.ARTISTIC,
        *world.NUMBERS.values(),
        *world.POSITIONS.values(),
        *(e.name for e in world.training_emoji()),
        *(variant.name for variants in world.VARIANTS.values() for variant in variants),
        *world.ACCESSORIES,
        "a an and on in at with next to tree wearing small big background",
    ]
    return sorted({word for phrase in phrases for word in phrase.replace("-", " ").split()})


def _byte_symbols() -> list[str]:
    """The printable character of each of the 256 bytes in CLIP's byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for b in range(256):
        table[b] = chr(b) if b in printable else chr(256 + extra)
        extra += b not in printable
    return [table[b] for b in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Plain BPE on the word list until every word is one symbol; ties go to the alphabetically first pair."""
    pieces = {w: [*w[:-1], w[-1] + END_OF_WORD] for w in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in pieces.values() for pair in itertools.pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for word, symbols in pieces.items():
            pieces[word] = _merge(symbols, best)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files to ``folder`` and load it from there."""
    from transformers import CLIPTokenizer

    symbols = _byte_symbols()
    merges = learn_merges(caption_words())
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *dict.fromkeys("".join(m) for m in merges)]
    vocab = {t: i for i, t in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "model_max_length": CONTEXT,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    special = {k: config[k] for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return CLIPTokenizer.from_pretrained(folder)
