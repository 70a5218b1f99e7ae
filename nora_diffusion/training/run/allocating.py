"""Inner ranks by layer, measured before the first step (``--rank_allocation gradient``)."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ...pipelines.components import components
from ..allocation.gradients import core_gradients
from ..allocation.inner_ranks import inner_ranks
from ..data.prompts import PromptEmbeddings
from ..planning.adapter import broadcast_factors, replace_adapter
from ..step.seeds import derive
from .batches import Batches
from .encoding import RunData

log = logging.getLogger(__name__)

BATCHES = 8
"""Batches whose gradient is measured: forward and backward passes beside those of the steps."""
FP16_SCALE = 1024.0


def with_measured_ranks(
    data: RunData, embeddings: PromptEmbeddings, name: str, parameters: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Replace the new adapter ``name`` by one with the same outer pairs and measured ranks; return its parameters.

    The batches depend on the run's seed, but they are not those of its steps. All processes measure those of rank 0.
    """
    plan, pipe = data.plan, data.plan.pipe
    if plan.processes > 1:
        broadcast_factors(pipe, parameters)
    for module in plan.components.values():
        module.train()  # as in the steps: gradient checkpointing of text encoders asks for it
    batches = Batches(data, embeddings, seed=derive(plan.config.seed, "rank allocation"))
    losses = (batches.loss(number) for number in range(BATCHES))
    modules = components(pipe)
    gradients = core_gradients(modules, name, losses, FP16_SCALE if plan.dtype == torch.float16 else 1.0)
    ranks = _of_first_process(inner_ranks(modules, name, plan.adapter, gradients), plan.processes)
    log.info("inner ranks by layer: %d to %d", min(ranks.values()), max(ranks.values()))
    return replace_adapter(plan.config, pipe, plan.components, name, ranks, plan.subject.new_tokens)


def _of_first_process(ranks: dict[str, int], processes: int) -> dict[str, int]:
    """The ranks of the first process: a sum in another order may round to others."""
    if processes == 1:
        return ranks
    from accelerate.utils import broadcast_object_list

    found: dict[str, int] = broadcast_object_list([ranks])[0]
    return found
