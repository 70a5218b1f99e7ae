"""The layers of SD3's and Flux's transformers in their original code, where q, k and v are one layer.

In an adaptive normalization before the output, shift comes before scale there, and after it in diffusers.
"""

from __future__ import annotations

from torch import nn

from ..pipelines.components import projections

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Blocks = dict[str, dict[str, tuple[str, ...]]]
"""By list of blocks: the layers of a block in the original code, with the projections that make up each.

Under ``""``: the layers outside the blocks.
"""

FLUX: Blocks = {
    "transformer_blocks": {
        "double_blocks.{}.img_attn.qkv": QKV,
        "double_blocks.{}.img_attn.proj": ("attn.to_out.0",),
        "double_blocks.{}.img_mlp.0": ("ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("ff.net.2",),
        "double_blocks.{}.img_mod.lin": ("norm1.linear",),
        "double_blocks.{}.txt_attn.qkv": ADDED_QKV,
        "double_blocks.{}.txt_attn.proj": ("attn.to_add_out",),
        "double_blocks.{}.txt_mlp.0": ("ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("ff_context.net.2",),
        "double_blocks.{}.txt_mod.lin": ("norm1_context.linear",),
        "double_blocks.{}.qkv1": QKV,  # XLabs'
        "double_blocks.{}.proj1": ("attn.to_out.0",),
        "double_blocks.{}.qkv2": ADDED_QKV,
        "double_blocks.{}.proj2": ("attn.to_add_out",),
    },
    "single_transformer_blocks": {
        "single_blocks.{}.linear1": (*QKV, "proj_mlp"),
        "single_blocks.{}.linear2": ("proj_out",),
        "single_blocks.{}.modulation.lin": ("norm.linear",),
        "single_blocks.{}.qkv": QKV,  # XLabs'
        "single_blocks.{}.proj": ("proj_out",),
    },
    "": {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
}
SD3: Blocks = {
    "transformer_blocks": {
        "joint_blocks.{}.x_block.attn.qkv": QKV,
        "joint_blocks.{}.x_block.attn.proj": ("attn.to_out.0",),
        "joint_blocks.{}.x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{}.x_block.attn2.proj": ("attn2.to_out.0",),
        "joint_blocks.{}.x_block.mlp.fc1": ("ff.net.0.proj",),
        "joint_blocks.{}.x_block.mlp.fc2": ("ff.net.2",),
        "joint_blocks.{}.x_block.adaLN_modulation.1": ("norm1.linear",),
        "joint_blocks.{}.context_block.attn.qkv": ADDED_QKV,
        "joint_blocks.{}.context_block.attn.proj": ("attn.to_add_out",),
        "joint_blocks.{}.context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "joint_blocks.{}.context_block.mlp.fc2": ("ff_context.net.2",),
        "joint_blocks.{}.context_block.adaLN_modulation.1": ("norm1_context.linear",),
    },
    "": {
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
}
MODELS = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}
LAST_CONTEXT = "joint_blocks.{}.context_block.adaLN_modulation.1"


def original_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The paths of the projections in each layer of the original code, in the order of its output rows, by its name."""
    known, found = projections(model), {}
    for blocks, layers in MODELS.get(type(model).__name__, {}).items():
        for number in range(len(getattr(model, blocks)) if blocks else 1):
            for name, parts in layers.items():
                paths = tuple(f"{blocks}.{number}.{part}" if blocks else part for part in parts)
                if all(path in known for path in paths):
                    found[name.format(number)] = paths
    return found


def swapped_layers(model: nn.Module) -> set[str]:
    """The names of layers of the original code whose two halves are in the other order in diffusers."""
    if type(model).__name__ not in MODELS:
        return set()
    last = len(model.transformer_blocks) - 1  # type: ignore[arg-type]
    return {"final_layer.adaLN_modulation.1", LAST_CONTEXT.format(last)}
