"""The HTTP server around the engine: three APIs, keys, limits, metrics."""
