"""Commands print their results and only those warnings of other libraries that matter."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as transformers

from nora_diffusion.quiet import KNOWN_WARNINGS, hide_known_warnings, no_loading_bars


def test_a_command_prints_its_result_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    flags = f"--base {tiny_base} --steps 1 --width 16 --height 16 --prompt dog --out {tmp_path}/out"
    command = [sys.executable, "-m", "nora_diffusion", "generate", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "out/0000-0.png")]
    assert done.stderr == ""


def test_only_known_warnings_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    hide_known_warnings()
    hide_known_warnings()
    for name, text in KNOWN_WARNINGS:
        logging.getLogger(name).warning("before %s after", text)
        logging.getLogger(name).warning("your disk is on fire")
        assert len([f for f in logging.getLogger(name).filters if getattr(f, "text", "") == text]) == 1
    assert [record.getMessage() for record in caplog.records] == ["your disk is on fire"] * len(KNOWN_WARNINGS)


def test_progress_bars_are_restored_after_loading() -> None:
    before = [lib.is_progress_bar_enabled() for lib in (diffusers, transformers)] + [are_progress_bars_disabled()]
    with pytest.raises(ZeroDivisionError), no_loading_bars():
        assert not diffusers.is_progress_bar_enabled() and not transformers.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == before[-1]  # downloads keep their bars
        raise ZeroDivisionError
    assert [lib.is_progress_bar_enabled() for lib in (diffusers, transformers)] + [
        are_progress_bars_disabled()
    ] == before
