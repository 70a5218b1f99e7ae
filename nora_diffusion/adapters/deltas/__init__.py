"""The maths: what an adapter adds to one projection. Needs torch only."""
