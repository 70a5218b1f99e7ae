"""The app on a server: what the tabs ask for, answered by ``nora-diffusion serve`` instead of a local base."""
