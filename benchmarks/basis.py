"""Time to compute the frozen outer pairs of NoRA or to read them from the cache, and their error against the SVD.

    python benchmarks/basis.py [--rank 64] [--basis svd|awsvd] [--dtype float32] [--exact 8] [--repeats 5]

The weights are random, with decaying spectra, in the shapes of all attention projections of Stable Diffusion 1.5: 128
of the UNet and 48 of the text encoder. Printed are:

- *first*: seconds to hash the weights, compute all pairs and store them (in brackets: CPU time);
- *from the cache*: median seconds to hash the weights and read the pairs;
- *MB on disk*: size of the cache;
- *error*: ``||(W - B A) D|| / ||(W - W_r) D||`` over ``--exact`` projections, 1 at best. ``W_r D`` is the truncated SVD
  of ``W D`` by ``torch.linalg.svd``; ``D`` is diagonal and holds the activation strengths (1 for ``svd``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nora_diffusion import nora
from nora_diffusion.adapters.tuner.build import flat_weight
from nora_diffusion.pipelines.basis_cache import outer_pairs
from nora_diffusion.pipelines.components import targets

Layers = dict[str, nn.Module]


def components(dtype: torch.dtype) -> dict[str, Layers]:
    """The attention projections of both components. The rest of the models stays on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(cross_attention_dim=768),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }
    projections = {name: targets(module, nora(r=4)) for name, module in modules.items()}
    generator = torch.Generator().manual_seed(0)
    for layers in projections.values():
        for layer in layers.values():
            weight = decaying(*flat_weight(layer).shape, generator)
            layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return projections


def decaying(d_out: int, d_in: int, generator: torch.Generator) -> Tensor:
    """A random matrix whose ``i``-th singular value is about proportional to ``1 / sqrt(i)``."""
    k = min(d_out, d_in)
    scales = torch.arange(1, k + 1).rsqrt()
    left, right = torch.randn(d_out, k, generator=generator), torch.randn(k, d_in, generator=generator)
    return (left * scales) @ right / (d_out * d_in) ** 0.5


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call; they differ on a busy machine."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def error_ratio(layer: nn.Module, pair: tuple[Tensor, Tensor], strength: Tensor, rank: int) -> float:
    """Error of the pair ``(A, B)``, as a multiple of the smallest error of that rank."""
    weight = flat_weight(layer).float()
    best = torch.linalg.svdvals(weight * strength)[rank:].norm()
    return float(torch.linalg.matrix_norm((weight - pair[1].float() @ pair[0].float()) * strength) / best)


def main() -> None:
    """Print the times and the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--basis", choices=["svd", "awsvd"], default="awsvd")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--exact", type=int, default=8, help="projections to compare with torch.linalg.svd")
    parser.add_argument("--repeats", type=int, default=5, help="timed reads of the cache")
    args = parser.parse_args()
    config = nora(r=args.rank, basis=args.basis)
    projections = components(getattr(torch, args.dtype))
    strengths = {
        name: {path: torch.rand(flat_weight(layer).shape[1]) + 0.01 for path, layer in layers.items()}
        for name, layers in projections.items()
    }

    def compute() -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        return {name: outer_pairs(config, layers, strengths[name]) for name, layers in projections.items()}

    with tempfile.TemporaryDirectory() as folder:
        os.environ["NORA_CACHE"] = folder
        first = seconds(compute)
        reads = [seconds(compute) for _ in range(args.repeats)]
        cached = [statistics.median(times) for times in zip(*reads, strict=True)]
        size = sum(entry.stat().st_size for entry in os.scandir(folder))
        pairs = compute()
    flat = [(name, path) for name, layers in projections.items() for path in layers]
    chosen = flat[:: max(1, len(flat) // max(1, args.exact))][: args.exact]
    ratios = []
    for name, path in chosen:
        d = strengths[name][path].sqrt() if args.basis == "awsvd" else torch.ones(1)
        ratios.append(error_ratio(projections[name][path], pairs[name][path], d, args.rank))
    counts = " + ".join(str(len(layers)) for layers in projections.values())
    print(f"{counts} projections, rank {args.rank}, {args.basis}, {args.dtype}, {torch.get_num_threads()} threads")
    print(f"first {first[0]:.1f} s ({first[1]:.1f} s of CPU time)")
    print(f"from the cache {cached[0]:.2f} s ({cached[1]:.2f} s of CPU time), medians of {args.repeats}")
    print(f"{size / 1e6:.0f} MB on disk")
    if ratios:
        print(f"error against torch.linalg.svd: median {statistics.median(ratios):.5f}, worst {max(ratios):.5f}")


if __name__ == "__main__":
    main()
