"""Trainings that the app starts, each a process with a folder."""
