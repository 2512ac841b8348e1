"""Training with Lightning: data, steps, checkpoints, averaging, plans of several runs."""
