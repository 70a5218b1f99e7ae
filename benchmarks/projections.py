"""What a training step of one adapted projection adds to the frozen one, with cold caches.

    python benchmarks/projections.py [--channels 128,256,512,512] [--side 32] [--batch 2] [--rounds 12] [--only "r 32"]

The projections and inputs of ``steps.py``, one at a time: all variants of a projection run in turn before the next
projection, each after a pass over an array that displaces the caches, as the rest of a UNet does. A machine that slows
down for a while slows all variants, so this is steadier than the ratios of whole steps. CPU time of one thread; the sum
over the projections of the median over the rounds, divided by their number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from steps import Bench, training_variants
from torch import Tensor, nn


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The projections of attention by name."""
    return {
        n: m
        for n, m in model.named_modules()
        if n.rpartition(".")[2] in ("to_q", "to_k", "to_v") or "to_out.0" in n[-8:]
    }


def inputs(bench: Bench, model: nn.Module) -> dict[str, Tensor]:
    """A random input for each projection, of the shape and dtype that it gets in a pass."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: torch.randn_like(args[0])}))
        for name, layer in projections(model).items()
    ]
    with torch.no_grad():
        bench.forward(model, bench.sample)
    for handle in handles:
        handle.remove()
    return {name: x.requires_grad_() for name, x in found.items()}


def step_seconds(layer: nn.Module, x: Tensor, displaced: Tensor) -> tuple[float, float]:
    """The CPU time of a forward and of a backward pass."""
    displaced.add_(0)
    with torch.autocast("cpu", torch.bfloat16):
        start = time.thread_time()
        y: Tensor = layer(x)
        forward = time.thread_time() - start
    dy = torch.ones_like(y)
    displaced.add_(0)
    start = time.thread_time()
    y.backward(dy)
    backward = time.thread_time() - start
    x.grad = None
    layer.zero_grad()
    return forward, backward


def summary(times: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Microseconds of a forward and a backward pass of the mean projection."""
    return [statistics.mean(statistics.median(t[i] for t in rounds) for rounds in times) * 1e6 for i in (0, 1)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", default="128,256,512,512")
    for flag, value in {"side": 32, "batch": 2, "rounds": 12}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--only", default="", help="parts of the names of rows, by comma")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench([int(n) for n in args.channels.split(",")], args.side, args.batch, "cpu")
    makers = training_variants(bench)
    floor = next(iter(makers))
    # Routers on prompt or timestep work in a whole pass only.
    chosen = [
        n for n in makers if "prompt" not in n and "timestep" not in n and any(o in n for o in args.only.split(","))
    ]
    models = {name: makers[name]().train() for name in [floor, *(n for n in chosen if n != floor)]}
    xs, displaced = inputs(bench, models[floor]), torch.zeros(1_500_000)
    layers = {name: projections(model) for name, model in models.items()}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {path: [] for path in xs} for name in models}
    for number in range(args.rounds + 1):
        for path, x in xs.items():
            for name in models:
                seconds = step_seconds(layers[name][path], x, displaced)
                if number:
                    times[name][path].append(seconds)
    found = {name: summary(list(by_path.values())) for name, by_path in times.items()}
    print("| a projection, µs | forward | backward |\n| --- | --- | --- |")
    for name, (forward, backward) in found.items():
        base = (0.0, 0.0) if name == floor else found[floor]
        sign = "" if name == floor else "+"
        print(f"| {name} | {sign}{forward - base[0]:.0f} | {sign}{backward - base[1]:.0f} |")


if __name__ == "__main__":
    main()
