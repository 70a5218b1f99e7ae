"""Trainings that the app starts: each is a process with a folder."""
