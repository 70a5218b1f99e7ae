"""Error messages on the page: sentences without this machine's folders."""

from __future__ import annotations

import errno
from pathlib import Path

import gradio as gr
import pytest

from nora_diffusion.ui.layout.page import handler
from nora_diffusion.ui.messages import sentence, short_name, without_dashes, without_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "cannot write /home/ann/lib/x.png: No space left; free space",
            "cannot write x.png: No space left; free space",
        ),
        ("the base '/home/ann/My Models/sd 15' is gone", "the base 'sd 15' is gone"),
        (r"C:\Users\ann\x.png is damaged", "x.png is damaged"),
        ("/srv/a/b/, /srv/c/d.txt", ", d.txt"),
        ("see https://huggingface.co/a/b, half (1/2) and/or the whole", None),
        ("unet/ has no weights; </p> stays", None),
    ],
)
def test_paths_are_cut_down_to_their_names(text: str, expected: str | None) -> None:
    assert without_folders(text) == (text if expected is None else expected)


def test_known_folders_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "Ann Smith"))
    assert sentence(f"{tmp_path}/Ann Smith/photos of her/1.png is empty") == "photos of her/1.png is empty"


def test_a_handler_explains_what_the_machine_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """As when the temporary folder is full: only a bug is an internal error."""

    def fail(error: Exception) -> None:
        raise error

    full = OSError(errno.ENOSPC, "No space left on device", "/home/ann/tmp/0000-1.png")
    with pytest.raises(gr.Error, match=r"0000-1\.png: No space left on device; free space") as caught:
        handler(fail)(full)
    assert "/home" not in str(caught.value) and not caplog.records
    with pytest.raises(gr.Error, match="Internal error"):
        handler(fail)(KeyError("x"))
    assert caplog.records[0].exc_info is not None


def test_a_file_name_keeps_its_case() -> None:
    assert sentence("holiday.png has no settings") == "holiday.png has no settings"
    assert sentence("/srv/holiday.png: no settings") == "holiday.png: no settings"
    assert sentence("my-dog cannot be used with this base") == "my-dog cannot be used with this base"
    assert sentence("width=9 is not possible") == "width=9 is not possible"
    assert sentence("there is nothing.") == "There is nothing."


def test_short_names_and_flags() -> None:
    assert (short_name("/models/sd15"), short_name("org/model"), short_name("")) == (
        "sd15",
        "org/model",
        "another base",
    )
    assert without_dashes("use --train_batch_size 1 -- or less") == "use train_batch_size 1 -- or less"
