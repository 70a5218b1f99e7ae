"""What it costs to serve many subjects in one pass: together, one by one, and as ordinary LoRAs by PEFT.

    python benchmarks/mixed_batch.py [--subjects 8] [--rounds 5] [--base FOLDER_OR_ID] [--device cpu]

One denoising pass under guidance, two rows a subject, on the embedded base. The ways alternate in every round, and the
table gives medians over the rounds, also as multiples of the base alone. Before anything is timed, every row is
compared with its solo run.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from nora_diffusion import add_adapter, mixed_batch, nora, open_pipeline, set_adapters
from nora_diffusion.loaders import trainable_parameters

R, INNER_R = 32, 4


def fill(pipe: Any, subjects: int) -> dict[str, list[str]]:
    """Three adapters a subject with random numbers: in a shared basis, in one of its own, an ordinary LoRA."""
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
    """A batch of ``[negative..., positive...]`` rows and the ways to run it."""

    def __init__(self, pipe: Any, subjects: int) -> None:
        self.pipe, self.subjects = pipe, subjects
        self.names = fill(pipe, subjects)
        unet, rows = pipe.unet, 2 * subjects
        side, device, dtype = unet.config.sample_size, unet.device, unet.dtype
        torch.manual_seed(0)
        self.x = torch.randn(rows, unet.config.in_channels, side, side, device=device, dtype=dtype)
        self.states = torch.randn(rows, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)

    def run(self, rows: Any = slice(None)) -> Tensor:
        out: Tensor = self.pipe.unet(self.x[rows], 500, self.states[rows]).sample
        return out

    def one_by_one(self, kind: str) -> Tensor:
        parts = []
        for i, name in enumerate(self.names[kind]):
            set_adapters(self.pipe, name)
            parts.append(self.run([i, i + self.subjects]))
        return torch.stack(parts, dim=1).flatten(0, 1)

    def context(self, kind: str) -> AbstractContextManager[None]:
        return mixed_batch(self.pipe, self.names[kind]) if kind else nullcontext()

    def check(self) -> None:
        """Every row equals its solo run."""
        for kind in self.names:
            with self.context(kind):
                together = self.run()
            alone = self.one_by_one(kind)
            error = float(((together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).max())
            print(f"largest relative difference of a row from its solo run, {kind}: {error:.1e}")


def seconds(work: Callable[[], object]) -> float:
    """Seconds of the processor (a busy machine does not change them), or of the clock where there is a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; entering the context is timed on its own."""
    found: dict[str, list[float]] = {}
    labels = {"shared": "NoRA, shared basis", "own": "NoRA, own bases", "lora": "LoRA by PEFT's adapter_names"}
    for _ in range(rounds + 1):
        set_adapters(bench.pipe, [])
        found.setdefault("base alone", []).append(seconds(bench.run))
        for kind, label in labels.items():
            context = bench.context(kind)
            found.setdefault(f"enter: {label}", []).append(seconds(context.__enter__))
            bench.run()  # the bank is formed once
            found.setdefault(f"together: {label}", []).append(seconds(bench.run))
            context.__exit__(None, None, None)
            found.setdefault(f"one by one: {label}", []).append(seconds(lambda kind=kind: bench.one_by_one(kind)))  # type: ignore[misc]
    return {label: times[1:] for label, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default=None)
    parser.add_argument("--device", default="cpu")
    values = parser.parse_args()
    pipe = open_pipeline(values.base, device=values.device)
    with torch.no_grad():
        bench = Bench(pipe, values.subjects)
        bench.check()
        found = measure(bench, values.rounds)
    base = statistics.median(found["base alone"])
    print(
        f"\n{values.subjects} subjects, {2 * values.subjects} rows, r = {R}, r' = {INNER_R}, {values.device}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads; medians of {values.rounds} rounds\n")
    print("| | ms | times the base alone |\n| --- | --- | --- |")
    for label, times in found.items():
        print(f"| {label} | {1e3 * statistics.median(times):.1f} | {statistics.median(times) / base:.2f} |")


if __name__ == "__main__":
    main()
