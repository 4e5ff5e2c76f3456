"""The step, the loop, checkpoints."""
