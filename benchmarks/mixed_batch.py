"""Time of one denoising step for many subjects: in one mixed batch, and subject by subject.

    python benchmarks/mixed_batch.py [--subjects 8] [--rounds 5] [--base FOLDER_OR_ID] [--device cpu]

The batch has two rows per subject (with and without the prompt, as for guidance). The columns are the median time of a
pass over the rounds and its ratio to the base without adapters. Rows, for NoRA with a shared basis, NoRA with one basis
per subject, and plain LoRAs:

- *enter*: entering the context ``mixed_batch``, once per generation;
- *together*: one pass in which each row has its own adapter (LoRAs: PEFT's ``adapter_names``);
- *one by one*: one pass per subject, switching the adapter in between.

First, the outputs of both ways are compared, and the largest relative difference of a row is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from nora_diffusion import add_adapter, mixed_batch, nora, open_pipeline, set_adapters
from nora_diffusion.loaders import trainable_parameters

R, INNER_R = 32, 4


def fill(pipe: Any, subjects: int) -> dict[str, list[str]]:
    """Three random adapters per subject: NoRA in a shared basis, NoRA in its own basis, and a plain LoRA."""
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    names: dict[str, list[str]] = {"shared": [], "own": [], "lora": []}
    for i in range(subjects):
        torch.manual_seed(i)
        add_adapter(pipe, nora(r=R, inner_r=INNER_R, basis="svd"), f"shared-{i}")
        add_adapter(pipe, nora(r=R, inner_r=INNER_R, basis="orthogonal"), f"own-{i}")
        targets = pipe.unet.peft_config["shared-0"].target_modules
        config = LoraConfig(r=INNER_R, lora_alpha=INNER_R, target_modules=list(targets), init_lora_weights=False)
        pipe.unet.add_adapter(config, f"lora-{i}")
        for kind, group in names.items():
            group.append(f"{kind}-{i}")
        for kind in ("shared", "own"):
            for parameter in trainable_parameters(pipe, f"{kind}-{i}").values():
                parameter.data.normal_(std=0.1)
    return names


class Bench:
    """A batch of ``[negative..., positive...]`` rows, and the ways to run it."""

    def __init__(self, pipe: Any, subjects: int) -> None:
        self.pipe, self.subjects = pipe, subjects
        self.names = fill(pipe, subjects)
        unet, rows = pipe.unet, 2 * subjects
        side, device, dtype = unet.config.sample_size, unet.device, unet.dtype
        torch.manual_seed(0)
        self.x = torch.randn(rows, unet.config.in_channels, side, side, device=device, dtype=dtype)
        self.states = torch.randn(rows, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)

    def run(self, rows: Any = slice(None)) -> Tensor:
        """One pass of the UNet over some rows of the batch."""
        out: Tensor = self.pipe.unet(self.x[rows], 500, self.states[rows]).sample
        return out

    def one_by_one(self, kind: str) -> Tensor:
        """One pass per subject; the rows come back in the order of the batch."""
        outputs = []
        for i, name in enumerate(self.names[kind]):
            set_adapters(self.pipe, name)
            outputs.append(self.run([i, i + self.subjects]))
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def mixed(self, kind: str) -> AbstractContextManager[None]:
        """The context in which each row of the batch has its own adapter."""
        return mixed_batch(self.pipe, self.names[kind])

    def check(self) -> None:
        """Print how much the rows of a mixed batch differ from passes of their own."""
        for kind in self.names:
            with self.mixed(kind):
                together = self.run()
            alone = self.one_by_one(kind)
            error = float(((together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).max())
            print(f"largest relative difference of a row, {kind}: {error:.1e}")


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds with a GPU, else CPU seconds (other programs do not affect them)."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one warm-up round."""
    times: dict[str, list[float]] = {}
    labels = {"shared": "NoRA, shared basis", "own": "NoRA, own bases", "lora": "LoRA by PEFT's adapter_names"}
    for _ in range(rounds + 1):
        set_adapters(bench.pipe, [])
        times.setdefault("base alone", []).append(seconds(bench.run))
        for kind, label in labels.items():
            context = bench.mixed(kind)
            times.setdefault(f"enter: {label}", []).append(seconds(context.__enter__))
            bench.run()  # not timed: the first pass builds the bank of factors
            times.setdefault(f"together: {label}", []).append(seconds(bench.run))
            context.__exit__(None, None, None)
            times.setdefault(f"one by one: {label}", []).append(seconds(lambda kind=kind: bench.one_by_one(kind)))  # type: ignore[misc]
    return {label: seconds_per_round[1:] for label, seconds_per_round in times.items()}


def main() -> None:
    """Print the check and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = open_pipeline(args.base, device=args.device)
    with torch.no_grad():
        bench = Bench(pipe, args.subjects)
        bench.check()
        times = measure(bench, args.rounds)
    base = statistics.median(times["base alone"])
    print(f"\n{args.subjects} subjects, {2 * args.subjects} rows, r = {R}, r' = {INNER_R}, {args.device}, ", end="")
    print(f"{torch.get_num_threads()} threads; medians of {args.rounds} rounds\n")
    print("| | ms | ratio to the base |\n| --- | --- | --- |")
    for label, seconds_per_round in times.items():
        median = statistics.median(seconds_per_round)
        print(f"| {label} | {1e3 * median:.1f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
