"""Error messages as a page shows them: sentences without the folders of this machine."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

INTERNAL_ERROR = "Internal error. The terminal that runs the app shows the details."
OUT_OF_MEMORY = (
    "The device ran out of memory. Its memory was freed and the app keeps running: choose a smaller image, or close "
    "other programs that use the device."
)
FIRST_WORDS = frozenset(
    ("a", "an", "another", "cannot", "more", "no", "the", "there", "they", "this", "to", "training", "two", "unknown")
)
"""Words at the start of a message that get a capital letter; others may be names of adapters, files or settings."""
_QUOTED = re.compile(r"""(['"])(?:[A-Za-z]:)?[\\/](?:[^'"\n]*[\\/])?([^'"\n\\/]+)\1""")
_BELOW_KNOWN = re.compile(r"""\0(?:[^\s\\/:;,'"<>]+[\\/])*""")
_PLAIN = re.compile(r"""(?<![\w:/.<>])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:;,'"<>]+[\\/])+""")


def sentence(error: object) -> str:
    """An error without folders, starting with a capital letter, unless it starts with a name. Not escaped."""
    text = without_folders(str(error))
    return text[:1].upper() + text[1:] if text.partition(" ")[0] in FIRST_WORDS else text


def without_folders(text: str) -> str:
    """Cut every absolute path in ``text`` down to its last name; URLs stay."""
    text = _QUOTED.sub(r"\1\2\1", text)
    temporary = Path(tempfile.gettempdir())  # in the app's private folder
    known = (str(folder) for folder in (temporary, temporary.parent, Path.home()) if len(folder.parts) > 1)
    for folder in sorted(known, key=len, reverse=True):  # their names may contain spaces
        text = text.replace(f"{folder}{os.sep}", "\0")
    return _PLAIN.sub("", _BELOW_KNOWN.sub("", text))


def without_dashes(text: str) -> str:
    """Flags as setting names: the trainer writes ``--rank``, a page has fields and ``rank: 32`` lines."""
    return re.sub(r"--(?=[a-z])", "", text)


def short_name(base: str) -> str:
    """The name of a base, without its folder."""
    return (Path(base).name if Path(base).is_absolute() else base) or "another base"
