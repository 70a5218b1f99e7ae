"""What those who run a server see of it: metrics and traces."""
