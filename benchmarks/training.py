"""Step time and peak memory of training on the embedded base on a CPU, with each memory feature.

    python benchmarks/training.py [--steps 6]

Each row is one run, in a process of its own so that peaks do not mix. The columns are the median seconds of a step
(without the first), and the peak resident memory in MB above that of the process with the pipeline loaded. This ranks
the features; on a GPU, where the weights have a larger share, measure `torch.cuda.max_memory_allocated` instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

SUBJECT = Path(__file__).parents[1] / "examples/subjects/tiger"
PLAIN: dict[str, Any] = {"train_batch_size": 8, "mixed_precision": "no"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "accumulation 4 x 2": {"train_batch_size": 2, "gradient_accumulation_steps": 4},
    "checkpointing, accumulation 4 x 2": {
        "gradient_checkpointing": True, "train_batch_size": 2, "gradient_accumulation_steps": 4,
    },
    "attention only": {"target_modules": ["attn"]},
    "plain LoRA": {"method": "lora", "rank": 16},
    "frozen prior": {"with_prior_preservation": True, "prior_preservation": "frozen", "class_prompt": "a tiger"},
    "class images": {"with_prior_preservation": True, "class_prompt": "a tiger", "num_class_images": 4,
                       "sample_steps": 1},
    "text encoder": {"train_text_encoder": True},
    "checkpointing, 8-bit base": {"gradient_checkpointing": True, "quantize_base": "int8"},
    "EMA": {"ema_decay": 0.999},
}  # fmt: skip


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, steps: int) -> dict[str, Any]:
    """One run, in this process."""
    from nora_diffusion import load_base
    from nora_diffusion.training import TrainConfig, train

    load_base()
    loaded = peak()
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainConfig(
                instance_data_dir=str(SUBJECT), instance_prompt="a sks tiger", output_dir=folder, max_train_steps=steps,
                seed=0, basis="svd" if "LoRA" not in name else None, **{**PLAIN, **FEATURES[name]},
            )
        )  # fmt: skip
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    return {"feature": name, "step_s": round(median(seconds), 3), "memory_mb": round(peak() - loaded)}


def main() -> None:
    """Run each feature in a new process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=FEATURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.steps)))
        return
    print("| feature | step, s | memory above the model, MB |\n| --- | --- | --- |")
    for name in FEATURES:
        command = [sys.executable, __file__, "--steps", str(args.steps), "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {row['step_s']} | {row['memory_mb']} |", flush=True)


if __name__ == "__main__":
    main()
