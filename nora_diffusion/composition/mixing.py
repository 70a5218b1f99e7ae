"""Several adapters become one: in a pipeline, or from file to file without a base."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError
from ..formats.adapter_file import AdapterInfo, inspect_adapter, require_vacant, write_adapter
from ..formats.keys import Projection, factors_by_projection
from ..formats.model_card import write_card
from ..generation.tags import check_range
from ..loaders import set_adapters
from ..loaders.inject import check_new_name
from ..loaders.load import place
from ..loaders.locking import one_at_a_time
from ..loaders.tokens import tokens_of
from ..pipelines.base import base_id
from ..pipelines.components import components, refuse_merged, refuse_offloaded, refuse_serving
from ..versions import versions
from .angles import WARN_ABOVE, source_overlap
from .assembly import assemble
from .modes import MODES, Mixed, Mode, Options
from .sources import Source, check_same_base, file_source, loaded_source


@dataclass
class MixReport:
    """What a mix is: its largest rank and number of projections, and the share of ``||dW||_F^2`` that it ``kept``.

    ``error`` is ``||dW_mix - dW||_F / ||dW||_F`` against what the mode's formula asks for, over all projections: 0 for
    the exact modes. ``overlaps`` holds the overlap of each two parts, ``warnings`` a sentence for each that is high.
    ``info`` is what its file says, or will say.
    """

    name: str
    mode: str
    rank: int
    layers: int
    kept: float
    error: float
    overlaps: dict[tuple[str, str], float]
    warnings: list[str]
    info: AdapterInfo


@one_at_a_time
def mix(
    pipe: Any,
    weights: Mapping[str, float],
    mode: Mode = "cat",
    adapter_name: str = "mix",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    activate: bool = True,
) -> MixReport:
    """Make one new adapter of several that the pipeline holds, ours or plain LoRAs: ``mix(pipe, {"dog": 0.8, ...})``.

    ``activate`` makes it the only active one, because its parts beside it would count twice; they stay loaded.
    :func:`nora_diffusion.save_adapter` writes it to a file that names its parts. ``rank``, ``density`` and ``seed`` are
    settings of some modes (see :class:`~nora_diffusion.composition.modes.Options`).

    Raises :class:`UserError` for an unknown mode or adapter, a part without a ``dW`` (MoR, DoRA) or a taken name.
    """
    options = Options(rank, density, seed)
    _check(weights, mode, options)
    modules = components(pipe)
    refuse_merged(modules)
    refuse_serving(modules)
    refuse_offloaded(modules)
    sources = [loaded_source(modules, name) for name in weights]
    for name in weights:
        _refuse_tokens(repr(name), tokens_of(modules, name))
    parts = dict.fromkeys(part for source in sources for part, _ in source.updates)
    check_new_name(pipe, modules, adapter_name, list(parts))
    report, tensors = _combine(adapter_name, sources, list(weights.values()), mode, options)
    report.info.base = base_id(pipe)
    place(pipe, modules, adapter_name, report.info, tensors, activate=False, weight=1.0)
    if activate:
        set_adapters(pipe, adapter_name)
    return report


def mix_files(
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    mode: Mode = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    basis_dir: str | Path | None = None,
) -> MixReport:
    """Mix adapter files into ``output/nora_adapter.safetensors`` with a model card, without opening their base.

    ``basis_dir``: where their shared basis lies, if not beside them. Raises :class:`UserError` as :func:`mix` does, and
    for adapters of different bases.
    """
    options = Options(rank, density, seed)
    sources = _with_own_names([file_source(path, basis_dir) for path, _ in adapters])
    _check({source.name: weight for source, (_, weight) in zip(sources, adapters, strict=True)}, mode, options)
    check_same_base(sources)
    for source in sources:
        _refuse_tokens(source.info.path if source.info else source.name, source.info.tokens if source.info else {})
    folder = _new_folder(output)
    report, tensors = _combine(folder.name, sources, [weight for _, weight in adapters], mode, options)
    infos = [source.info for source in sources if source.info is not None]
    info = report.info
    info.base, info.versions = infos[0].base, versions()
    for part in info.components:
        prints = [known.base_fingerprint.get(part, {}) for known in reversed(infos)]
        info.base_fingerprint[part] = {path: value for known in prints for path, value in known.items()}
    info.conv_shapes = {path: shape for known in infos for path, shape in known.conv_shapes.items()}
    if not all(config.stored_outer for config in info.configs.values()):
        info.shapes = {path: shape for known in infos for path, shape in known.shapes.items()}
    file = write_adapter(folder, tensors, info)
    report.info = inspect_adapter(file)
    write_card(folder, report.info, _card(info))
    return report


def _with_own_names(sources: list[Source]) -> list[Source]:
    """Files of one name from several folders are told apart by a number."""
    seen: Counter[str] = Counter()
    for source in sources:
        seen[source.name] += 1
        if seen[source.name] > 1:
            source.name = f"{source.name}-{seen[source.name]}"
    return sources


def _refuse_tokens(owner: str, tokens: Mapping[str, Any]) -> None:
    """A new token is a word, not a ``dW``."""
    if tokens:
        raise UserError(
            f"{owner} brings new tokens ({', '.join(tokens)}), which have no weight to mix by: keep it active beside "
            "the others with set_adapters"
        )


def _new_folder(output: str | Path) -> Path:
    folder = Path(output).expanduser()
    if folder.suffix == ".safetensors" or folder.is_file():
        raise UserError(f"{output} is a file name: give a folder for the mix and its card")
    require_vacant(folder)
    return folder


def _check(weights: Mapping[str, float], mode: str, options: Options) -> None:
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
    if not weights:
        raise UserError("there is nothing to mix: name at least one adapter with its weight")
    for name, weight in weights.items():
        check_range(weight, f"the mix for {name!r}")
    options.check()


def _combine(
    name: str, sources: Sequence[Source], weights: Sequence[float], mode: Mode, options: Options
) -> tuple[MixReport, Any]:
    overlaps = {(one.name, two.name): source_overlap(one, two).score for one, two in combinations(sources, 2)}
    mixed: dict[Projection, Mixed] = {}
    for key in dict.fromkeys(key for source in sources for key in source.updates):
        here = [(s.updates[key], w) for s, w in zip(sources, weights, strict=True) if key in s.updates]
        updates, factors = [update for update, _ in here], [weight for _, weight in here]
        mixed[key] = MODES[mode](updates, factors, replace(options, seed=_layer_seed(options.seed, key)))
    configs, tensors = assemble({key: m.update for key, m in mixed.items()}, sources)
    energy, lost = (sum(getattr(m, field) for m in mixed.values()) for field in ("energy", "lost"))
    share = lost / energy if energy else 0.0
    rank = max(
        tensor.shape[0]
        for factors in factors_by_projection(tensors).values()
        for name, tensor in factors.items()
        if name in ("A", "A_in", "R")
    )
    info = _describe(sources, weights, mode, options)
    info.components = {part: config.to_dict() for part, config in configs.items()}
    return MixReport(name, mode, rank, len(mixed), 1 - share, share**0.5, overlaps, _too_close(overlaps), info), tensors


def _layer_seed(seed: int, key: Projection) -> int:
    """A seed of its own for each projection, so that DARE's drops do not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key[0]}.{key[1]}".encode()).digest()[:7], "big")


