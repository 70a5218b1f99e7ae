"""LoraRetriever: which adapters suit a prompt, by the pipeline's own text encoder. https://arxiv.org/abs/2402.09997

An adapter is the mean of the vectors of a few of its prompts. The paper trains a sentence encoder for this. The text
encoder of a diffusion model is not trained to compare sentences, so that three things are done beside it:

- Words that say nothing about the image have no weight, those about the setting half of it (:mod:`.words`). Triggers,
  which mean nothing to the encoder, are taken out. A prompt is compared phrase by phrase, as it may have several
  subjects.
- The class word counts as much as all captions together, in a sentence as users write it. The name counts half of that:
  it is often the only place for what captions leave out ("mug-blue").
- The vectors of all texts are similar. What they have in common, the mean of the library's adapters and of a few
  generic sentences, is subtracted: a score of 0 is that of any text.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.captions import with_article, without_trigger
from ...formats.adapter_info import AdapterInfo
from ...io import tensor_cache
from ..library import NamedAdapter
from ..tags import BROKEN, TAG
from .embedding import TextEmbedding
from .words import Phrase, has_content, phrases

MIN_SCORE = 0.35
"""An adapter below this score is not suggested."""
MAX_PROMPTS = 8
"""Prompts of an adapter that are read."""
NAME_WEIGHT = 0.5
GENERIC = (
    "a photo of a person", "a picture of an animal", "an image of an object", "a plant in the garden",
    "a vehicle on the street", "a building in the city", "food on a plate", "a red thing on a white background",
    "a blue thing in the room", "a small toy", "a big machine", "a landscape with trees", "the sky at night",
    "water and light", "a black and white drawing", "a colorful painting",
)  # fmt: skip
"""Sentences that stand for any prompt. They matter most beside a small library."""
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
MEANINGLESS = frozenset(
    {"lora", "nora", "adapter", "model", "final", "run", "step", "steps", "test", "sd", "sdxl", "xl"}
)
"""Words of file names that say nothing about a subject."""

Scored = list[tuple[NamedAdapter, float]]


class Retriever:
    """Compares prompts with adapters. Keeps the vectors of adapters, in memory and in the disk cache."""

    def __init__(self, pipe: object) -> None:
        self._embed = TextEmbedding(pipe)
        self._key = self._embed.key()
        self._known: dict[str, Tensor] = {}

    def scores(self, adapters: Sequence[NamedAdapter], prompt: str) -> Scored:
        """All adapters by their score, best first; each must have its ``info``.

        ``score_a = max_q a(q) cos(v_a - c, f(q) - c)`` over the phrases ``q`` of the prompt with their weights
        ``a(q)``, and over the whole prompt with the weight 1: each subject of a prompt finds its adapter. ``v_a`` is
        :meth:`vector`, and ``c`` the mean of all ``v_a`` and of the vectors of :data:`GENERIC`. Empty for a prompt
        without content words.
        """
        asked = _asked(TAG.sub(" ", prompt))
        if not adapters or not asked:
            return []
        vectors = torch.stack([self.vector(adapter) for adapter in adapters])
        center = torch.cat([vectors, self._generic()]).mean(0)
        queries = self._embed([phrase.text for phrase in asked])
        cosines = F.normalize(vectors - center, dim=1) @ F.normalize(queries - center, dim=1).T
        best = (cosines * torch.tensor([phrase.weight for phrase in asked])).max(1).values
        found = zip(adapters, best.tolist(), strict=True)
        return sorted(found, key=lambda pair: (-pair[1], pair[0].name))

    def learn(self, adapters: Sequence[NamedAdapter], seconds: float = math.inf) -> int:
        """Compute missing vectors of adapters, at least one, for about so long. Returns the number that is left."""
        end, missing = time.monotonic() + seconds, self._missing(adapters)
        for done, adapter in enumerate(missing, 1):
            self.vector(adapter)
            if time.monotonic() > end:
                return len(missing) - done
        return 0

    def _missing(self, adapters: Sequence[NamedAdapter]) -> list[NamedAdapter]:
        return [adapter for adapter in adapters if self._name(*describe(adapter)) not in self._known]

    def suggest(self, adapters: Sequence[NamedAdapter], prompt: str, k: int, min_score: float = MIN_SCORE) -> Scored:
        """The best ``k`` of :meth:`scores`, fewer if fewer reach ``min_score``."""
        return [(adapter, score) for adapter, score in self.scores(adapters, prompt)[:k] if score >= min_score]

    def vector(self, adapter: NamedAdapter) -> Tensor:
        """``v = u / |u|`` with ``u = p / |p| + 0.5 f("a photo of a NAME")`` and
        ``p = mean_i f(prompt_i) + f("a photo of a CLASS")``, where what an adapter does not have is left out.
        """
        return self._cached(*describe(adapter))

    def _generic(self) -> Tensor:
        if "generic" not in self._known:
            self._known["generic"] = self._embed(GENERIC)
        return self._known["generic"]

    def _cached(self, prompts: Sequence[str], class_word: str, name: str) -> Tensor:
        """Named by the texts and the encoder, which are all that it depends on: no file has to be read for a hash."""
        key = self._name(prompts, class_word, name)
        if key not in self._known:
            stored = tensor_cache.load(key)
            if stored is None:
                stored = {"vector": self._compute(prompts, class_word, name)}
                tensor_cache.store(key, stored)
            self._known[key] = stored["vector"]
        return self._known[key]

    def _name(self, prompts: Sequence[str], class_word: str, name: str) -> str:
        content = json.dumps([self._key, list(prompts), class_word, name, NAME_WEIGHT])
        return f"retrieval-{hashlib.sha256(content.encode()).hexdigest()}"

    def _compute(self, prompts: Sequence[str], class_word: str, name: str) -> Tensor:
        rows = self._embed([*prompts, _sentence(class_word), _sentence(name)])
        described = rows[:-2].mean(0) + rows[-2] if prompts else rows[-2]
        return F.normalize(F.normalize(described, dim=0) + NAME_WEIGHT * rows[-1], dim=0)


def suggest(
    pipe: object, adapters: Sequence[NamedAdapter], prompt: str, k: int = 3, min_score: float = MIN_SCORE
) -> Scored:
    """The ``k`` adapters that suit a prompt best, with their scores: 1 is the most, 0 is that of any text.

    ``adapters``: those of :func:`.usable.usable`. The list is shorter if fewer reach ``min_score``.
    """
    return Retriever(pipe).suggest(adapters, prompt, k, min_score)


def _asked(prompt: str) -> list[Phrase]:
    """What a prompt is compared by: its phrases, and all of it. Empty if no word says what is in the image."""
    parts = [phrase for phrase in phrases(prompt) if phrase.content]
    return [*parts, Phrase((prompt,), 1.0)] if parts else []


def describe(adapter: NamedAdapter) -> tuple[list[str], str, str]:
    """What is known about an adapter in words: a few of its prompts, its class word, the words of its name."""
    info = adapter.info or AdapterInfo({})
    texts = dict.fromkeys(_plain(text, info) for text in [*info.prompts, info.instance_prompt] if text)
    prompts = [text for text in texts if has_content(text)]
    step = max(1, -(-len(prompts) // MAX_PROMPTS))
    trigger = " ".join(_triggers(info))
    readable = "" if prompts or info.class_word else trigger  # of other tools' files, often words as "blue mug"
    return prompts[::step] or ([readable] if readable else []), info.class_word, name_words(adapter.name)


def name_words(name: str) -> str:
    """The words of a file's name: ``dogs#Old_blueMug-v2`` gives ``old blue mug``."""
    spaced = HUMP.sub(" ", name.rpartition("#")[2])
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", spaced)]
    return " ".join(word for word in words if word not in MEANINGLESS and (len(word) > 2 or not word.isascii()))


def _plain(text: str, info: AdapterInfo) -> str:
    """A prompt without tags and without what only the adapter understands: its triggers and new tokens."""
    text = BROKEN.sub(" ", TAG.sub(" ", text))
    for word in (*_triggers(info), *info.tokens):
        text = without_trigger(text, word)
    return " ".join(text.split())


def _triggers(info: AdapterInfo) -> list[str]:
    return info.trigger.replace(",", " ").split()


def _sentence(words: str) -> str:
    return f"a photo of {with_article(words)}" if words else ""
