"""Training: optimiser groups, the loop, logs, and checkpoints that resume exactly."""
