"""Import of a LoRA as a NoRA: its update is projected onto the frozen basis of each projection."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import AdapterConfig, nora
from ..adapters.deltas import functional
from ..adapters.deltas.chain import ChainDelta
from ..adapters.deltas.cores import DenseCore, InputCore, NestedCore
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter, require_vacant
from ..formats.foreign import bundled_tokens
from ..formats.foreign_updates import dense_updates, fitted_modules
from ..io.files import locked_folder
from ..io.tensor_file import TensorFile
from ..loaders import add_adapter, delete_adapter, save_adapter
from ..loaders.active import keeping_trained
from ..pipelines.components import canonical, components, nora_layers

NAME = "imported"
CORES = ("nested", "input", "dense")


@dataclass
class ImportReport:
    """The adapter file and its relative error ``||dW - dW'|| / ||dW||`` (Frobenius), overall and by projection.

    ``note``: what of the file is not in the adapter.
    """

    path: Path
    lost: float
    layers: dict[str, float] = field(default_factory=dict)
    note: str = ""


def import_lora(
    pipe: Any,
    src: str | Path,
    dst: str | Path,
    config: AdapterConfig | None = None,
    info: dict[str, Any] | None = None,
    seed: int = 0,
    basis_from: str | Path | None = None,
) -> ImportReport:
    """Project a LoRA (LoHa, LoKr) file onto a basis of the pipeline's weights and write it as an adapter to ``dst``.

    With the thin QR factors ``B_out = Q_b R_b`` and ``A_out^T = Q_a R_a``, every update within the basis is
    ``Q_b N Q_a^T``, and the one nearest to ``dW`` in the Frobenius norm has ``N = Q_b^T dW Q_a``. For a nested core,
    ``N`` is truncated to its ``r'`` largest singular triplets ``U S V^T``. By Eckart-Young this is the optimum of rank
    ``r'`` over the whole basis, because the part of ``dW`` outside the basis is orthogonal to it. Then
    ``B_in = R_b^-1 U sqrt(S)``, ``A_in = sqrt(S) V^T R_a^-T``, divided by the scale. A dense core is
    ``R_b^-1 N R_a^-T``. An input core restricts the input side only: ``N = dW Q_a``, ``B = U sqrt(S)``.

    ``config``: a preset with a frozen basis (default ``nora()``); its targets are replaced by the file's. ``info``:
    metadata of the adapter (``trigger`` ...). ``seed``: of a random basis, and recorded in the file. ``basis_from``: an
    adapter whose basis is copied, as by :func:`add_adapter`. The pipeline is left unchanged. Raises :class:`UserError`
    if the file is not a LoRA or was made for another base, the config has no frozen basis, or ``dst`` holds an adapter.
    """
    require_vacant(Path(dst).expanduser())
    config = nora() if config is None else copy.copy(config)
    if config.core not in CORES or not config.frozen_outer or config.blocks > 1 or config.magnitude:
        raise UserError(
            f"method {config.method!r} has no frozen basis to project onto: import as nora, nora_input or lora_xs"
        )
    if not 0 <= seed < 2**64:
        raise UserError("the seed must be 0 to 2^64 - 1: choose another")
    foreign = inspect_adapter(src)
    if foreign.is_ours or foreign.kind == "textual inversion":
        raise UserError(f"{foreign.path} is not a LoRA of another tool: there is nothing to import")
    modules = components(pipe)
    with ExitStack() as stack:
        reader = stack.enter_context(TensorFile(Path(foreign.path)))
        embeddings = ", ".join(bundled_tokens(reader))
        for module in modules.values():
            stack.enter_context(keeping_trained(module))
        adapted = {(component, canonical(path)) for component, path in fitted_modules(modules, reader)}
        names = [name for name in modules if any(name == component for component, _ in adapted)]
        # One list of paths for all components: a projection that is not in the file gets a zero update.
        config.target_modules = sorted({path for _, path in adapted})
        config.dropout = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # bases are drawn on the CPU
            add_adapter(pipe, config, NAME, names, basis_from=basis_from)
        try:
            lost, errors, norms = {}, [], []
            layers = {name: nora_layers(modules[name], NAME) for name in names}
            for component, path, dense in dense_updates(modules, reader):
                delta = cast(ChainDelta, layers[component][canonical(path)].delta(NAME))
                error = _set_core(delta, dense, config.scale_for(path))
                norm = float(dense.norm())
                errors.append(error)
                norms.append(norm)
                lost[f"{component}.{canonical(path)}"] = error / norm if norm else 0.0
            metadata = {"trigger": foreign.trigger, "seed": seed, "extra": {"imported_from": foreign.sha256}} | (
                info or {}
            )
            folder = Path(dst).expanduser()
            with locked_folder(folder):
                require_vacant(folder)  # another process may have written there meanwhile
                file = save_adapter(pipe, folder, NAME, info=metadata)
        finally:
            delete_adapter(pipe, NAME)
    total = float(torch.tensor(norms).norm())
    share = float(torch.tensor(errors).norm()) / total if total else 0.0
    note = f"the embeddings of {embeddings} are not imported: load the file itself for them" if embeddings else ""
    return ImportReport(file, share, lost, note)


def _set_core(delta: ChainDelta, dense: Tensor, scale: float) -> float:
    """Set the core of one delta; return ``||dW - dW'||`` in the precision in which it is stored."""
    core = delta.core
    assert isinstance(core, NestedCore | InputCore | DenseCore)
    down, up = (factor.detach().double().to(dense.device) for factor in delta.outer)
    rank = None if isinstance(core, DenseCore) else delta.full_rank
    lower, upper = project(dense / scale, down, None if isinstance(core, InputCore) else up, rank)
    if isinstance(core, DenseCore):
        core.R.data.copy_(upper @ lower)
    else:
        core.A_in.data.copy_(lower)
        (delta.get_parameter("B") if isinstance(core, InputCore) else core.B_in).data.copy_(upper)
    below, above = (functional.collapse([f.detach().to(dense) for f in half]) for half in delta.halves(None))
    return float((dense - scale * above @ below).norm())


def project(dense: Tensor, down: Tensor, up: Tensor | None, rank: int | None) -> tuple[Tensor, Tensor]:
    """The core pair ``(A_in, B_in)`` for which ``B_out B_in A_in A_out`` is nearest to ``dW`` in the Frobenius norm.

    Shapes: ``dW [d_out, d_in]``, ``A_out [r, d_in]``, ``B_out [d_out, r]``; ``rank=None`` keeps all ``r``. Without
    ``B_out`` the pair is ``(A_in, B)`` for ``B A_in A_out``. Directions in which the basis is numerically zero are
    ignored (pseudo-inverse).
    """
    q_a, r_a = torch.linalg.qr(down.T)
    inside, inverse_a = dense @ q_a, torch.linalg.pinv(r_a)
    q_b, r_b = (None, None) if up is None else torch.linalg.qr(up)
    u, s, vt = torch.linalg.svd(inside if q_b is None else q_b.T @ inside, full_matrices=False)
    root = s[:rank].sqrt()
    upper = u[:, :rank] * root
    return (root[:, None] * vt[:rank]) @ inverse_a.T, upper if r_b is None else torch.linalg.pinv(r_b) @ upper
