"""Training: objective, loop, checkpoints, metrics. `train.launch.launch` runs a configuration."""
