"""Training time of several subjects in one run, against one run per subject.

    python benchmarks/many_subjects.py [--subjects 4] [--batch 1] [--steps 8] [--base FOLDER_OR_ID]

The columns are the milliseconds of one step of every subject and the images trained on per second, without setup:

- *one after the other*: the sum over the subjects of the median step of their own runs;
- *together*: the median step of a run with all subjects.

The last line has the speedup and the largest relative difference of a loss, which shows that both do the same work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from nora_diffusion import TrainConfig
from nora_diffusion.training import train, train_subjects

EXAMPLES = Path(__file__).parents[1] / "examples" / "subjects"


def settings(number: int, examples: list[Path]) -> dict[str, Any]:
    """The settings of one subject. The example subjects repeat with new seeds."""
    folder = examples[number % len(examples)]
    return {
        "name": f"{folder.name}-{number}", "instance_data_dir": str(folder),
        "instance_prompt": f"a sks {folder.name}", "seed": number,
    }  # fmt: skip


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seconds(folder: Path) -> float:
    """Median seconds of a step, without the first two."""
    return statistics.median(row["seconds"] for row in read_log(folder)[2:])


def main() -> None:
    """Train both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--base", default=None)
    args = parser.parse_args()
    examples = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
    subjects = [settings(number, examples) for number in range(args.subjects)]
    common: dict[str, Any] = {
        "pretrained_model_name_or_path": args.base, "train_batch_size": args.batch,
        "max_train_steps": args.steps, "mixed_precision": "no", "method": "nora",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "subjects.yaml"
        file.write_text(yaml.safe_dump(subjects))
        train_subjects(TrainConfig(**common, subjects=str(file), output_dir=f"{folder}/together"))
        for subject in subjects:
            own = {key: value for key, value in subject.items() if key != "name"}
            train(TrainConfig(**common, **own, output_dir=f"{folder}/alone/{subject['name']}"))
        pairs = [(Path(folder, "together", s["name"]), Path(folder, "alone", s["name"])) for s in subjects]
        together, alone = seconds(pairs[0][0]), sum(seconds(own) for _, own in pairs)
        losses = [
            (a["loss"], b["loss"]) for one, own in pairs for a, b in zip(read_log(one), read_log(own), strict=True)
        ]
    rows = args.subjects * args.batch
    print(f"\n{args.subjects} subjects, batch {args.batch} each, {torch.get_num_threads()} threads, ", end="")
    print("GPU" if torch.cuda.is_available() else "CPU")
    print("\n| | ms for a step of every subject | images/s |\n| --- | --- | --- |")
    for label, time in (("one after the other", alone), ("together", together)):
        print(f"| {label} | {1e3 * time:.0f} | {rows / time:.1f} |")
    print(f"\n{alone / together:.2f} times as fast; largest relative difference of a loss: ", end="")
    print(f"{max(abs(a - b) / b for a, b in losses):.1e}")


if __name__ == "__main__":
    main()