def _too_close(overlaps: Mapping[tuple[str, str], float]) -> list[str]:
    sentences = [
        f"{one} and {two} overlap by {score:.2f} (above {WARN_ABOVE}): they change the same directions of the weights "
        "and will disturb each other; lower their weights, or keep one"
        for (one, two), score in overlaps.items()
        if score > WARN_ABOVE
    ]
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=4)
    return sentences


def _describe(sources: Sequence[Source], weights: Sequence[float], mode: str, options: Options) -> AdapterInfo:
    """Triggers, words and licenses of the parts, and the recipe: mode, settings, parts with weight and file hash."""
    infos = [source.info for source in sources if source.info is not None]

    def joined(field: str, glue: str) -> str:
        return glue.join(dict.fromkeys(value for info in infos if (value := getattr(info, field))))

    parts = [
        {"name": s.name, "weight": weight, "sha256": s.info.sha256 if s.info else "", "method": _method(s)}
        for s, weight in zip(sources, weights, strict=True)
    ]
    return AdapterInfo(
        components={},
        trigger=joined("trigger", ", "),
        class_word=joined("class_word", ", "),
        instance_prompt=joined("instance_prompt", " and "),
        prompts=list(dict.fromkeys(prompt for info in infos for prompt in info.prompts)),
        license=joined("license", " AND "),
        extra={"mix": {"mode": mode, **asdict(options), "parts": parts}},
    )


def _method(source: Source) -> str:
    return next((config.method for config in source.configs.values()), "plain LoRA")


def _card(info: AdapterInfo) -> str:
    recipe = info.extra["mix"]
    rows = [f"| {p['name']} | {p['weight']:g} | {p['method']} | `{p['sha256']}` |" for p in recipe["parts"]]
    return "\n".join([f"## Mixed by `{recipe['mode']}`", "", "| part | weight | method | SHA-256 |",
                      "| --- | --- | --- | --- |", *rows])  # fmt: skip
