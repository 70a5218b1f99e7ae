"""Sweeps: one training for each combination of settings, each in a folder of its own."""
