"""The image of docs/benchmark.md: the curves of the first protocol of some results files.

    python benchmarks/curves.py [FILE.json ...] [--picture docs/images/leaderboard.png]

Needs Chromium (`make browser`, or one of the system). Takes some seconds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from nora_diffusion.results.leaderboard import read_all, write_leaderboard

ROOT = Path(__file__).parents[1]
STAGES = ("seeds", "small", "sizes", "methods", "ranks", "mixtures", "mixtures-seed2", "routers", "routers-seed2")
FILES = tuple(ROOT / f"results/embedded-{stage}.json" for stage in STAGES)
WIDTH, HEIGHT = 1200, 900


def draw(files: list[Path], picture: Path) -> None:
    """Save the curves, as wide as the page."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_leaderboard(read_all(files), Path(folder))
        program = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        with playwright.chromium.launch(executable_path=program, args=["--no-sandbox"]) as browser:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto((Path(folder) / "leaderboard.html").as_uri())
            page.locator("section").first.screenshot(path=picture)


def main() -> None:
    """Draw the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[*FILES], metavar="FILE.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/leaderboard.png")
    args = parser.parse_args()
    draw(args.files, args.picture)


if __name__ == "__main__":
    main()
