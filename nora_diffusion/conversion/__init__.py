"""Adapters as plain LoRAs for other tools, and plain LoRAs as adapters."""
