"""Step time of LoRA-Pro and LoRA-RITE beside AdamW on the embedded base.

    python benchmarks/optimizers.py [--methods lora,nora] [--rounds 15] [--batch 4]

A round has a training step by every optimizer in turn: forward pass, backward pass, clipping, ``optimizer.step()``. All
start from the same adapter, with the trainer's targets and rank, on the same random latents. The times are CPU times of
one thread. The ratios are medians over the rounds of the times divided by AdamW's in the same round: of the whole step,
and of ``optimizer.step()`` alone (torch's AdamW with ``foreach``, its fastest on a CPU without fusion).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from nora_diffusion import add_adapter, load_base
from nora_diffusion.adapters.presets import PRESETS
from nora_diffusion.loaders import delete_adapter, trainable_parameters
from nora_diffusion.optimizers import LoRAPro, LoRARite, pairs_of
from nora_diffusion.training.settings.defaults import embedded_defaults
from nora_diffusion.training.settings.methods import method_defaults

Parameters = dict[str, nn.Parameter]
Build = Callable[[Parameters], torch.optim.Optimizer]
ADAPTER = "bench"


def paired(kind: Callable[..., torch.optim.Optimizer], parameters: Parameters) -> torch.optim.Optimizer:
    """An optimizer of the pairs, and of all other parameters."""
    pairs, others = pairs_of(parameters.items())
    return kind([*pairs, *others], lr=1e-3)


OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters.values(), lr=1e-3, foreach=True),
    "LoRA-Pro": partial(paired, LoRAPro),
    "LoRA-RITE": partial(paired, LoRARite),
    "LoRA-Pro, moments of the factors": partial(paired, partial(LoRAPro, moments="factors")),
}


def measure(pipe: Any, method: str, batch: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the whole step and of ``optimizer.step()``, by optimizer and round."""
    unet, parameters = pipe.unet, trainable_parameters(pipe, ADAPTER)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    latents = torch.randn(batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    states = torch.randn(batch, 16, unet.config.cross_attention_dim)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
    optimizers = {name: build(parameters) for name, build in OPTIMIZERS.items()}
    values = {name: {key: value.clone() for key, value in start.items()} for name in OPTIMIZERS}
    for _ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(values[name][key])
            began = time.process_time()
            optimizer.zero_grad()
            prediction = unet(latents, torch.arange(batch), states).sample
            (prediction - latents).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            stepped = time.process_time()
            optimizer.step()
            done = time.process_time()
            times[name].append((done - began, done - stepped))
            values[name] = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    return {name: found[2:] for name, found in times.items()}  # the first steps allocate the state


def main() -> None:
    """Measure each method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,nora")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = load_base()
    print("| method | optimizer | whole step, ms | ratio | optimizer.step(), ms | ratio |\n" + "| --- " * 6 + "|")
    for method in args.methods.split(","):
        rank = 8 if method == "lora" else method_defaults(method)["rank"]
        targets = embedded_defaults(method)["target_modules"]
        add_adapter(pipe, PRESETS[method](r=rank, target_modules=targets), ADAPTER)
        pipe.unet.train()
        times = measure(pipe, method, args.batch, args.rounds)
        for name, own in times.items():
            cells = []
            for kind in (0, 1):
                ratios = [mine[kind] / other[kind] for mine, other in zip(own, times["AdamW"], strict=True)]
                seconds = statistics.median(each[kind] for each in own)
                cells += [f"{1e3 * seconds:.1f}", f"{statistics.median(ratios):.2f}"]
            print(f"| {method} r {rank} | {name} | {' | '.join(cells)} |", flush=True)
        delete_adapter(pipe, ADAPTER)


if __name__ == "__main__":
    main()
