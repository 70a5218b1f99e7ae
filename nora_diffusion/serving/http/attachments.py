"""Adapters that come with a request and go with it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from contextlib import ExitStack

from ...errors import UserError
from .answers import Refused
from .state import State
from .uploads import NAME

MAX_ATTACHED = 32 * 2**20
"""Bytes of all adapters of a request. Larger ones are uploaded, so that no body keeps them in memory."""
MAX_BASE64 = -(-MAX_ATTACHED // 3) * 4


def attached(state: State, adapters: Mapping[str, str], ending: ExitStack) -> dict[str, str]:
    """Check adapters, given in base64, as uploads are; their files, which are removed and unloaded by ``ending``.

    Raises :class:`UserError` and :class:`Refused`, as an upload.
    """
    uploads, files = state.catalog.open_uploads, dict[str, str]()
    contents = {name: _decoded(name, text) for name, text in adapters.items()}
    if sum(map(len, contents.values())) > MAX_ATTACHED:
        raise Refused(413, f"the adapters are too large: send at most {MAX_ATTACHED >> 20} MiB, or upload them")
    for name, content in contents.items():
        path = uploads.hold(content)
        ending.callback(path.unlink, missing_ok=True)
        files[name] = str(path)
        uploads.check(path, state.engine, f"the adapter {name}")
    ending.callback(state.engine.forget_unnamed)
    return files


def _decoded(name: str, text: str) -> bytes:
    if not NAME.fullmatch(name):
        raise UserError("the name of an adapter has letters, digits, '_' and '-', at most 64: choose another")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"the adapter {name} is not base64: send the bytes of its file in base64") from None
