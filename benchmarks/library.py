"""How long the app's library takes to list many adapters.

    python benchmarks/library.py [--adapters 500] [--rounds 5]

Files of NoRA adapters of the embedded base (r = 32, r' = 16, its outer pairs in the file). In every round the folder
is listed for the first time (one header a file), again (nothing has changed), and, as the peer, with the SHA-256 of
every file, for which all bytes must be read. The table gives medians over the rounds.
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
    """Copies of one adapter, each in a folder of its own as the trainer leaves it."""
    pipe = load_base()
    add_adapter(pipe, nora(r=32, inner_r=16, basis="orthogonal"), "subject")
    first = save_adapter(pipe, folder / "subject-0", "subject", info={"trigger": "sks", "class_word": "dog"})
    for i in range(1, adapters):
        (folder / f"subject-{i}").mkdir()
        shutil.copyfile(first, folder / f"subject-{i}" / FILE_NAME)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def hash_all(folder: Path) -> None:
    """What a listing that reads whole files would do; kept hashes are thrown away first."""
    (folder / ".hashes.json").unlink(missing_ok=True)
    Library(folder).hash_all()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"first listing": [], "next listing": [], "listing with hashes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, args.adapters)
        for _ in range(args.rounds):
            library = Library(folder)
            times["first listing"].append(seconds(library.entries))
            times["next listing"].append(seconds(library.entries))
            times["listing with hashes"].append(seconds(lambda: hash_all(folder)))
    print(f"| {args.adapters} adapters | median s | against the first listing |\n| --- | --- | --- |")
    first = statistics.median(times["first listing"])
    for what, values in times.items():
        middle = statistics.median(values)
        print(f"| {what} | {middle:.3f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
