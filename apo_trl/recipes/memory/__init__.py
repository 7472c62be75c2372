"""The plan of memory: what one GPU needs at the peak of a training step."""
