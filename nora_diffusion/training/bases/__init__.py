"""Bases that are learned from pseudo-subjects: objects that the base knows and draws itself."""
