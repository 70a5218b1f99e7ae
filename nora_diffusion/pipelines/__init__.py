"""diffusers pipelines: opening them, their components and projections, what is measured on them."""
