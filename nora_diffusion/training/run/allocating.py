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

    The batches depend on the run's seed, but they are not those of its steps. As in these, each process takes its rows.
    """
    plan, pipe = data.plan, data.plan.pipe
    together = plan.processes > 1
    if together:
        broadcast_factors(pipe, parameters)
    for module in plan.components.values():
        module.train()  # as in the steps: gradient checkpointing of text encoders asks for it
    process = torch.distributed.get_rank() if together else 0
    batches = Batches(data, embeddings, process, derive(plan.config.seed, "rank allocation"))
    losses = (batches.loss(number) for number in range(BATCHES))
    modules = components(pipe)
    gradients = core_gradients(modules, name, losses, FP16_SCALE if plan.dtype == torch.float16 else 1.0)
    for gradient in gradients.values() if together else ():
        torch.distributed.all_reduce(gradient)
    ranks = inner_ranks(modules, name, plan.adapter, gradients)
    if together:
        ranks = _of_first_process(ranks)
    log.info("inner ranks by layer: %d to %d", min(ranks.values()), max(ranks.values()))
    return replace_adapter(plan.config, pipe, plan.components, name, ranks, plan.subject.new_tokens)


def _of_first_process(ranks: dict[str, int]) -> dict[str, int]:
    """The ranks of the first process: singular values of another device may round to others."""
    from accelerate.utils import broadcast_object_list

    found: dict[str, int] = broadcast_object_list([ranks])[0]
    return found
