"""diffusers pipelines: opening them, their components and projections, measurements on them."""
