"""``nora-diffusion data``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nora_diffusion.cli import main

PHOTOS = Path(__file__).parents[2] / "examples" / "photos" / "dog6"


def test_the_report_lists_rejects_and_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(PHOTOS, tmp_path / "photos")
    shutil.copy(folder / "01.jpg", folder / "copy.jpg")
    (folder / "cut.jpg").write_bytes((folder / "02.jpg").read_bytes()[:2000])
    (folder / "00.txt").write_text("a sks dog on grass")
    out = tmp_path / "report"
    assert main(["data", str(folder), "--out", str(out), "--resolution", "128", "--crop", "center"]) == 0
    output = capsys.readouterr().out
    assert "rejected: cut.jpg is cut off: the lower 97%" in output and "6 photos, 1 rejected" in output
    missing = "5 of 6 photos have no caption (01.jpg, 02.jpg, 03.jpg, and 2 more)"
    assert f"warning: {missing}: add a text file such as 01.txt, or give --instance_prompt for them\n" in output
    report = json.loads((out / "data_report.json").read_text())
    assert [pair["files"] for pair in report["duplicates"]] == [["01.jpg", "copy.jpg"]]
    assert [photo["caption"] for photo in report["photos"][:2]] == ["a sks dog on grass", "(no caption)"]
    assert all(photo["shape"] == [128, 128] and len(photo["views"]) == 1 for photo in report["photos"])
    assert "data:image/jpeg;base64," in (out / "data_report.html").read_text()


def test_errors_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "page.png").write_text("<html>")
    assert main(["data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "page.png is not a JPEG" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(["data", str(PHOTOS), "--background", "blurple"]) == 2
