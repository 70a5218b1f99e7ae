"""Rivals that are not ours: full fine-tuning, and LoKr and OFT of PEFT. The trainer's own steps train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import UserError
from ...pipelines.components import denoiser, targets
from ...training.planning.plan import Plan, plan_run
from ...training.planning.rundir import RunFolder
from ...training.run.encoding import encode
from ...training.run.launch import build_accelerator
from ...training.run.run import ADAPTER, Run, prepare_base, run_of
from ...training.run.steps import Stepper
from ...training.run.train import prepared, run_folder
from ...training.settings.config import TrainConfig
from ...training.signals import StopRequests
from ...training.step.randomness import forked
from ...training.step.seeds import derive
from .methods import peers_own

Parameters = dict[str, nn.Parameter]
Layers = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Peer:
    """A trained rival: its pipeline and trained parameters, or why its training failed, such as divergence."""

    pipe: Any
    parameters: Parameters
    error: str = ""

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def bytes(self) -> int:
        """The size of a file with the trained parameters."""
        return len(save({name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}))


def train_peer(config: TrainConfig, method: str) -> Peer:
    """Train a peer (:data:`.methods.PEERS`) on a base of its own, with all that a run of ``config`` would have.

    Layers, images, captions, noise, optimizer, schedule and clipping are those of the run; only its adapter is
    replaced. No file of it is written. Raises :class:`UserError` if it cannot start, and
    :class:`~nora_diffusion.training.signals.Interrupted` after SIGINT or SIGTERM.
    """
    subject, config = prepared(config)
    accelerator = build_accelerator(config)
    with run_folder(config, accelerator) as folder, StopRequests() as stop, forked(accelerator.device):
        plan = plan_run(config, subject, accelerator, folder, stop)
        run = _peer_run(plan, method, accelerator, folder, stop)
        stepper = Stepper(run, accelerator, folder, stop, progress=False)
        error = ""
        try:
            for step in range(run.last_step):
                stop.check(step)
                stepper.step(step)
        except UserError as failure:
            error = str(failure)
    return Peer(plan.pipe.to("cpu"), run.parameters, error)


def _peer_run(plan: Plan, method: str, accelerator: Accelerator, folder: RunFolder, stop: StopRequests) -> Run:
    data = encode(plan, accelerator, folder, stop)
    embeddings = data.embeddings()
    prepare_base(plan)
    return run_of(data, embeddings, add_peer(plan, method), ADAPTER)


def add_peer(plan: Plan, method: str) -> Parameters:
    """Add a peer to the layers that the plan's adapter would have; return its trained parameters, in fp32."""
    model = denoiser(plan.pipe)
    torch.manual_seed(derive(plan.config.seed, "init"))
    return BUILDERS[method.partition(":")[0]](model, targets(model, plan.adapter), **peers_own(method))


def full(model: nn.Module, layers: Layers) -> Parameters:
    """Full fine-tuning: the weights of the layers, without their biases.

    They are fp32 also where the base is bf16, in which most of AdamW's updates would be rounded away. Autocast lowers
    them in each pass, as it does the factors of an adapter. So weight decay pulls them to zero and not to the base, as
    usual.
    """
    for layer in layers.values():
        layer.weight = nn.Parameter(_weight(layer).detach().float())
    return {f"{path}.weight": layer.weight for path, layer in layers.items() if isinstance(layer.weight, nn.Parameter)}


def lokr(model: nn.Module, layers: Layers, rank: int) -> Parameters:
    """PEFT's LoKr (arXiv 2309.14859): ``W + kron(w1, w2)``, where a larger ``w2`` is a product of this rank."""
    from peft import LoKrConfig, inject_adapter_in_model

    inject_adapter_in_model(LoKrConfig(r=rank, alpha=rank, target_modules=[*layers]), model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # PEFT's `autocast_adapter_dtype`
    return parameters


def oft(model: nn.Module, layers: Layers, block_size: int) -> Parameters:
    """OFT (arXiv 2306.07280) with PEFT's rotations: ``W R`` for blocks of ``block_size`` inputs of each layer."""
    found = {}
    for path, layer in layers.items():
        rotated = Rotated(path, _weight(layer)[0].numel(), block_size).to(_weight(layer).device)
        parametrize.register_parametrization(layer, "weight", rotated)
        found[f"{path}.oft_R"] = rotated.rotation.weight
    return found


BUILDERS: dict[str, Callable[..., Parameters]] = {"full": full, "lokr": lokr, "oft": oft}


class Rotated(nn.Module):
    """``W R``, with PEFT's ``R`` of rotated blocks; a convolution's inputs are those of its flattened kernel.

    Equal to PEFT's merged layer up to the sign of the parameters, since that is ``W R^T`` and ``R(q)^T = R(-q)``. An
    unmerged layer of PEFT rotates its inputs, and for kernels of 3 x 3 adds up overlapping patches (PEFT 0.21): it
    differs from the base at the start, and from itself merged.
    """

    def __init__(self, path: str, width: int, block_size: int) -> None:
        from peft.tuners.oft.layer import OFTRotationModule

        super().__init__()
        if block_size < 2 or width % block_size:
            raise UserError(
                f"block_size={block_size} is not possible: choose a divisor, from 2 on, of the {width} inputs of {path}"
            )
        count = block_size * (block_size - 1) // 2
        self.rotation = OFTRotationModule(width // block_size, count, block_size, width)
        nn.init.zeros_(self.rotation.weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The rotated weight."""
        rotated: Tensor = self.rotation(weight.flatten(1))
        return rotated.view_as(weight)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
