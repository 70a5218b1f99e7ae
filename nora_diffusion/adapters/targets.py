"""Which modules an adapter targets: groups of names, and blocks of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attn": (
        "to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj",
        "SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o",
    ),
    "context": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "ff": (
        "ff.net.0.proj", "ff.net.2", "fc1", "fc2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
        "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo",
    ),
    "proj": ("proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "conv_shortcut"),
}  # fmt: skip
"""Module groups that ``target_modules`` accepts beside suffixes and regular expressions.

UNets, DiTs, CLIP and T5 name the same layers differently; ``context`` is the text stream of the joint attention in SD3
and Flux.
"""

Targets = str | Sequence[str] | None
_BLOCK = re.compile(r"(?:.*\.)?\w*(?:blocks|layers|attentions|resnets|samplers)\.\d+(?=\.)")


def block_of(path: str) -> str:
    """The innermost block that holds the module at ``path``: a transformer block, a resnet; empty outside of all."""
    found = _BLOCK.match(path)
    return found[0] if found else ""


def expand_targets(targets: Targets) -> str | list[str]:
    """Replace group names with their suffixes; a single string that is not a group is a regular expression."""
    if targets is None:
        return list(TARGET_GROUPS["attn"])
    if isinstance(targets, str):
        if targets not in TARGET_GROUPS:
            return targets
        targets = [targets]
    suffixes = [suffix for target in targets for suffix in TARGET_GROUPS.get(target, (target,))]
    return list(dict.fromkeys(suffixes))


def in_blocks(blocks: Sequence[str], targets: Targets = None) -> str:
    """``target_modules`` for some blocks only: ``in_blocks(["down_blocks.1", "mid_block"], ["attn", "ff"])``.

    ``blocks`` are paths from the top of the component: ``up_blocks.1.attentions.0``, ``transformer_blocks.3``,
    ``encoder.layers.0``. ``targets`` are groups or suffixes, attention by default. Returns a regular expression.
    """
    expanded = expand_targets(targets)
    suffixes = [expanded] if isinstance(expanded, str) else expanded
    block, suffix = ("|".join(re.escape(name) for name in names) for names in (blocks, suffixes))
    # The lookahead keeps down_blocks.1 from matching down_blocks.10.
    return rf"(?:text_model\.)?(?:{block})(?=\.).*\.(?:{suffix})"
