"""The app: generate, mix, train and compare in the browser.

``serve(AppConfig(...))`` starts it. ``server`` and ``security`` serve it, ``state`` holds what all pages share (the
engine with the pipeline, the queue for the device, the library, the trainings), ``shell`` and ``tabs/`` build the page.
To add a tab, see ``layout/page``.
"""

from __future__ import annotations

import importlib.util

from ..errors import UserError
from .config import AppConfig

__all__ = ["AppConfig", "serve"]


def serve(config: AppConfig) -> None:
    """Serve the app until Ctrl-C. Raises :class:`UserError` for invalid settings, or if gradio is missing."""
    config.check()  # before the slow imports
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install 'nora-diffusion[app]'")
    from .server import serve as start

    start(config)
