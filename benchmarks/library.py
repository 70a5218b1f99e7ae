"""Time of the app's library to list a folder with many adapters.

    python benchmarks/library.py [--adapters 500] [--rounds 5]

The files are NoRA adapters of the embedded base (r = 32, r' = 16, outer pairs in the file). The table has the median
seconds over the rounds, and their ratio to the first listing, of three ways to list the folder:

- *first listing*: reads the header of every file;
- *next listing*: nothing has changed;
- *listing with hashes*: reads all bytes of every file for its SHA-256, for comparison.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nora_diffusion import add_adapter, load_base, nora, save_adapter
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.ui.library import Library


def fill(folder: Path, adapters: int) -> None:
    """Write copies of one adapter, each in its own folder, as the trainer does."""
    pipe = load_base()
    add_adapter(pipe, nora(r=32, inner_r=16, basis="orthogonal"), "subject")
    first = save_adapter(pipe, folder / "subject-0", "subject", info={"trigger": "sks", "class_word": "dog"})
    for i in range(1, adapters):
        (folder / f"subject-{i}").mkdir()
        shutil.copyfile(first, folder / f"subject-{i}" / FILE_NAME)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hash_all(folder: Path) -> None:
    """List the folder and hash every file, without cached hashes."""
    (folder / ".hashes.json").unlink(missing_ok=True)
    Library(folder).hash_all()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"first listing": [], "next listing": [], "listing with hashes": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fill(folder, args.adapters)
        for _ in range(args.rounds):
            library = Library(folder)
            times["first listing"].append(seconds(library.entries))
            times["next listing"].append(seconds(library.entries))
            times["listing with hashes"].append(seconds(lambda: hash_all(folder)))
    print(f"| {args.adapters} adapters | median s | ratio to the first listing |\n| --- | --- | --- |")
    first = statistics.median(times["first listing"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
