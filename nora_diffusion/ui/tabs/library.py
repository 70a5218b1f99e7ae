"""The Library tab: cards of adapters."""

from __future__ import annotations

from ..page import Page

TITLE = "Library"


def build(page: Page) -> None:
    """Cards."""
