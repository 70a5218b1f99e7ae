"""Many machines: the engine's pictures are made by replicas of a deployment of Ray Serve."""
