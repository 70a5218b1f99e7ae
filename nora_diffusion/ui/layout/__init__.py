"""Shared by all tabs: page helpers, theme, adapter cards."""
