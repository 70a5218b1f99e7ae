"""Step time and peak memory of every method, rank allocation, strategy and optimizer on the embedded base, on a CPU.

    python benchmarks/family.py [--methods lora adalora ...] [--rounds 3] [--steps 12]

The rows are the names that `python -m nora_diffusion.tiny_sd.comparing` knows, at their defaults: batches of 4 images,
all kinds of layers (mixtures with a token router leave out the convolutions). Each run is a process of its own with one
thread, so that peaks do not mix. Every round runs all methods in turn. *ratio*: the median over the rounds of a
method's median step divided by LoRA's in the same round; the first two steps are left out. *memory*: the largest
resident memory of a round above that of the process with the pipeline loaded; encodings of the images included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from nora_diffusion.tiny_sd.measures.methods import METHODS, training_settings

SUBJECT = Path(__file__).parents[1] / "examples/subjects/tiger"
FIRST = "lora"
SKIPPED = 2


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(method: str, steps: int) -> dict[str, float]:
    """One run, in this process: median step in seconds, memory in MB, trained parameters."""
    from nora_diffusion import load_base
    from nora_diffusion.training import TrainConfig, train

    load_base()
    loaded = peak()
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "max_train_steps": steps, "seed": 0, "mixed_precision": "bf16"}
        settings: dict[str, Any] = {**training_settings(method), **own}
        result = train(
            TrainConfig(instance_data_dir=str(SUBJECT), instance_prompt="a sks cat", use_captions=True, **settings)
        )
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][SKIPPED:]
    return {"step": median(seconds), "memory": peak() - loaded, "trained": result.trainable_parameters}


def run(method: str, steps: int) -> dict[str, float]:
    """One run in a new process."""
    command = [sys.executable, __file__, "--steps", str(steps), "--only", method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{method}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Run all methods in turn, several rounds, and print the table."""
    names = [name for name, settings in METHODS.items() if settings is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.steps)))
        return
    rounds = [
        {name: run(name, args.steps) for name in dict.fromkeys([FIRST, *args.methods])} for _ in range(args.rounds)
    ]
    print("| method | trained parameters | step, ms | ratio | memory above the model, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name in rounds[0]:
        step = median(each[name]["step"] for each in rounds)
        ratio = median(each[name]["step"] / each[FIRST]["step"] for each in rounds)
        memory = max(each[name]["memory"] for each in rounds)
        print(f"| {name} | {rounds[0][name]['trained']:,} | {1000 * step:.0f} | {ratio:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
