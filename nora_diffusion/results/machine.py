"""What a results file says of the machine and the command: enough to compare, and nothing private."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Literal

from .schema import Machine

CPU_INFO = Path("/proc/cpuinfo")


def this_machine(seconds: Literal["cpu", "gpu", "clock"] = "cpu") -> Machine:
    """The processor, the cores that this process may use, and the GPU if there is one. No names, no addresses."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Machine(_processor(), cores(), accelerator, seconds)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    if CPU_INFO.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def command_text(program: str, words: Sequence[str]) -> str:
    """A command as text; of absolute paths only the last part, because folders often tell who ran it."""
    return shlex.join([*program.split(), *map(without_folders, words)])


def without_folders(word: str) -> str:
    """A word whose absolute path, also behind an equals sign, is cut to its last part."""
    head, equals, tail = word.rpartition("=")
    path: PurePath = PurePosixPath(tail)
    if not path.is_absolute():
        path = PureWindowsPath(tail)
    return f"{head}{equals}{path.name}" if path.is_absolute() or tail.startswith("~") else word


def today() -> str:
    """The date, in UTC."""
    return datetime.now(timezone.utc).date().isoformat()
