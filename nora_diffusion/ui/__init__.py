"""The app: generate, mix, train and compare in the browser.

``serve(AppConfig(...))`` starts it. Parts: ``server`` and ``security`` (what is open to whom), ``state`` (what all
pages share: the engine with the one pipeline, the line before the device, the library, the trainings), ``shell`` and
``tabs/`` (what a page shows). To add a tab, see ``page``.
"""

from __future__ import annotations

import importlib.util

from ..errors import UserError
from .config import AppConfig

__all__ = ["AppConfig", "serve"]


def serve(config: AppConfig) -> None:
    """Serve the app until Ctrl-C. Raises :class:`UserError` for settings that will not do, or without gradio."""
    config.check()  # at once: what follows takes seconds
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install 'nora-diffusion[app]'")
    from .server import serve as start

    start(config)
