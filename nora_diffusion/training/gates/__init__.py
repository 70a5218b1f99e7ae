"""Learns the gates of several frozen adapters (MoLE)."""
