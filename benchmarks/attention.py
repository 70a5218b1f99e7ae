"""Time of one self-attention layer with an adapter, against the layer without one.

    python benchmarks/attention.py [--tokens 1024] [--width 640] [--rank 64] [--inner_rank 8] [--rounds 30]
                                   [--device cpu]

One line per variant: the base layer; NoRA and MoR in tuner layers ("layers") and with the attention processor that
fuses q, k and v ("processor"); the exported LoRA in PEFT's layers. The columns are the median time of a call and its
ratio to the base. Every round times all variants in turn, so that the ratios stay fair on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from nora_diffusion.adapters import AdapterConfig, mor, nora
from nora_diffusion.adapters.config import Start
from nora_diffusion.attention import AdapterAttnProcessor

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapted(attention: nn.Module, config: AdapterConfig) -> nn.Module:
    """A copy with an adapter of that config. Its factors are random, which does not change the speed."""
    model = copy.deepcopy(attention)
    config.start = Start()
    inject_adapter_in_model(config, model, "one")
    return model.eval().requires_grad_(False)


def variants(width: int, r: int, inner_r: int) -> dict[str, nn.Module]:
    """The attention layers to compare, by name."""
    base = (
        Attention(query_dim=width, heads=8, dim_head=width // 8, residual_connection=True).eval().requires_grad_(False)
    )
    nested = nora(r=r, inner_r=inner_r, basis="orthogonal", target_modules=TARGETS)
    models: dict[str, nn.Module] = {"base": base, "NoRA, layers": adapted(base, nested)}
    models["NoRA, processor"] = copy.deepcopy(models["NoRA, layers"])
    exported = copy.deepcopy(base)
    inject_adapter_in_model(LoraConfig(r=inner_r, target_modules=TARGETS), exported, "one")
    models["exported LoRA"] = exported.eval().requires_grad_(False)
    models["MoR, layers"] = adapted(base, mor(r=8, num_experts=4, target_modules=TARGETS))
    models["MoR, processor"] = copy.deepcopy(models["MoR, layers"])
    for name, model in models.items():
        if name.endswith("processor"):
            attention: Any = model
            attention.set_processor(AdapterAttnProcessor())
    return models


def timed(model: nn.Module, x: torch.Tensor) -> float:
    """Milliseconds of one call: wall-clock time on a GPU, CPU time on a CPU (other programs do not affect it)."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    start = clock()
    with torch.no_grad():
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in {"tokens": 1024, "width": 640, "rank": 64, "inner_rank": 8, "rounds": 30}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    models = {n: m.to(args.device) for n, m in variants(args.width, args.rank, args.inner_rank).items()}
    x = torch.randn(2, args.tokens, args.width, device=args.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(args.rounds + 2):
        for name, model in models.items():
            elapsed = timed(model, x)
            if round_number >= 2:
                times[name].append(elapsed)
    base = statistics.median(times["base"])
    print(
        f"x [2, {args.tokens}, {args.width}] on {args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:18} {median:8.2f} ms  {median / base:6.3f} x base")


if __name__ == "__main__":
    main()
