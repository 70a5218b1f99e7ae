"""The maths of adapters: what each adds to one projection. Imports torch only."""
