"""Training and evaluation: loops, metrics, optimizer, schedule, moving average, checkpoints."""
