"""Finds the adapters of a library that suit a prompt."""
