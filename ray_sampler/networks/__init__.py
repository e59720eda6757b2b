"""Where networks come from: checkpoints of every family, read without running anything in them. Knows no Ray."""
