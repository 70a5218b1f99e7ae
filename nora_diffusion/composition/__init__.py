"""Composition: mixing several adapters into one, and measuring how much two adapters overlap."""
