"""Mixes several adapters into one: in a pipeline, or from files to a file without the base."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from ..adapters.axes import OutputRouter
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter, require_vacant
from ..formats.adapter_info import AdapterInfo
from ..formats.adapter_writing import write_adapter
from ..formats.keys import Projection, factors_by_projection
from ..formats.model_card import write_card
from ..generation.tags import check_range
from ..loaders import set_adapters
from ..loaders.inject import check_new_name
from ..loaders.load import insert
from ..loaders.locking import one_at_a_time
from ..loaders.tokens import tokens_of
from ..pipelines.base import base_id
from ..pipelines.components import components, refuse_merged, refuse_offloaded, refuse_serving
from ..versions import versions
from .angles import WARN_ABOVE, source_overlap
from .assembly import assemble, assemble_gated
from .modes import MODES, Mixed, Mode, Options
from .sources import Source, check_same_base, file_source, loaded_source

GATED = "gated"
"""The mode of a mix whose weights are gates."""


@dataclass
class MixReport:
    """A mix: its largest ``rank``, the number of ``layers``, and how exact it is.

    ``kept``: the share of ``||dW||_F^2`` in the mix, with the ``dW`` of the mode's formula over all projections.
    ``error``: ``||dW_mix - dW||_F / ||dW||_F``, 0 for the exact modes. ``overlaps``: the overlap of every pair of
    adapters; ``warnings``: a message for every high one. ``info``: the metadata of the mix.
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
    """Mix adapters of the pipeline, ours or plain LoRAs, into a new one: ``mix(pipe, {"dog": 0.8, ...})``.

    ``activate`` makes the mix the only active adapter, so that its sources do not count twice; they stay loaded.
    :func:`nora_diffusion.save_adapter` writes it to a file that names its sources. ``rank``, ``density`` and ``seed``
    are settings of some modes (see :class:`~nora_diffusion.composition.modes.Options`).

    Raises :class:`UserError` for an unknown mode or adapter, an adapter without a single ``dW`` (MoR, DoRA), and a name
    that is in use.
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
    adapted = dict.fromkeys(component for source in sources for component, _ in source.updates)
    check_new_name(pipe, modules, adapter_name, adapted)
    report, tensors = _combine(adapter_name, sources, list(weights.values()), mode, options)
    report.info.base = base_id(pipe)
    insert(pipe, modules, adapter_name, report.info, tensors, activate=False, weight=1.0)
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
    """Mix adapter files into ``output/nora_adapter.safetensors``, with a model card. Their base is not loaded.

    ``basis_dir``: the folder of their shared basis, if it is not beside them. Raises :class:`UserError` like
    :func:`mix`, and for adapters of different bases.
    """
    options = Options(rank, density, seed)
    sources = _with_unique_names([file_source(path, basis_dir) for path, _ in adapters])
    _check({source.name: weight for source, (_, weight) in zip(sources, adapters, strict=True)}, mode, options)
    check_same_base(sources)
    for source in sources:
        _refuse_tokens(source.info.path if source.info else source.name, source.info.tokens if source.info else {})
    folder = _new_folder(output)
    report, tensors = _combine(folder.name, sources, [weight for _, weight in adapters], mode, options)
    return _written(folder, sources, report, tensors)


def mix_gated(
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    router: OutputRouter,
    *,
    basis_dir: str | Path | None = None,
) -> MixReport:
    """Write adapter files as one mixture of frozen experts to ``output``, at equal shares of ``1/N``: gates to train.

    Raises :class:`UserError` as :func:`mix_files`.
    """
    sources = _with_unique_names([file_source(path, basis_dir) for path, _ in adapters])
    weights = [weight for _, weight in adapters]
    if len(sources) < 2:
        raise UserError("a gate chooses among several adapters: give at least two")
    for source, weight in zip(sources, weights, strict=True):
        check_range(weight, f"the mix for {source.name!r}")
        _refuse_tokens(source.name, source.info.tokens if source.info else {})
    check_same_base(sources)
    folder = _new_folder(output)
    overlaps = _overlaps(sources)
    configs, tensors = assemble_gated(sources, weights, router)
    info = _describe(sources, weights, GATED, router=router)
    info.components = {component: config.to_dict() for component, config in configs.items()}
    config = next(iter(configs.values()))
    rank, layers = config.num_experts * config.r, len(factors_by_projection(tensors))
    report = MixReport(folder.name, GATED, rank, layers, 1.0, 0.0, overlaps, [], info)
    return _written(folder, sources, report, tensors)


def _written(folder: Path, sources: Sequence[Source], report: MixReport, tensors: Any) -> MixReport:
    """Write the mix with the description of the base that its sources give."""
    infos = [source.info for source in sources if source.info is not None]
    info = report.info
    info.base, info.versions = infos[0].base, versions()
    for component in info.components:
        fingerprints = [parent.base_fingerprint.get(component, {}) for parent in reversed(infos)]
        info.base_fingerprint[component] = {path: value for own in fingerprints for path, value in own.items()}
    info.conv_shapes = {path: shape for parent in infos for path, shape in parent.conv_shapes.items()}
    if not all(config.stored_outer for config in info.configs.values()):
        info.shapes = {path: shape for parent in infos for path, shape in parent.shapes.items()}
    file = write_adapter(folder, tensors, info, new=True)
    report.info = inspect_adapter(file)
    write_card(folder, report.info, mix_card(info))
    return report


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Append a number to names that occur several times."""
    seen: Counter[str] = Counter()
    for source in sources:
        seen[source.name] += 1
        if seen[source.name] > 1:
            source.name = f"{source.name}-{seen[source.name]}"
    return sources


