"""One training step: noise, prediction, loss, optimizer."""
