"""Several subjects in one run, in one batch or over a cluster."""
