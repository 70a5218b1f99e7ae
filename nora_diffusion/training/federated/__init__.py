"""Training on photos that stay with their owners: clients train, a server averages their factors."""
