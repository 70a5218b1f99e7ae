"""How fast several subjects train together, and how fast one after the other.

    python benchmarks/many_subjects.py [--subjects 4] [--batch 1] [--steps 8] [--base FOLDER_OR_ID]

Steps on the embedded base, setting up left out: the median over the steps of a run of all subjects, and the sum of
their medians in runs of their own. The largest difference of the losses says that the work was the same.
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

PHOTOS = Path(__file__).parents[1] / "examples" / "subjects"


def settings(number: int, photos: list[Path]) -> dict[str, Any]:
    """One of the example subjects, again and again under new seeds."""
    folder = photos[number % len(photos)]
    return {
        "name": f"{folder.name}-{number}", "instance_data_dir": str(folder),
        "instance_prompt": f"a sks {folder.name}", "seed": number,
    }  # fmt: skip


def journal(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seconds(folder: Path) -> float:
    """The median step, without the first two."""
    return statistics.median(row["seconds"] for row in journal(folder)[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--base", default=None)
    values = parser.parse_args()
    photos = sorted(path for path in PHOTOS.iterdir() if path.is_dir())
    subjects = [settings(number, photos) for number in range(values.subjects)]
    common: dict[str, Any] = {
        "pretrained_model_name_or_path": values.base, "train_batch_size": values.batch,
        "max_train_steps": values.steps, "mixed_precision": "no", "method": "nora",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        listed = Path(place) / "subjects.yaml"
        listed.write_text(yaml.safe_dump(subjects))
        train_subjects(TrainConfig(**common, subjects=str(listed), output_dir=f"{place}/together"))
        for subject in subjects:
            own = {key: value for key, value in subject.items() if key != "name"}
            train(TrainConfig(**common, **own, output_dir=f"{place}/alone/{subject['name']}"))
        pairs = [(Path(place) / "together" / s["name"], Path(place) / "alone" / s["name"]) for s in subjects]
        together, alone = seconds(pairs[0][0]), sum(seconds(own) for _, own in pairs)
        losses = [(a["loss"], b["loss"]) for one, own in pairs for a, b in zip(journal(one), journal(own), strict=True)]
    rows = values.subjects * values.batch
    print(f"\n{values.subjects} subjects, batch {values.batch} each, {torch.get_num_threads()} threads, ", end="")
    print("GPU" if torch.cuda.is_available() else "CPU")
    print("\n| | ms for a step of every subject | photos/s |\n| --- | --- | --- |")
    for label, time in (("one after the other", alone), ("together", together)):
        print(f"| {label} | {1e3 * time:.0f} | {rows / time:.1f} |")
    print(f"\n{alone / together:.2f} times as fast; largest relative difference of a loss: ", end="")
    print(f"{max(abs(a - b) / b for a, b in losses):.1e}")


if __name__ == "__main__":
    main()
