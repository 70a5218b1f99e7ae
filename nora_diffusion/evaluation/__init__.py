"""Looking at what was learned: grids of pictures over settings, and what an adapter does to the weights."""
