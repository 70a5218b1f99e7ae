"""Ranks by layer: a measurement gives scores, and a rule turns them into ranks of a given total size."""
