"""Training and evaluation: loss, optimizer, schedule, moving average, loops, checkpoints. Knows no configuration."""
