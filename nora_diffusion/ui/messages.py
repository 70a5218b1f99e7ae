"""What a page says of errors: sentences without this machine's folders, which are nobody's business."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

INSIDE = "Something went wrong inside; the terminal that runs the app says what."
OUT_OF_MEMORY = (
    "The device ran out of memory. It was freed and the app goes on: choose a smaller picture, or close other programs "
    "that use the device."
)
_QUOTED = re.compile(r"""(['"])(?:[A-Za-z]:)?[\\/](?:[^'"\n]*[\\/])?([^'"\n\\/]+)\1""")
_BELOW_KNOWN = re.compile(r"""\0(?:[^\s\\/:;,'"<>]+[\\/])*""")
_PLAIN = re.compile(r"""(?<![\w:/.<>])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:;,'"<>]+[\\/])+""")


def sentence(error: object) -> str:
    """An error as a page says it: no folders, a capital letter first but for a file's name. It is not escaped yet."""
    text = without_folders(str(error))
    first = text.partition(" ")[0].rstrip(".,:;")
    return text if "." in first else text[:1].upper() + text[1:]


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut down to its last name; addresses of web pages stay."""
    text = _QUOTED.sub(r"\1\2\1", text)
    known = (str(folder) for folder in (Path(tempfile.gettempdir()), Path.home()) if len(folder.parts) > 1)
    for folder in sorted(known, key=len, reverse=True):  # these may have spaces in their names
        text = text.replace(f"{folder}{os.sep}", "\0")
    return _PLAIN.sub("", _BELOW_KNOWN.sub("", text))


def without_dashes(text: str) -> str:
    """The trainer speaks of its flags; a page has fields and ``key: value`` lines."""
    return re.sub(r"--(?=[a-z])", "", text)


def short_name(base: str) -> str:
    """A base's name, without the folders of the machine that it was found on."""
    return (Path(base).name if Path(base).is_absolute() else base) or "another base"
