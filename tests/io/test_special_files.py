"""Pipes, devices, links that form a loop, and texts without end, where a file is expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nora_diffusion import UserError, inspect_adapter
from nora_diffusion.data import find_images, read_source
from nora_diffusion.evaluation.prompts import read_templates
from nora_diffusion.io.files import real_path, write_atomic
from nora_diffusion.io.tensor_file import TensorFile
from nora_diffusion.io.yaml_text import read_yaml
from nora_diffusion.pipelines.base import check_base, is_embedded


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_pipes_and_devices_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for without end; root could replace a device."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(handle, b"0" * 100)  # so that a reader fails instead of waiting
    try:
        for read in (TensorFile, read_source):
            with pytest.raises(UserError, match="is a pipe or a device, not a file"):
                read(pipe)
        with pytest.raises(UserError, match=r"cannot write .*: it is a pipe or a device; choose another path"):
            write_atomic(pipe, "text")
        with pytest.raises(UserError, match="no adapter at") as error:
            inspect_adapter(pipe)
        assert "did you mean" not in str(error.value)
        assert [*tmp_path.iterdir()] == [pipe]
    finally:
        os.close(handle)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device without end")
def test_a_text_without_end_is_not_read_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero has more than 16 MiB: give a shorter text"):
        read_yaml(Path("/dev/zero"), "config")
    with pytest.raises(UserError, match="/dev/zero has more than 16 MiB"):
        read_templates("/dev/zero")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "bom.yaml", "config") == {"a": "1"}


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_a_loop_of_links_is_a_sentence(tmp_path: Path) -> None:
    """``Path.resolve`` raises a RuntimeError for it."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop / "x").name == "x" and not is_embedded(loop)
    for read in (inspect_adapter, check_base, lambda path: find_images(path)):
        with pytest.raises(UserError, match="loop"):
            read(loop)
