"""Training: the loop, checkpoints of a run, and the features of a frozen part."""
