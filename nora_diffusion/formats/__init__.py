"""File formats: our adapter files and packs, and the adapter files of other tools. Files only, no models."""
