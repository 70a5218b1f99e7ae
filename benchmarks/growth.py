"""How costs grow: time against adapters, subjects, batch, tokens, rank and experts, with fitted exponents and plots.

    python benchmarks/growth.py [--rounds 5] [--largest_pack 1000] [--out outputs/growth.html]

Each row varies one size and keeps the others. The exponent ``e`` is the slope of a line through ``(log size, log
seconds)`` over the upper half of the sizes: 0 is a constant cost, 1 a proportional one. Every round runs all sizes in
turn; times are CPU times of one thread, medians over the rounds. All of them are for a UNet of SD 1.5's layout at a
sixteenth of its width, except *subjects in a pack*, which is the time to load one subject of a pack of that many.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import inject_adapter_in_model
from torch import nn

from nora_diffusion import add_adapter, delete_adapter, load_adapter, load_base, nora, save_adapter
from nora_diffusion.adapters import AdapterConfig, NoraLayer, mor
from nora_diffusion.adapters.config import Start
from nora_diffusion.formats.pack_writing import create_pack
from nora_diffusion.reports.plots import line_chart
from nora_diffusion.reports.webpage import page

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Points = list[tuple[float, float]]


def unet(config: AdapterConfig, count: int = 1, live: int | None = None) -> nn.Module:
    """A small UNet with ``count`` adapters in one basis, ``live`` of them active."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64, 64), cross_attention_dim=64, attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)  # fmt: skip
    for i in range(count):
        one = copy.deepcopy(config)
        one.start = Start()
        inject_adapter_in_model(one, model, f"a{i}")
    for layer in (module for module in model.modules() if isinstance(module, NoraLayer)):
        first: Any = layer.delta("a0")
        for i in range(1, count):
            delta: Any = layer.delta(f"a{i}")
            delta.A_out, delta.B_out = first.A_out, first.B_out
        layer.activate([f"a{i}" for i in range(count if live is None else live)])
    return model


def run(model: Any, *, train: bool, batch: int = 1, side: int = 16) -> Callable[[], None]:
    """A call that takes a training step (forward and backward), or a pass without gradients."""
    sample, states = torch.randn(batch, 4, side, side), torch.randn(batch, 16, 64)

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = model(sample, 1, states).sample
        if train:
            out.square().mean().backward()

    return step


def timed(calls: Mapping[int, Callable[[], Any]], rounds: int) -> Points:
    """Median CPU seconds of each call by its size; all calls run in turn, once to warm up."""
    times: dict[int, list[float]] = {size: [] for size in calls}
    for number in range(rounds + 1):
        for size, call in calls.items():
            start = time.process_time()
            call()
            if number:
                times[size].append(time.process_time() - start)
    return [(size, statistics.median(values)) for size, values in times.items()]


def exponent(points: Points) -> float:
    """The slope of ``log y`` against ``log x`` by least squares, over the upper half of the points."""
    logs = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2 - 1 :]]
    x_mean, y_mean = (statistics.fmean(column) for column in zip(*logs, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


def pack_points(sizes: Sequence[int], rounds: int) -> Points:
    """Seconds to load one subject of a pack, by the number of subjects in it."""
    pipe = load_base()
    add_adapter(pipe, nora(r=8, inner_r=2, basis="svd"), "subject")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = save_adapter(pipe, folder / "subject", "subject", basis="shared")
        delete_adapter(pipe, "subject")

        def loading(size: int) -> Callable[[], None]:
            names = {f"s{i}": first for i in range(size)}
            pack = create_pack(folder / f"{size}.nora_pack.safetensors", names, folder / "bases")

            def load() -> None:
                load_adapter(pipe, f"{pack}#s{size // 2}", "one")
                delete_adapter(pipe, "one")

            return load

        return timed({size: loading(size) for size in sizes}, rounds)


def curves(rounds: int, largest_pack: int) -> dict[str, Points]:
    """All curves, by name."""
    nested = nora(r=16, inner_r=4, basis="svd", target_modules=TARGETS)

    def curve(sizes: Sequence[int], make: Callable[[int], Callable[[], Any]]) -> Points:
        return timed({size: make(size) for size in sizes}, rounds)

    counts = [1, 2, 4, 8, 16, 32, 64]
    one = unet(nested)

    def of_rank(rank: int) -> nn.Module:
        return unet(nora(r=rank, inner_r=4, basis="svd", target_modules=TARGETS))

    def of_experts(number: int) -> nn.Module:
        return unet(mor(r=8, num_experts=number, target_modules=TARGETS))

    return {
        "adapters live (inference)": curve(counts, lambda n: run(unet(nested, n), train=False)),
        "adapters loaded, one live (inference)": curve(counts, lambda n: run(unet(nested, n, live=1), train=False)),
        "batch (training step)": curve([1, 2, 4, 8, 16], lambda n: run(one, train=True, batch=n)),
        "tokens (training step)": curve([64, 256, 1024, 4096], lambda n: run(one, train=True, side=math.isqrt(n))),
        "outer rank (training step)": curve([4, 8, 16, 32], lambda r: run(of_rank(r), train=True)),
        "experts of MoR (training step)": curve([2, 4, 8, 16], lambda n: run(of_experts(n), train=True)),
        "subjects in a pack (loading one)": pack_points(
            [size for size in (1, 10, 100, 1000, 10_000) if size <= largest_pack], rounds
        ),
    }


def main() -> None:
    """Print the table and write the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest_pack", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("outputs/growth.html"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = curves(args.rounds, args.largest_pack)
    print("| size | seconds, from the smallest to the largest | exponent |\n| --- | --- | --- |")
    charts = []
    for name, points in found.items():
        row = ", ".join(f"{x:g}: {y:.3g}" for x, y in points)
        print(f"| {name} | {row} | {exponent(points):.2f} |")
        title, milliseconds = f"{name}: e = {exponent(points):.2f}", [(x, 1000 * y) for x, y in points]
        axis = name.partition(" (")[0].partition(",")[0]
        charts.append(line_chart(title, {name: milliseconds}, axis, "ms", log_x=True, log_y=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page("How costs grow", ['<div class="plots">', *charts, "</div>"]), encoding="utf-8")
    print(f"plots: {args.out}")


if __name__ == "__main__":
    main()
