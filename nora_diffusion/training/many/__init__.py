"""Several subjects in one run, in shared batches or on a cluster."""