def _refuse_tokens(owner: str, tokens: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for an adapter with new tokens, which are embeddings and not a ``dW``."""
    if tokens:
        raise UserError(
            f"{owner} has new tokens ({', '.join(tokens)}), which cannot be mixed: activate it beside the others with "
            "set_adapters instead"
        )


def _new_folder(output: str | Path) -> Path:
    folder = Path(output).expanduser()
    if folder.suffix == ".safetensors" or folder.is_file():
        raise UserError(f"{output} is a file name: give a folder for the mix and its model card")
    require_vacant(folder)
    return folder


def _check(weights: Mapping[str, float], mode: str, options: Options) -> None:
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
    if not weights:
        raise UserError("there is nothing to mix: give at least one adapter with its weight")
    for name, weight in weights.items():
        check_range(weight, f"the mix for {name!r}")
    options.check()


def _combine(
    name: str, sources: Sequence[Source], weights: Sequence[float], mode: Mode, options: Options
) -> tuple[MixReport, Any]:
    overlaps = _overlaps(sources)
    mixed: dict[Projection, Mixed] = {}
    for key in dict.fromkeys(key for source in sources for key in source.updates):
        weighted = [(s.updates[key], w) for s, w in zip(sources, weights, strict=True) if key in s.updates]
        updates, layer_weights = [update for update, _ in weighted], [weight for _, weight in weighted]
        mixed[key] = MODES[mode](updates, layer_weights, replace(options, seed=_layer_seed(options.seed, key)))
    configs, tensors = assemble({key: m.update for key, m in mixed.items()}, sources)
    energy, lost = (sum(getattr(m, field) for m in mixed.values()) for field in ("energy", "lost"))
    share = lost / energy if energy else 0.0
    rank = max(
        tensor.shape[0]
        for factors in factors_by_projection(tensors).values()
        for name, tensor in factors.items()
        if name in ("A", "A_in", "R")
    )
    info = _describe(sources, weights, mode, **asdict(options))
    info.components = {component: config.to_dict() for component, config in configs.items()}
    messages = _overlap_warnings(overlaps)
    return MixReport(name, mode, rank, len(mixed), 1 - share, share**0.5, overlaps, messages, info), tensors


def _overlaps(sources: Sequence[Source]) -> dict[tuple[str, str], float]:
    """The overlap of each two sources, by their names."""
    return {(one.name, two.name): source_overlap(one, two).score for one, two in combinations(sources, 2)}


def _layer_seed(seed: int, key: Projection) -> int:
    """A seed for each projection, so that DARE's random drops do not depend on the other projections."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key[0]}.{key[1]}".encode()).digest()[:7], "big")


def _overlap_warnings(overlaps: Mapping[tuple[str, str], float]) -> list[str]:
    messages = [
        f"{one} and {two} overlap by {score:.2f} (above {WARN_ABOVE}): they change the same directions of the weights "
        "and will interfere; lower their weights, or use only one"
        for (one, two), score in overlaps.items()
        if score > WARN_ABOVE
    ]
    for message in messages:
        warnings.warn(message, stacklevel=4)
    return messages


def _describe(sources: Sequence[Source], weights: Sequence[float], mode: str, **settings: Any) -> AdapterInfo:
    """Metadata of a mix: triggers, class words and licenses of its sources, and the recipe in ``extra["mix"]``."""
    infos = [source.info for source in sources if source.info is not None]

    def joined(field: str, separator: str) -> str:
        return separator.join(dict.fromkeys(value for info in infos if (value := getattr(info, field))))

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
        extra={"mix": {"mode": mode, **settings, "parts": parts}},
    )


def _method(source: Source) -> str:
    return next((config.method for config in source.configs.values()), "plain LoRA")


def mix_card(info: AdapterInfo) -> str:
    """The adapters of a mix, as Markdown."""
    recipe = info.extra["mix"]
    rows = [f"| {p['name']} | {p['weight']:g} | {p['method']} | `{p['sha256']}` |" for p in recipe["parts"]]
    return "\n".join([f"## Mixed by `{recipe['mode']}`", "", "| adapter | weight | method | SHA-256 |",
                      "| --- | --- | --- | --- |", *rows])  # fmt: skip
